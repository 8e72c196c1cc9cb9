"""Any causal mixer made to look both ways, for encoders of text and images."""

import contextlib

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm.mixer import TwoSided
from ssm.sequence_cut import cut_of, flip_pieces, mirrored


def both_ways(forward, backward, *inputs, mirrors=False, **positions):
    """The average of what reads forwards and what reads backwards, at every position.

    Args:
      forward, backward: called with the inputs and positions, the second with all of them from last to first.
      *inputs: arrays (b, l, ...).
      mirrors: whether the second may run where a row that is cut over devices begins on the last one: then each device
        flips its own piece, and no position is sent.
      **positions: mask and segment_ids, (b, l) or None.
    """
    cut = cut_of(inputs[0])
    stays = mirrors and cut is not None and inputs[0].shape[1] % cut.size == 0

    def flip(x):
        return None if x is None else flip_pieces(x, cut) if stays else jnp.flip(x, 1)

    y = forward(*inputs, **positions)  # first: it names the place of a mistake as the caller counts
    with mirrored() if stays else contextlib.nullcontext():
        y_back = backward(*map(flip, inputs), **{name: flip(value) for name, value in positions.items()})
    return 0.5 * (y + flip(y_back))


class Bidirectional(TwoSided):
    """The average of a mixer that reads forwards and one that reads backwards.

    Where a row is padded, the backward direction starts at the row's last position that is there, not in the padding.
    The average, rather than the sum, keeps the output's scale that of one direction.

    Args:
      forward: a causal mixer, such as `ssm.Mamba`.
      backward: another one, with parameters of its own.

    Examples:
      >>> one, other = (ssm.Mamba(8, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> ssm.Bidirectional(one, other)(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Schiff et al. 2024, arXiv:2403.03234 (two directions of one block); the average as the remedy of Vision
      Mamba's divergence, hustvl/Vim issue 30.
    """

    def __init__(self, forward: nnx.Module, backward: nnx.Module):
        self.forward = forward
        self.backward = backward
        mixers = forward, backward
        self.has_auxiliary_loss = any(getattr(mixer, "has_auxiliary_loss", False) for mixer in mixers)
        self.runs_cut = all(getattr(mixer, "runs_cut", False) for mixer in mixers)
        self.mirrors = all(getattr(mixer, "mirrors", False) for mixer in mixers)

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
        positions = {"mask": mask, "segment_ids": segment_ids}
        return both_ways(self.forward, self.backward, x, mirrors=self.mirrors, **positions)

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

        positions = {"mask": mask, "segment_ids": segment_ids}
        y = both_ways(keep(self.forward), keep(self.backward), x, mirrors=self.mirrors, **positions)
        return y, 0.5 * (losses[0] + losses[1])
