"""Packed rows: several documents in one row, told apart by `segment_ids`.

A segment is a run of equal ids. Ids need not be sorted, nor differ between runs that do not touch.

With `along`, arrays are one device's piece of the positions, and what comes before is the piece to the left.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from ssm.sequence_cut import Along, cut_of, entering_states, positions_before


def segment_starts(segment_ids: Int[Array, "b l"], along: Along | None = None) -> Bool[Array, "b l"]:
    """True at each position that opens a new segment. The first position goes on with what came before the row.

    Examples:
      >>> ssm.segment_starts(jnp.array([[7, 7, 3, 3, 7]])).astype(int).tolist()
      [[0, 0, 1, 0, 1]]
    """
    before = segment_ids[:, :1]
    if along is not None:
        before = jnp.where(along.place() == 0, before, along.from_left(segment_ids[:, -1:]))
    return jnp.diff(segment_ids, axis=1, prepend=before) != 0


def segment_runs(segment_ids: Int[Array, "b l"], along: Along | None = None) -> Int[Array, "b l"]:
    """Numbers the segments of each row, or piece, by position: 0 goes on with what came before, then 1, 2, ...

    Examples:
      >>> ssm.segment_runs(jnp.array([[7, 7, 3, 3, 7]])).tolist()
      [[0, 0, 1, 1, 2]]
    """
    return jnp.cumsum(segment_starts(segment_ids, along), axis=1)


def last_inputs(
    x: Shaped[Array, "b l *e"],
    before: Shaped[Array, "b t *e"],
    mask: Bool[Array, "b l"] | None,
    segment_ids: Int[Array, "b l"] | None,
    along: Along | None = None,
) -> Shaped[Array, "b t *e"]:
    """The last t positions of `before` and x together, oldest first, those of earlier segments blanked.

    They end at the last position that is there; where none is, they are `before`. With `along`, `before` is what comes
    before this piece (`inputs_before`).
    """
    if along is None and (cut := cut_of(x)) is not None:

        def of_row(x, before, mask, segment_ids, along):
            left = inputs_before(x, before, segment_ids, along)
            local = last_inputs(x, left, mask, segment_ids, along)
            return (), along.of_last(pass_on(local, along.at_first(before), mask, segment_ids, along)[1])

        positions = {"x": x, "mask": mask, "segment_ids": segment_ids}
        return cut.run(of_row, positions, {"before": before.astype(x.dtype)})[1]
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
    runs = segment_runs(segment_ids, along)
    rows = jnp.broadcast_to(rows, (x.shape[0], history))
    run = jnp.where(rows < 0, 0, jnp.take_along_axis(runs, jnp.maximum(rows, 0), axis=1))
    return jnp.where((run == runs[:, -1:]).reshape(*run.shape, *(1,) * (x.ndim - 2)), last, 0)


def inputs_before(
    x: Shaped[Array, "b l *e"],
    before: Shaped[Array, "b t *e"],
    segment_ids: Int[Array, "b l"] | None,
    along: Along,
) -> Shaped[Array, "b t *e"]:
    """The t positions before this piece, those of earlier segments blanked; those before the row are `before`."""
    history = before.shape[1]
    if history == 0:
        return before
    left = positions_before(x, before, along, history)
    if segment_ids is None:
        return left
    ids = positions_before(segment_ids, None, along, history)
    last = segment_runs(jnp.flip(ids, 1))[:, ::-1] == 0  # the segment that ends there
    return jnp.where(last.reshape(*last.shape, *(1,) * (x.ndim - 2)), left, 0)


def pass_on(
    last: Shaped[Array, "b t *e"],
    first: Shaped[Array, "b t *e"],
    mask: Bool[Array, "b l"] | None,
    segment_ids: Int[Array, "b l"] | None,
    along: Along,
) -> tuple[Shaped[Array, "b t *e"], Shaped[Array, "b t *e"]]:
    """`last_inputs` before this piece and behind it, which a piece without any position passes on as they come.

    Args:
      last: those of this piece, if any of its positions is there.
      first: before the row, in its first piece; zeros in the others.
      mask, segment_ids: of this piece.
    """
    if mask is None:
        return along.from_left(last) + first, last
    passes = ~jnp.any(mask, axis=1)
    if segment_ids is not None:
        passes &= segment_runs(segment_ids, along)[:, -1] == 0
    there = passes.reshape(-1, *(1,) * (last.ndim - 1))
    before = entering_states(along, passes.astype(last.dtype), jnp.where(there, 0, last), first)
    return before, jnp.where(there, before, last)
