"""In which orders a state space reads the cells of an image, and how what it wrote finds its cell again.

Axes: s sequences, one for each order; `grid` is (rows, columns), its cells counted row by row as `position`s.
"""

import functools
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ScanOrder = Literal["raster", "bidirectional", "cross", "hilbert"]


@functools.cache
def scan_order(kind: ScanOrder, grid: tuple[int, int]) -> Int[np.ndarray, "s l"]:
    """The position that each place of each sequence reads.

        raster         row by row                                                   1 sequence
        bidirectional  row by row, and back                                         2
        cross          row by row, column by column, and both back                  4
        hilbert        along a curve whose neighbours are neighbours in the image, and back   2

    Args:
      kind: which.
      grid: rows and columns, any; the Hilbert curve is the generalised one, which steps to one of the four neighbours
        each time, but for one diagonal step where the longer side is odd and the other even.

    Raises:
      ValueError: an unknown kind, or an empty grid.

    Examples:
      >>> ssm.scan_order("cross", (2, 3))[1].tolist()  # column by column
      [0, 3, 1, 4, 2, 5]

    Source: raster and bidirectional: Vim, arXiv:2401.09417; cross: VMamba, arXiv:2401.10166, figure 3; hilbert: among
      the scans of the survey arXiv:2408.01129.
    """
    if kind not in get_args(ScanOrder):
        raise ValueError(f"kind={kind!r}, expected one of {', '.join(map(repr, get_args(ScanOrder)))}")
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise ValueError(f"grid={grid}, expected at least one row and one column")
    positions = np.arange(rows * columns).reshape(rows, columns)
    if kind == "hilbert":
        first = np.array([positions[row, column] for row, column in _hilbert(rows, columns)])
        return np.stack([first, first[::-1]])
    first, second = positions.ravel(), positions.T.ravel()
    orders = {"raster": [first], "bidirectional": [first, first[::-1]]}
    return np.stack(orders.get(kind, [first, second, first[::-1], second[::-1]]))


@functools.cache
def unscan_order(kind: ScanOrder, grid: tuple[int, int]) -> Int[np.ndarray, "s l"]:
    """The place in each sequence that reads each position: the inverse of `scan_order`."""
    return np.argsort(scan_order(kind, grid), axis=1)


def scan_image(x: Float[Array, "b l d"], kind: ScanOrder, grid: tuple[int, int]) -> Float[Array, "b s l d"]:
    """An image, row by row, as one sequence for each order.

    Examples:
      >>> ssm.scan_image(jnp.arange(6.0).reshape(1, 6, 1), "bidirectional", (2, 3))[0, :, :, 0].astype(int).tolist()
      [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    """
    return jnp.take(x, scan_order(kind, grid), axis=1)


def merge_scans(y: Float[Array, "b s l d"], kind: ScanOrder, grid: tuple[int, int]) -> Float[Array, "b l d"]:
    """The sum of what all orders have to say of each position; of `scan_image(x)`, x as many times as there are.

    Examples:
      >>> x = jnp.arange(6.0).reshape(1, 6, 1)
      >>> y = ssm.merge_scans(ssm.scan_image(x, "cross", (2, 3)), "cross", (2, 3))
      >>> bool((y == 4 * x).all())
      True
    """
    there = unscan_order(kind, grid)
    return jnp.sum(jnp.take_along_axis(y, there[None, :, :, None], axis=2), axis=1)


def _hilbert(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cells along a generalised Hilbert curve: a side is halved until a strip is left, each part turned to connect.

    Source: the construction of J. Cervený's generalised curve for rectangles of any size ("gilbert"), described in
      words on its page.
    """
    along, across = ((0, columns), (rows, 0)) if columns >= rows else ((rows, 0), (0, columns))
    return _curve((0, 0), along, across)


def _curve(start, along, across):
    """The cells of a rectangle at `start`, from its first corner to the last one along: sides as (rows, columns)."""
    length, width = (abs(sum(vector)) for vector in (along, across))
    step, side = (tuple(int(np.sign(part)) for part in vector) for vector in (along, across))
    if width == 1 or length == 1:
        move, count = (step, length) if width == 1 else (side, width)
        return [(start[0] + i * move[0], start[1] + i * move[1]) for i in range(count)]

    def plus(*vectors):
        return tuple(sum(parts) for parts in zip(*vectors, strict=True))

    def half(vector, unit):
        n = abs(sum(vector)) // 2
        # An even half leaves no diagonal step, where the side is long enough for one.
        n += n % 2 if abs(sum(vector)) > 2 else 0
        return tuple(n * part for part in unit)

    def minus(vector):
        return tuple(-part for part in vector)

    if 2 * length > 3 * width:
        near = half(along, step) if length > 2 else tuple(length // 2 * part for part in step)
        return _curve(start, near, across) + _curve(plus(start, near), plus(along, minus(near)), across)
    near_side, near = half(across, side), tuple(length // 2 * part for part in step)
    rest_side = plus(across, minus(near_side))
    up = _curve(start, near_side, near)
    over = _curve(plus(start, near_side), along, rest_side)
    last = plus(start, along, minus(step), near_side, minus(side))
    down = _curve(last, minus(near_side), minus(plus(along, minus(near))))
    return up + over + down
