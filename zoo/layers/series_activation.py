"""A non-linearity that is a sum of several, each at a place and of a width of its own."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.mlp import ACTIVATIONS

# Their slope at 0 is 0: a term that begins there would never learn.
_FLAT = ("relu", "relu2")


class SeriesActivation(nnx.Module):
    """Sum of n terms of one activation, each of the input scaled and shifted, by numbers of each channel.

        y = sum_i act(a_i x + b_i)

    All but the first begin with a = b = 0, where they are 0: at first it is the activation itself.

    Args:
      width: channels.
      n_terms: n, at least 1.
      activation: the name of act; one with a slope at 0.
      param_dtype: dtype that a and b are kept in.

    Raises:
      ValueError: an activation that is flat at 0, with more than one term.

    Source: Wang et al. 2023, arXiv:2312.17276 (PanGu-pi), eq. 7, after Chen et al. 2023, arXiv:2305.12972 (VanillaNet).
    """

    def __init__(self, width: int, n_terms: int, activation: str, *, param_dtype: Dtype = jnp.float32):
        if n_terms > 1 and activation in _FLAT:
            raise ValueError(f"activation={activation!r} with {n_terms} terms, expected one that has a slope at 0")
        self.activation = activation
        zeros = jnp.zeros((n_terms, width), param_dtype)
        self.scale = nnx.Param(zeros.at[0].set(1), decay=False, axes=(None, "inner"))
        self.shift = nnx.Param(zeros, decay=False, axes=(None, "inner"))

    def __call__(self, x: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
        """The sum, in x's dtype."""
        terms = zip(self.scale[...].astype(x.dtype), self.shift[...].astype(x.dtype), strict=True)
        return sum((ACTIVATIONS[self.activation](x * a + b) for a, b in terms), start=jnp.zeros_like(x))
