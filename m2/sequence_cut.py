"""Rows whose positions are cut over devices: what the ambient mesh says of it, and what the devices tell each other.

Under `jax.set_mesh(mesh)`, with a mesh that has an axis "sequence" of more than one device, device i holds the
positions of a row from i l / P on, absent ones at the end where P does not divide l. A convolution of a few taps is
told the positions before its piece, its halo. A long one trades its piece of the positions of all channels for all
positions of a piece of the channels, and back. Without such a mesh, and for rows shorter than P, nothing changes.

Letters besides those of the style guide: P devices along the axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

AXIS, TENSOR = "sequence", "tensor"
# Axes that rows lie over.
ROWS = ("data", "fsdp", "expert")


class Cut(NamedTuple):
    """What the ambient mesh says of rows that an operation is called with."""

    axis: str
    size: int
    """Devices along the axis."""
    rows: tuple[str, ...]
    """Axes that the rows lie over."""
    tensor: int = 1
    """Devices that channels lie over besides."""

    @property
    def piece(self) -> PartitionSpec:
        """How arrays (b, l, ...) lie."""
        return PartitionSpec(self.rows, self.axis)

    @property
    def row(self) -> PartitionSpec:
        """How arrays (b, ...) lie that every device along the axis has."""
        return PartitionSpec(self.rows)

    def channels(self, d: int) -> tuple[str, ...]:
        """The axes that d channels lie over where each device has whole rows of some: those that "tensor" gave it."""
        return (TENSOR, self.axis) if self.tensor > 1 and d % (self.tensor * self.size) == 0 else (self.axis,)

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any, more: tuple[str, ...] = ()) -> Callable:
        """`jax.shard_map` over the axis, those of the rows, and more. Others are left to the compiler."""
        axes = {self.axis, *self.rows, *more}
        # `jax.jit`: outside of one, `shard_map` over some of the axes alone is an error.
        return jax.jit(
            jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
        )

    def fill(self, x: Any, axis: int = 1, mode: Any = "constant") -> Any:
        """x, or None, filled up at the end of an axis to a multiple of P."""
        if x is None or x.shape[axis] % self.size == 0:
            return x
        ends = [(0, -x.shape[i] % self.size if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, ends, mode=mode)


def _sizes():
    """The axes of the ambient mesh that are not those of a `shard_map` around, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return {name: size for (name, size), kind in kinds if kind != AxisType.Manual}


def is_cut() -> bool:
    """Whether the ambient mesh cuts rows."""
    return _sizes().get(AXIS, 1) > 1


def cut_of(x: Shaped[Array, "b l *e"]) -> Cut | None:
    """How the ambient mesh cuts rows such as x, or None where it does not."""
    (b, length), sizes = x.shape[:2], _sizes()
    if sizes.get(AXIS, 1) == 1 or not isinstance(length, int) or length < sizes[AXIS]:
        return None
    rows = tuple(name for name in ROWS if name in sizes)
    if not isinstance(b, int) or b % functools.reduce(lambda n, name: n * sizes[name], rows, 1):
        rows = ()
    return Cut(AXIS, sizes[AXIS], rows, sizes.get(TENSOR, 1))


def lay(x: Shaped[Array, "*e"], axis: int) -> Shaped[Array, "*e"]:
    """x, one of its axes laid over the devices where the ambient mesh cuts rows and the devices divide it."""
    size = _sizes().get(AXIS, 1)
    if size == 1 or x.shape[axis] % size:
        return x
    laid = (AXIS if i == axis else PartitionSpec.UNCONSTRAINED for i in range(x.ndim))
    return lax.with_sharding_constraint(x, PartitionSpec(*laid))


def lay_channels(x: Shaped[Array, "d *e"]) -> Shaped[Array, "d *e"]:
    """x with its channels on the devices that `by_channels` wants them on, where that divides them."""
    sizes = _sizes()
    over = Cut(AXIS, sizes.get(AXIS, 1), (), sizes.get(TENSOR, 1)).channels(x.shape[0])
    if sizes.get(AXIS, 1) == 1 or x.shape[0] % sizes[AXIS]:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(over, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)))


