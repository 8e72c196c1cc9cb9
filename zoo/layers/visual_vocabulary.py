"""Ovis's visual vocabulary: an image's patches are words too, each a mixture of the rows of a learned table."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from zoo.layers.linear import linear


class VisualVocabulary(nnx.Module):
    """Probabilistic visual tokens, and the table of vectors that they are embedded by.

        p = softmax(W x)        y = p . table

    So a patch that is one word for certain has that row of the table, as a token of text has its own.

    Args:
      d_in: width of the patches.
      d_out: width of the table's rows.
      size: its rows.
      dtype: of the computation; the softmax is at least float32.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Source: Lu et al. 2024, arXiv:2405.20797, section 3.1.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.head = linear(d_in, size, init="uniform", dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = jax.nn.initializers.normal(0.02)
        self.table = nnx.Param(init(rngs.params(), (size, d_out), param_dtype), axes=("vocab", "embed"))

    def probabilities(self, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """How much of each word there is in a patch."""
        logits = self.head(x)
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)

    def embed(self, p: Float[Array, "b l v"]) -> Float[Array, "b l o"]:
        """The mixture of rows that probabilities say, in the table's dtype."""
        table = self.table[...]
        return jnp.einsum("blv,vo->blo", p.astype(table.dtype), table)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l o"]:
        """Vectors of patches as those of words."""
        return self.embed(self.probabilities(x))
