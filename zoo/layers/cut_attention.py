"""Softmax attention over rows whose positions are cut over devices (`ssm.sequence_cut`).

By heads, where the devices divide them: two all-to-alls turn a piece of the positions of all heads into all positions
of a piece of the heads, and back; heads of keys that several devices read are sent to each. Elsewhere each device keeps
its queries and gathers the keys and values of the whole row.

Letters besides those of the style guide: P devices along the axis.

Source: Jacobs et al. 2023, arXiv:2309.14509 (DeepSpeed-Ulysses, the all-to-alls).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ssm.sequence_cut import Along, Cut
from zoo.layers.seen import Positions

Attend = Callable[..., Float[Array, "b l h p"]]


def cut_attention(
    attend: Attend,
    cut: Cut,
    q: Float[Array, "b l h p"],
    k: Float[Array, "b s g p"],
    v: Float[Array, "b s g p"],
    q_at: Positions | None,
    k_at: Positions | None,
    slopes: Float[Array, "h"] | None,
) -> Float[Array, "b l h p"]:
    """attend(q, k, v, q_at, k_at, slopes=slopes) with the positions of q cut over devices.

    Args:
      attend: `softmax_attention` with its options.
      cut: how rows are cut.
      q, k, v, q_at, k_at, slopes: as there. Keys that are not the positions of the queries, as those of a cache, are on
        every device along the axis.
    """
    length, (heads, groups) = q.shape[1], (q.shape[2], k.shape[2])
    missing = -length % cut.size
    same = k.shape[1] == length
    if missing:
        if q_at is None or k_at is None:
            q_at = k_at = Positions(jnp.arange(length, dtype=jnp.int32)[None])
        q, q_at = _fill((q, q_at), missing)
        if same:
            k, v, k_at = _fill((k, v, k_at), missing)
    if same and heads % cut.size == 0:
        copies = math.lcm(groups, cut.size) // groups
        k, v = (jnp.repeat(m, copies, axis=2) for m in (k, v))
        y = _by_heads(attend, cut, q, k, v, q_at, k_at, slopes)
    else:
        y = _by_queries(attend, cut, q, k, v, q_at, k_at, slopes, same)
    return y[:, :length] if missing else y


def _by_heads(attend, cut, q, k, v, q_at, k_at, slopes):
    axis = cut.along.axis

    def local(q, k, v, q_at, k_at, slopes):
        q, k, v = (lax.all_to_all(m, axis, split_axis=2, concat_axis=1, tiled=True) for m in (q, k, v))
        y = attend(q, k, v, q_at, k_at, slopes=slopes)
        return lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)

    piece, heads = PartitionSpec(cut.rows, axis), PartitionSpec(axis)
    specs = piece, piece, piece, _of_rows(cut, q_at), _of_rows(cut, k_at), heads
    return cut.shard_map(local, specs, piece)(q, k, v, q_at, k_at, slopes)


def _by_queries(attend, cut, q, k, v, q_at, k_at, slopes, same):
    along: Along = cut.along

    def local(q, k, v, q_at, k_at, slopes):
        if same:
            k, v = (lax.all_gather(m, along.axis, axis=1, tiled=True) for m in (k, v))
        if q_at is None or k_at is None:
            index = jnp.arange(q.shape[1], dtype=jnp.int32)
            q_at = Positions(along.place().astype(jnp.int32) * q.shape[1] + index[None])
            k_at = Positions(jnp.arange(k.shape[1], dtype=jnp.int32)[None])
        return attend(q, k, v, q_at, k_at, slopes=slopes)

    piece = PartitionSpec(cut.rows, along.axis)
    keys = piece if same else PartitionSpec(cut.rows)
    specs = piece, keys, keys, _of_rows(cut, q_at, along.axis), _of_rows(cut, k_at), PartitionSpec()
    return cut.shard_map(local, specs, piece)(q, k, v, q_at, k_at, slopes)


def _of_rows(cut, at, axis=None):
    """How numbers of positions lie: one row of them may stand for all."""
    return jax.tree.map(lambda m: PartitionSpec(None if len(m) == 1 else cut.rows, axis), at)


def _fill(arrays, missing):
    """Arrays with absent positions at the end: their index is -1."""

    def fill(x):
        ends = ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, ends, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)

    return jax.tree.map(fill, arrays)
