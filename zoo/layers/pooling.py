"""One vector for a whole row, out of those of its positions."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from ssm.absent import blank

Pool = Literal["first", "mean", "last", "attention"]


def pool(
    x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, kind: Literal["first", "mean", "last"]
) -> Float[Array, "b d"]:
    """The first vector of every row, the mean of those that are there, or the last that is there.

    Args:
      x: a vector of each position.
      mask: False where a position is not there; "first" takes the first one all the same. The mean of a row that has
        none is 0, the last its first.
      kind: which.

    Raises:
      ValueError: rows without any position.
    """
    _check_positions(x)
    if kind == "first":
        return x[:, 0]
    if mask is None:
        return x[:, -1] if kind == "last" else jnp.mean(x, axis=1)
    if kind == "last":
        last = jnp.max(jnp.where(mask, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    there = mask[..., None]
    return jnp.sum(blank(mask, x), axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)


def attention_pool(
    x: Float[Array, "b l d"], query: Float[Array, "d"], mask: Bool[Array, "b l"] | None = None
) -> Float[Array, "b d"]:
    """The mean of every row's vectors, weighted by how they answer one query.

        y = sum_l w_l x_l        w = softmax over the positions that are there of (x . query)

    Scores, softmax and sum are at least float32. That of a row with no position there is 0, and one without places
    raises a ValueError.
    """
    _check_positions(x)
    wide = blank(mask, x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    scores = jnp.einsum("bld,d->bl", wide, query.astype(wide.dtype), precision="highest")
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bl,bld->bd", jax.nn.softmax(scores, axis=1), wide, precision="highest").astype(x.dtype)


def _check_positions(x):
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}, expected (b, l, d) with at least one position")


class AttentionPool(nnx.Module):
    """`attention_pool` by a learned query. It starts near 0, and so near the mean.

    Args:
      d_model: width of the vectors.
      param_dtype: dtype that the query is kept in.
      rngs: source of keys, stream "params".
    """

    def __init__(self, d_model: int, *, param_dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.query = nnx.Param(init(rngs.params(), (d_model,), param_dtype), axes=(None,))

    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b d"]:
        """One vector a row."""
        return attention_pool(x, self.query[...], mask)
