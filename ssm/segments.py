"""Packed rows: several documents in one row, told apart by `segment_ids`.

A segment is a run of equal ids. Ids need not be sorted, nor differ between runs that do not touch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "b l"]) -> Bool[Array, "b l"]:
    """True at each position that opens a new segment. The first position goes on with what came before the row."""
    return jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0


def segment_runs(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Numbers the segments of each row 0, 1, 2, ... in order of position."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1)
