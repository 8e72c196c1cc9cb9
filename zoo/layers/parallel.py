"""Sequence mixers side by side in one block, as in Falcon-H1."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zoo.layers.needs import POSITIONS, hand, has, needs_of_state, run_mixer


class Parallel(nnx.Module):
    """Several mixers of one input, their outputs added.

        mixer_1(x) + mixer_2(x) + ...

    Args:
      mixers: each as it would be alone. Looks both ways where any of them does.
      needs: what each of them is called with besides mask and segment_ids. None: as they say themselves.

    Examples:
      >>> mixers = ssm.Mamba(8, rngs=nnx.Rngs(0)), ssm.Mamba(8, rngs=nnx.Rngs(1))
      >>> zoo.Parallel(mixers)(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Zuo et al. 2025, arXiv:2507.22448 (attention and Mamba-2 on one norm, added). Its multipliers are options of
      the mixers.
    """

    def __init__(self, mixers: Sequence[Any], needs: Sequence[tuple[str, ...]] | None = None):
        self.mixers: Any = nnx.List(mixers)
        self.causal = all(mixer.causal for mixer in self.mixers)
        self.each_needs = tuple(needs or (tuple(getattr(mixer, "needs", ())) for mixer in self.mixers))
        self.has_auxiliary_loss = any(has(mixer, "has_auxiliary_loss") for mixer in self.mixers)
        self.runs_cut = all(has(mixer, "runs_cut") for mixer in self.mixers)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        **given: Any,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: input.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          **given: what any of the mixers needs, such as `grid`.
        """
        return self.run(x, mask=mask, segment_ids=segment_ids, **given)[0]

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        **given: Any,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and the sum of what training adds to its loss for the mixers."""
        given |= {"mask": mask, "segment_ids": segment_ids}
        y: Any = 0
        total: Any = 0
        for mixer, needs in zip(self.mixers, self.each_needs, strict=True):
            added, loss = run_mixer(mixer, x, **hand(mixer, (*POSITIONS, *needs), given))
            y, total = y + added, total + loss
        return y, total

    def init_state(self, batch_size: int, max_len: int | None = None, **given: Any) -> tuple:
        """The state before the first position: one of each mixer."""
        pairs = zip(self.mixers, self.each_needs, strict=True)
        return tuple(m.init_state(batch_size, max_len, **hand(m, needs_of_state(needs), given)) for m, needs in pairs)

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        **given: Any,
    ) -> tuple[Float[Array, "b l d"], tuple]:
        """Goes on from `state` by l positions, a whole prompt or one token; any split gives the same as the whole."""
        given |= {"mask": mask, "segment_ids": segment_ids}
        y: Any = 0
        after = []
        for mixer, needs, before in zip(self.mixers, self.each_needs, state, strict=True):
            added, reached = mixer.extend(x, before, **hand(mixer, (*POSITIONS, *needs), given))
            y = y + added
            after.append(reached)
        return y, tuple(after)
