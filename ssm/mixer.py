"""What every state-space mixer is to the model around it: whole sequences, or pieces with the state carried."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int


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
    """A causal sequence mixer; its `_mix(x, state, mask, segment_ids)` goes on from a state, or from none."""

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
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        return self._mix(x, None, mask, segment_ids)[0]

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: Any,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Any]:
        """Goes on from `state` by l positions, a whole prompt or one token; any split gives the same as the whole."""
        return self._mix(x, state, mask, segment_ids)

    def init_state(self, batch_size: int, max_len: int | None = None) -> Any:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        raise NotImplementedError

    def _mix(self, x, state, mask, segment_ids):
        raise NotImplementedError
