"""Any causal mixer made to look both ways, for encoders of text and images."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm.mixer import TwoSided


def both_ways(forward, backward, *inputs, **positions):
    """The average of what reads forwards and what reads backwards, at every position.

    Args:
      forward, backward: called with the inputs and positions, the second with all of them from last to first.
      *inputs: arrays (b, l, ...).
      **positions: mask and segment_ids, (b, l) or None.
    """
    backwards = {name: None if value is None else jnp.flip(value, 1) for name, value in positions.items()}
    y = forward(*inputs, **positions)  # first: it names the place of a mistake as the caller counts
    y_back = backward(*(jnp.flip(x, 1) for x in inputs), **backwards)
    return 0.5 * (y + jnp.flip(y_back, 1))


class Bidirectional(TwoSided):
    """The average of a mixer that reads forwards and one that reads backwards.

    Where a row is padded, the backward direction starts at the row's last position that is there, not in the padding.
    The average, rather than the sum, keeps the output's scale that of one direction.

    Args:
      forward: a causal mixer, such as `ssm.Mamba`.
      backward: another one, with parameters of its own.

    Source: Schiff et al. 2024, arXiv:2403.03234 (two directions of one block); the average as the remedy of Vision
      Mamba's divergence, hustvl/Vim issue 30.
    """

    def __init__(self, forward: nnx.Module, backward: nnx.Module):
        self.forward = forward
        self.backward = backward
        self.has_auxiliary_loss = any(getattr(mixer, "has_auxiliary_loss", False) for mixer in (forward, backward))

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: input.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        return both_ways(self.forward, self.backward, x, mask=mask, segment_ids=segment_ids)

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and the mean of what training adds to its loss for the two, which have `run` as well."""
        losses = []

        def keep(mixer):
            def read(x, **positions):
                y, loss = mixer.run(x, **positions)
                losses.append(loss)
                return y

            return read

        y = both_ways(keep(self.forward), keep(self.backward), x, mask=mask, segment_ids=segment_ids)
        return y, 0.5 * (losses[0] + losses[1])
