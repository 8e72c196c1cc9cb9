"""A small map of each position, narrow in its middle: beside a mixer as a second way around, or behind it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from zoo.layers.linear import linear


class Bottleneck(nnx.Module):
    """Two linear maps with a narrow layer between them.

        T(x) = gelu(x W_down) W_up

    W_up begins at 0, where whatever T is added to stays what it is.

    Args:
      d_model: width of input and output.
      width: channels between the two maps.
      dtype: dtype of the products.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Source: of a mixer's input, added to its output: Wang et al. 2023, arXiv:2312.17276 (PanGu-pi), section 3.2, with
      one such map; of its output, added to it: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 (adapters).
    """

    def __init__(
        self, d_model: int, width: int, *, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32, rngs: nnx.Rngs
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down_proj = linear(d_model, width, axes=("embed", None), **kwargs)
        self.up_proj = linear(width, d_model, axes=(None, "embed"), scale=0.0, **kwargs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Maps each position alone."""
        return self.up_proj(jax.nn.gelu(self.down_proj(x)))
