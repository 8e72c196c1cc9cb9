"""Gaps closed and opened again: the order of what is there, its segments, and what goes on from a state."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.numerics import normal
from zoo.stack.gaps import close_gaps

GAPS = np.array([[1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 1, 1, 0, 1], [0] * 8], bool)


def test_padding_at_the_ends_moves_nothing():
    ends = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    segments = np.array([[1, 1, 2, 2]] * 5)
    closed = close_gaps(jnp.asarray(ends), jnp.asarray(segments))
    np.testing.assert_array_equal(closed.source, np.tile(np.arange(4), (5, 1)))
    np.testing.assert_array_equal(closed.place, closed.source)
    np.testing.assert_array_equal(closed.mask, ends)
    np.testing.assert_array_equal(closed.segment_ids, segments - 1)


def test_what_is_there_stands_together_and_comes_back():
    closed = close_gaps(jnp.asarray(GAPS), None)
    np.testing.assert_array_equal(closed.mask[:2], [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]])
    assert closed.segment_ids is None
    x = normal(jax.random.key(0), 3, 8, 2)
    moved = closed.close(x)
    np.testing.assert_array_equal(moved[0, :4], x[0][GAPS[0]])
    np.testing.assert_array_equal(moved[1, 2:6], x[1][GAPS[1]])
    np.testing.assert_array_equal(closed.open(moved), x)


def test_the_gradient_comes_back_too():
    closed, x = close_gaps(jnp.asarray(GAPS), None), normal(jax.random.key(0), 3, 8, 2)
    weight = normal(jax.random.key(1), 3, 8, 2)
    gradient = jax.grad(lambda x: jnp.sum(closed.close(x) * weight))(x)
    np.testing.assert_array_equal(gradient, closed.open(weight))


def test_segments_stay_apart_and_the_row_ends_in_the_one_that_it_did():
    segments = jnp.asarray([[1, 1, 9, 1, 1, 2, 2, 9], [3, 3, 3, 3, 4, 4, 4, 4], [1] * 8])
    closed = close_gaps(jnp.asarray(GAPS), segments)
    # Row 0: places 0 1 | 3 | 6, of runs 0 0 | 2 | 3, and behind them what was absent, in the last place's run, 4.
    np.testing.assert_array_equal(closed.segment_ids[0], [0, 0, 2, 3, 4, 4, 4, 4])
    np.testing.assert_array_equal(closed.segment_ids[1], [0, 0, 0, 1, 1, 1, 1, 1])


def test_absence_at_the_start_is_a_gap_behind_a_state_but_where_it_ends_a_segment():
    mask = jnp.asarray([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    segments = jnp.asarray([[1, 1, 1, 1], [1, 1, 2, 2], [1, 2, 2, 2], [1, 1, 2, 2]])
    plain = close_gaps(mask, None, goes_on=True)
    np.testing.assert_array_equal(plain.mask, np.array([[1, 1, 0, 0]] * 3 + [[0] * 4], bool))
    np.testing.assert_array_equal(close_gaps(mask, None).mask, mask)
    closed = close_gaps(mask, segments, goes_on=True)
    np.testing.assert_array_equal(closed.mask[:3], np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]], bool))
    np.testing.assert_array_equal(closed.segment_ids[:3], [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(closed.segment_ids[3], [0, 0, 1, 1])