def by_channels(
    function: Callable[..., Array],
    cut: Cut,
    x: Shaped[Array, "b l d"],
    channels: Any = (),
    rows: Any = (),
    whole: Any = (),
) -> Shaped[Array, "b l d"]:
    """function(x, channels, rows, whole) of whole rows, a part of the channels on each device.

    Two all-to-alls, each of x's size / P a device.

    Args:
      function: works on each channel alone, and gives as many.
      cut: how rows are cut.
      x: one array of positions.
      channels: tree of arrays (d, ...) of which the function is given those of the device's channels.
      rows: tree of arrays (b, ...).
      whole: tree of arrays that every device is given.
    """
    _, length, d = x.shape

    def local(x, channels, rows, whole):
        x = lax.all_to_all(x, cut.axis, split_axis=2, concat_axis=1, tiled=True)[:, :length]
        y = cut.fill(function(x, channels, rows, whole))
        return lax.all_to_all(y, cut.axis, split_axis=1, concat_axis=2, tiled=True)

    over = cut.channels(d)
    channels = jax.tree.map(lambda m: cut.fill(m, 0), channels)
    piece = PartitionSpec(cut.rows, cut.axis, over[:-1] or None)
    specs = piece, PartitionSpec(over), cut.row, PartitionSpec()
    run = cut.shard_map(local, specs, piece, over[:-1])
    y = run(cut.fill(cut.fill(x), 2), channels, rows, whole)
    return y[:, :length, :d]


def each_piece(function: Callable[..., Array], cut: Cut, x: Shaped[Array, "b l d"], *whole: Any) -> Array:
    """function(x, *whole) of each device's positions alone: they see nothing of one another.

    Left to the compiler, a function that makes one axis of rows and positions would have them all gathered.
    """
    specs = cut.piece, *(PartitionSpec(),) * len(whole)
    return cut.shard_map(function, specs, cut.piece)(cut.fill(x), *whole)[:, : x.shape[1]]


def from_left(x: Any, axis: str) -> Any:
    """Inside `shard_map`: what the device to the left holds; zeros on the first."""
    n = lax.axis_size(axis)
    return jax.tree.map(lambda m: lax.ppermute(m, axis, [(i, i + 1) for i in range(n - 1)]), x)


def from_right(x: Any, axis: str) -> Any:
    """Inside `shard_map`: what the device to the right holds; zeros on the last."""
    n = lax.axis_size(axis)
    return jax.tree.map(lambda m: lax.ppermute(m, axis, [(i + 1, i) for i in range(n - 1)]), x)


def segment_starts(segment_ids: Int[Array, "b l"], axis: str) -> Bool[Array, "b l"]:
    """Inside `shard_map`: True where a run of equal ids begins. The row's first position begins none."""
    before = jnp.where(lax.axis_index(axis) == 0, segment_ids[:, :1], from_left(segment_ids[:, -1:], axis))
    return jnp.diff(segment_ids, axis=1, prepend=before) != 0


def inputs_before(
    x: Shaped[Array, "b l d"], before: Shaped[Array, "b t d"], segment_ids: Int[Array, "b l"] | None, axis: str
) -> Shaped[Array, "b t d"]:
    """Inside `shard_map`: the t positions before this piece, those of earlier segments blank."""
    history = before.shape[1]
    if history == 0:
        return before
    left = _positions_before(x, before, axis, history)
    if segment_ids is None:
        return left
    ids = jnp.flip(_positions_before(segment_ids, None, axis, history), 1)
    last = jnp.cumsum(jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)[:, ::-1] == 0
    return jnp.where(last[..., None], left, 0)


def _positions_before(x, before, axis, history):
    """`before`, or x's first position again, is what comes before the row."""
    length = x.shape[1]
    repeat = lambda first: jnp.broadcast_to(first, (x.shape[0], history, *x.shape[2:]))  # noqa: E731
    if history <= length:
        start = repeat(x[:, :1]) if before is None else before
        return jnp.where(lax.axis_index(axis) == 0, start, from_left(x[:, length - history :], axis))
    # Pieces so short that several lie in reach: the row is short, too.
    row = lax.all_gather(x, axis, axis=1, tiled=True)
    row = jnp.concatenate([repeat(row[:, :1]) if before is None else before, row], axis=1)
    return lax.dynamic_slice_in_dim(row, lax.axis_index(axis) * length, history, axis=1)
