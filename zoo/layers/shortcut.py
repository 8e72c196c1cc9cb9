"""A second way around a sequence mixer: a learned map of its input, of small rank, beside the residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from zoo.layers.linear import linear


class AugmentedShortcut(nnx.Module):
    """Added to what a mixer gives, so that positions which it makes alike stay apart.

        T(x) = gelu(x W_down) W_up

    W_up begins at 0, where a block is what it is without.

    Args:
      d_model: width of input and output.
      rank: width between the two maps.
      dtype: dtype of the products.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Source: Wang et al. 2023, arXiv:2312.17276 (PanGu-pi), section 3.2, with one such map.
    """

    def __init__(
        self, d_model: int, rank: int, *, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down_proj = linear(d_model, rank, axes=("embed", None), **kwargs)
        self.up_proj = linear(rank, d_model, axes=(None, "embed"), scale=0.0, **kwargs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Maps each position alone."""
        return self.up_proj(jax.nn.gelu(self.down_proj(x)))
