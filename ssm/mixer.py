"""What every state-space mixer is to the model around it: whole sequences, or pieces with the state carried.

What a mask says, of every mixer, those in m2 and zoo too: a position where it is False is absent. Those that are there
get what they would get in a row without it, to the bit whatever lies there, NaN included, and so do gradients.

    at the ends of a row    absent for every mixer
    in the middle, a gap    absent for every mixer in a `zoo.Backbone` or a model, which moves together what is there.
                            By itself a mixer with a convolution, which counts places, refuses it (ValueError) where the
                            mask is known. In a function that is traced it is not: the convolution then sees a gap. So
                            it does where a later piece of a row, in `extend`, begins with a position that is absent.

A mixer says with `runs_cut = True` that it may be called with rows cut over devices (`ssm.sequence_cut`), and with
`mirrors = True` that it may where they begin on the last device, too; with `carries = True` that its state is of one
size, whatever came before, so that a long row may as well be run some positions at a time.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank


class TwoSided(nnx.Module):
    """A mixer whose outputs depend on what comes later, and so has no state to go on from."""

    causal = False

    def init_state(self, batch_size: int, max_len: int | None = None) -> Any:
        """Raises a ValueError: what comes later changes every output, so there is no state to go on from."""
        raise ValueError("a bidirectional mixer has no state: every output depends on the whole sequence")

    def extend(self, x, state, *, mask=None, segment_ids=None) -> Any:
        """Raises a ValueError, as `init_state`."""
        return self.init_state(x.shape[0])


class Mixer(nnx.Module):
    """A causal sequence mixer; its `_mix(x, state, mask, segment_ids)` goes on from a state, or from none.

    Examples:
      >>> isinstance(ssm.Mamba(8, rngs=nnx.Rngs(0)), ssm.Mixer)
      True
    """

    causal = True

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences from the zero state.

        Args:
          x: input.
          mask: False where a position is not there (padding, at either end); see `ssm.mixer`.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        return self._mix(blank(mask, x), None, mask, segment_ids)[0]

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: Any,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Any]:
        """Goes on from `state` by l positions, a whole prompt or one token; any split gives the same as the whole."""
        return self._mix(blank(mask, x), state, mask, segment_ids)

    def init_state(self, batch_size: int, max_len: int | None = None) -> Any:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        raise NotImplementedError

    def _mix(self, x, state, mask, segment_ids):
        raise NotImplementedError
