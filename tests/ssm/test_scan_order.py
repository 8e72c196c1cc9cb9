"""Scan orders: each sequence reads every cell once, in the order that it is named after, and finds it again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
from ssm.scan_order import unscan_order
from tests.numerics import assert_close, normal

ORDERS = {"raster": 1, "bidirectional": 2, "cross": 4, "hilbert": 2}
GRIDS = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 4), (4, 5), (8, 8), (7, 6), (13, 29)]


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_sequence_reads_every_position_once_and_is_undone(kind, grid):
    order, length = ssm.scan_order(kind, grid), grid[0] * grid[1]
    assert order.shape == (ORDERS[kind], length)
    for there, back in zip(order, unscan_order(kind, grid), strict=True):
        np.testing.assert_array_equal(np.sort(there), np.arange(length))
        np.testing.assert_array_equal(there[back], np.arange(length))


def test_orders_of_two_rows_and_three_columns():
    assert ssm.scan_order("raster", (2, 3)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert ssm.scan_order("bidirectional", (2, 3)).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    by_column = [0, 3, 1, 4, 2, 5]
    rows = [0, 1, 2, 3, 4, 5]
    assert ssm.scan_order("cross", (2, 3)).tolist() == [rows, by_column, rows[::-1], by_column[::-1]]


def test_the_hilbert_curve_of_four_by_four_is_hilberts():
    quarter = [[0, 4, 5, 1], [2, 3, 7, 6], [10, 11, 15, 14], [13, 9, 8, 12]]
    ours = ssm.scan_order("hilbert", (4, 4))[0].reshape(4, 4)
    assert sorted(map(sorted, ours.tolist())) == sorted(map(sorted, quarter))  # a quarter of the image after the other
    assert {ours[0, 0], ours[-1, -1]} == {0, 3}  # from one corner to its neighbour


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbours_on_the_hilbert_curve_are_neighbours_in_the_image(grid):
    first, second = ssm.scan_order("hilbert", grid)
    np.testing.assert_array_equal(second, first[::-1])
    steps = np.abs(np.diff(np.stack(np.unravel_index(first, grid)), axis=1))
    assert steps.max(initial=0) <= 1
    diagonal = (steps.sum(axis=0) > 1).sum()
    longer, shorter = sorted(grid, reverse=True)
    assert diagonal == (1 if longer % 2 and not shorter % 2 and shorter > 2 else 0)


@pytest.mark.parametrize("kind", ORDERS)
def test_what_is_merged_is_what_was_scanned_once_for_each_order(kind, x64):
    x = normal(jax.random.key(0), 2, 15, 3)
    scanned = ssm.scan_image(x, kind, (3, 5))
    assert scanned.shape == (2, ORDERS[kind], 15, 3)
    assert_close(scanned[:, 0], jnp.take(x, ssm.scan_order(kind, (3, 5))[0], axis=1))
    assert_close(ssm.merge_scans(scanned, kind, (3, 5)), ORDERS[kind] * x)


def test_errors_name_the_argument(unchecked):
    with pytest.raises(
        ValueError, match="kind='zigzag', expected one of 'raster', 'bidirectional', 'cross', 'hilbert'"
    ):
        ssm.scan_order("zigzag", (2, 2))
    with pytest.raises(ValueError, match=r"grid=\(0, 3\), expected at least one row and one column"):
        ssm.scan_order("raster", (0, 3))
