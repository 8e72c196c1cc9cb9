"""Packed rows: several documents in one row, told apart by `segment_ids`.

A segment is a run of equal ids. Ids need not be sorted, nor differ between runs that do not touch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def segment_starts(segment_ids: Int[Array, "b l"]) -> Bool[Array, "b l"]:
    """True at each position that opens a new segment. The first position goes on with what came before the row."""
    return jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0


def segment_runs(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Numbers the segments of each row 0, 1, 2, ... in order of position."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1)


def last_inputs(
    x: Shaped[Array, "b l *e"],
    before: Shaped[Array, "b t *e"],
    mask: Bool[Array, "b l"] | None,
    segment_ids: Int[Array, "b l"] | None,
) -> Shaped[Array, "b t *e"]:
    """The last t positions of `before` and x together, oldest first, those of earlier segments blanked.

    They end at the last position that is there; where none is, they are `before`.
    """
    history, length = before.shape[1], x.shape[1]
    if history == 0:
        return before
    before = before.astype(x.dtype)
    if mask is None:
        rows = length + jnp.arange(-history, 0)[None]
        last = jnp.concatenate([before, x], axis=1)[:, length:]
    else:
        end = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), axis=1, initial=0)
        rows = end[:, None] + jnp.arange(-history, 0)  # b t, negative in `before`
        old, new = jnp.minimum(rows + history, history - 1), jnp.maximum(rows, 0)
        tail = (1,) * (x.ndim - 2)
        last = jnp.take_along_axis(before, old.reshape(*old.shape, *tail), axis=1)
        if length > 0:
            new_rows = jnp.take_along_axis(x, new.reshape(*new.shape, *tail), axis=1)
            last = jnp.where((rows >= 0).reshape(*rows.shape, *tail), new_rows, last)
    if segment_ids is None or length == 0:
        return last
    runs = segment_runs(segment_ids)
    rows = jnp.broadcast_to(rows, (x.shape[0], history))
    run = jnp.where(rows < 0, 0, jnp.take_along_axis(runs, jnp.maximum(rows, 0), axis=1))
    return jnp.where((run == runs[:, -1:]).reshape(*run.shape, *(1,) * (x.ndim - 2)), last, 0)
