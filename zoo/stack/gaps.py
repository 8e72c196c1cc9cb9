"""Gaps closed: rows whose absent positions lie between present ones, run as if these were next to each other.

A position that is not there is absent: what is there gets what it would get in a row without it. The ends of a row are
no trouble, but a convolution counts places, and would see a gap in the middle. So a backbone moves what is there
together, runs, and moves it back: two gathers for the whole stack, nothing where a row has padding at its ends alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssm import segment_runs
from ssm.absent import blank
from ssm.forward_mode import by_hand
from ssm.sequence_cut import by_channels, cut_of


class Closed(NamedTuple):
    """Rows with their gaps closed."""

    source: Int[Array, "b l"]
    """The place that each place of the closed row is filled from."""
    place: Int[Array, "b l"]
    """The place in the closed row that each place went to."""
    mask: Bool[Array, "b l"]
    """The mask of the closed rows."""
    segment_ids: Int[Array, "b l"] | None
    """Their segments."""

    def close(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Rows as they run."""
        return _moved(x, self.source, self.place)

    def open(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Closed rows as they were."""
        return _moved(x, self.place, self.source)


def close_gaps(mask: Bool[Array, "b l"], segment_ids: Int[Array, "b l"] | None, *, goes_on: bool = False) -> Closed:
    """Where positions go so that those that are there leave no gap: what lies between them goes behind the last.

    Args:
      mask: False where a position is not there.
      segment_ids: documents packed in a row, or None. An absent position still ends a run of equal ids.
      goes_on: whether the rows go on from a state: then what is absent before the first that is there is a gap, too,
        but where it ends the segment of the state.
    """
    runs = None if segment_ids is None else segment_runs(segment_ids)
    counted = jnp.cumsum(mask, axis=1)
    leading = counted == 0
    if goes_on:
        ends = counted[:, -1:] == 0  # nothing is there: the row stays as it is
        if runs is not None:
            ends |= runs != jnp.take_along_axis(runs, jnp.argmax(mask, axis=1)[:, None], axis=1)
        leading &= ends
    stays = mask | leading
    kept = jnp.cumsum(stays, axis=1)
    place = jnp.where(stays, kept - 1, kept[:, -1:] + jnp.cumsum(~stays, axis=1) - 1)
    source = jnp.argsort(~stays, axis=1, stable=True)
    if runs is not None:
        # A row ends in the segment of its last place, absent or not.
        runs = jnp.take_along_axis(jnp.where(stays, runs, runs[:, -1:]), source, axis=1)
    return Closed(source, place, jnp.take_along_axis(mask, source, axis=1), runs)


def _moved(x, source, back):
    """`_move`; where positions are cut over devices, whole rows of a part of the channels each, if there is a gap."""
    if (cut := cut_of(x)) is None:
        return by_hand(_move, "zoo.Backbone with a mask", "zoo.forward_mode()")(x, source, back)
    gaps = jnp.any(source != jnp.arange(source.shape[1]))
    return jax.lax.cond(gaps, lambda x: by_channels(_move, cut, x, source, back), lambda x: x, x)


@jax.custom_vjp
def _move(x, source, back):
    """Each place of a row from its source; `back` is the inverse. So the gradient is a gather as well, no scatter."""
    return jnp.take_along_axis(x, source[..., None], axis=1)


def _forward(x, source, back):
    return _move.__wrapped__(x, source, back), (source, back)


def _backward(places, dy):
    source, back = places
    return _move.__wrapped__(dy, back, source), None, None


_move.defvjp(_forward, _backward)


def close_all(x, mask, segment_ids, ahead, added, skippable, *, goes_on=False):
    """All that is said of rows as it runs, and what puts rows back: absent positions blank, and no gaps between.

    Args:
      x, mask, segment_ids, ahead, skippable: as in `Backbone`.
      added: from `groups_of`.
      goes_on: as in `close_gaps`.

    Raises:
      ValueError: positions that may be left out of other rows than x's.
    """
    if skippable is not None and skippable.positions.shape != x.shape[:2]:
        raise ValueError(f"skippable has shape {skippable.positions.shape}, expected that of rows, {x.shape[:2]}")
    if mask is None:
        return x, mask, segment_ids, ahead, added, skippable, lambda x: x
    closed = close_gaps(mask, segment_ids, goes_on=goes_on)
    if ahead is not None:
        ahead = jnp.take_along_axis(ahead, closed.source, axis=1)
    if added is not None:
        added = [closed.close(blank(mask, value)) for value in added]
    if skippable is not None:
        positions = jnp.take_along_axis(skippable.positions, closed.source, axis=1)
        skippable = dataclasses.replace(skippable, positions=positions)
    return closed.close(blank(mask, x)), closed.mask, closed.segment_ids, ahead, added, skippable, closed.open
