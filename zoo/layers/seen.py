"""Who sees whom in attention: it follows from two numbers of a position, its index and its segment.

The index counts the positions that are there, the segment the documents packed in a row. Every mask follows from them
(causal, window, padding, documents), and so does what a cache has to keep beside its keys. Nothing here is of size l s
unless asked for.

Axes: s keys.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ssm import segment_starts

ABSENT = jnp.iinfo(jnp.int32).max // 2
"""The index of a key that is not there, larger than any query's; half, so that differences of two fit."""
LOOKS_AHEAD, SEEN_AHEAD = 1, 2
"""What `ahead` says of a position: it also sees those of its segment that are SEEN_AHEAD, wherever they are."""


class Positions(NamedTuple):
    """What is known of each query or key.

    Examples:
      >>> zoo.Positions._fields[:2]
      ('indices', 'segments')
    """

    indices: Int[Array, "#b l"]
    """Its index among the positions that are there; -1 where there is no key."""
    segments: Int[Array, "#b l"] | None = None
    """The number of its segment, or None where all are of one."""
    ahead: Int[Array, "#b l"] | None = None
    """`LOOKS_AHEAD`, `SEEN_AHEAD` or 0, or None where nobody sees what lies behind it."""


class Pairs(NamedTuple):
    """The numbers of queries and keys; an absent key has the index `ABSENT`."""

    q_index: Int[Array, "*b l"]
    k_index: Int[Array, "*b s"]
    q_segment: Int[Array, "*b l"] | None = None
    k_segment: Int[Array, "*b s"] | None = None
    q_ahead: Int[Array, "*b l"] | None = None
    k_ahead: Int[Array, "*b s"] | None = None


def pairs(length: Any, q_at: Positions | None, k_at: Positions | None) -> Pairs:
    """The numbers of queries and keys; without any, both are the positions 0 to length - 1 (a number or a symbol)."""
    if q_at is None or k_at is None:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        return Pairs(index, index)
    there = jnp.where(k_at.indices < 0, ABSENT, k_at.indices)
    return Pairs(q_at.indices, there, q_at.segments, k_at.segments, q_at.ahead, k_at.ahead)


def distances(pairs: Pairs) -> Int[Array, "*b l s"]:
    """How many positions a key lies before its query."""
    return pairs.q_index[..., :, None] - pairs.k_index[..., None, :]


def seen(pairs: Pairs, *, causal: bool, window: int | None) -> Bool[Array, "*b l s"]:
    """Whether a query sees a key: there, of its segment, not behind it (`causal`), fewer than `window` away.

    Behind it too, where the query looks ahead and the key is seen ahead.
    """
    distance = distances(pairs)
    there = jnp.broadcast_to(pairs.k_index[..., None, :] != ABSENT, distance.shape)
    result = distance >= 0 if causal else there
    if pairs.q_ahead is not None and pairs.k_ahead is not None:
        looks, shown = pairs.q_ahead == LOOKS_AHEAD, pairs.k_ahead == SEEN_AHEAD
        result |= looks[..., :, None] & shown[..., None, :] & there
    if window is not None:
        result &= jnp.abs(distance) < window
    if pairs.q_segment is not None and pairs.k_segment is not None:
        result &= pairs.q_segment[..., :, None] == pairs.k_segment[..., None, :]
    return result


def number_positions(
    b: int,
    length: int,
    index: Int[Array, "b"],
    segment: Int[Array, "b"],
    mask: Bool[Array, "b l"] | None,
    segment_ids: Int[Array, "b l"] | None,
) -> tuple[Int[Array, "b l"], Int[Array, "b l"]]:
    """Index and segment of each position, counting on from the state's. Absent ones share a neighbour's index."""
    present = jnp.ones((b, length), jnp.int32) if mask is None else mask.astype(jnp.int32)
    index = index[:, None] + jnp.cumsum(present, axis=1) - 1
    segment = jnp.broadcast_to(segment[:, None], (b, length))
    if segment_ids is not None:
        segment = segment + jnp.cumsum(segment_starts(segment_ids), axis=1)
    return index.astype(jnp.int32), segment.astype(jnp.int32)


def where_present(index: Int[Array, "b l"], mask: Bool[Array, "b l"] | None) -> Int[Array, "b l"]:
    """The index, -1 where a position is not there."""
    return index if mask is None else jnp.where(mask, index, -1)
