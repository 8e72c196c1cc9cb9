"""Sequence mixers side by side in one block, as in Falcon-H1."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int


class Parallel(nnx.Module):
    """Several mixers of one input, their outputs added.

        mixer_1(x) + mixer_2(x) + ...

    Args:
      mixers: each as it would be alone. Looks both ways where any of them does.

    Source: Zuo et al. 2025, arXiv:2507.22448 (attention and Mamba-2 on one norm, added). Its multipliers are options of
      the mixers.
    """

    def __init__(self, mixers: Sequence[Any]):
        self.mixers: Any = nnx.List(mixers)
        self.causal = all(mixer.causal for mixer in self.mixers)
        self.needs_grid = any(getattr(mixer, "needs_grid", False) for mixer in self.mixers)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: input.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          grid: rows and columns of an image whose places the positions are, for the mixers that go by them.
        """
        y: Any = 0
        for mixer in self.mixers:
            options = {"grid": grid} if getattr(mixer, "needs_grid", False) else {}
            y = y + mixer(x, mask=mask, segment_ids=segment_ids, **options)
        return y

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first position: one of each mixer."""
        return tuple(mixer.init_state(batch_size, max_len) for mixer in self.mixers)

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], tuple]:
        """Goes on from `state` by l positions, a whole prompt or one token; any split gives the same as the whole."""
        y: Any = 0
        after = []
        for mixer, before in zip(self.mixers, state, strict=True):
            added, reached = mixer.extend(x, before, mask=mask, segment_ids=segment_ids)
            y = y + added
            after.append(reached)
        return y, tuple(after)
