"""Rows whose positions are cut over devices: what the ambient mesh says of it, and what the devices tell each other.

Under `jax.set_mesh(mesh)`, with a mesh that has an axis "sequence" of more than one device, the operations of this
package run on pieces of a row: device i holds the positions from i l / P on, and is told what comes before them. Where
the number of positions is no multiple of P, absent positions fill up the end. Without such a mesh, and for rows shorter
than P (a token in generation), nothing changes.

An operation that is given `along=ssm.Along("sequence")` is inside a `jax.shard_map` already: its arrays are the piece
of this device.

    with jax.set_mesh(mesh):
        y, state = jax.jit(ssm.ssd)(x, dt, A, B, C)

Letters besides those of the style guide: P devices along the axis.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

AXIS = "sequence"
# Axes that rows lie over.
ROWS = ("data", "fsdp", "expert")


class Along(NamedTuple):
    """The mesh axis that the pieces of a row lie along, inside `jax.shard_map`.

    Examples:
      >>> along = ssm.Along("sequence")  # ssm.ssd(x, dt, A, B, C, along=along) inside jax.shard_map
      >>> along.axis
      'sequence'
    """

    axis: str
    mirrored: bool = False
    """Whether the row begins on the last device: that of what reads backwards."""

    @property
    def size(self) -> int:
        """How many pieces there are."""
        return lax.axis_size(self.axis)

    def place(self) -> Array:
        """Which piece of the row this device holds, from 0 on."""
        index = lax.axis_index(self.axis)
        return self.size - 1 - index if self.mirrored else index

    def mirror(self) -> "Along":
        """The same pieces, from last to first."""
        return self._replace(mirrored=not self.mirrored)

    def from_left(self, x: Any, by: int = 1) -> Any:
        """What the piece `by` places to the left holds; zeros in the first ones."""
        n = self.size
        pairs = [(n - 1 - i, n - 1 - i - by) if self.mirrored else (i, i + by) for i in range(n - by)]
        return jax.tree.map(lambda v: lax.ppermute(v, self.axis, pairs), x)

    def at_first(self, x: Any) -> Any:
        """x in the first piece, zeros in the others: what enters the row."""
        return jax.tree.map(lambda v: jnp.where(self.place() == 0, v, jnp.zeros_like(v)), x)

    def of_last(self, x: Any) -> Any:
        """x of the last piece, on every device: what leaves the row."""
        last = self.place() == self.size - 1
        return jax.tree.map(lambda v: lax.psum(jnp.where(last, v, jnp.zeros_like(v)), self.axis), x)


def entering_states(
    along: Along, decay: Float[Array, "*s"], added: Float[Array, "*t"], given: Float[Array, "*t"]
) -> Float[Array, "*t"]:
    """The state that enters each piece of a linear recurrence, by log2(P) exchanges of one state.

        in_i = out_(i-1) + given_i        out_i = decay_i in_i + added_i

    Args:
      along: the pieces.
      decay: what is left of a state behind the piece. Its axes are the first ones of a state.
      added: what the piece adds to it.
      given: what is added to the state that enters the piece: the initial state in the first, 0 in the others.

    Source: Hillis & Steele 1986, Data parallel algorithms (the prefix sum in log2(P) steps).
    """
    decay = decay.reshape(decay.shape + (1,) * (added.ndim - decay.ndim))
    leaving, by = added + decay * given, 1
    while by < along.size:
        further, left = along.from_left((decay, leaving), by)  # zeros where nothing is that far left
        leaving, decay, by = decay * left + leaving, decay * further, 2 * by
    return along.from_left(leaving) + given


def positions_before(
    x: Shaped[Array, "b l *e"], before: Shaped[Array, "b t *e"] | None, along: Along, history: int
) -> Shaped[Array, "b t *e"]:
    """The t = `history` positions before this piece; those before the row are `before`, or its first one again."""
    length = x.shape[1]
    if history <= length:
        if before is None:
            before = jnp.broadcast_to(x[:, :1], (x.shape[0], history, *x.shape[2:]))
        return jnp.where(along.place() == 0, before, along.from_left(x[:, length - history :]))
    # Pieces so short that several lie in reach: the row is short, too.
    row = lax.all_gather(x, along.axis, axis=1, tiled=True)
    if along.mirrored:
        row = jnp.concatenate(jnp.split(row, along.size, axis=1)[::-1], axis=1)
    if before is None:
        before = jnp.broadcast_to(row[:, :1], (x.shape[0], history, *x.shape[2:]))
    row = jnp.concatenate([before, row], axis=1)
    return lax.dynamic_slice_in_dim(row, along.place() * length, history, axis=1)


class Cut(NamedTuple):
    """What the ambient mesh says of rows that an operation is called with."""

    along: Along
    size: int
    """Devices along the axis."""
    rows: tuple[str, ...]
    """Axes that the rows lie over."""

    def run(
        self,
        operation: Callable[..., Any],
        positions: dict[str, Any],
        rows: dict[str, Any] | None = None,
        whole: dict[str, Any] | None = None,
    ) -> Any:
        """`operation(**positions, **rows, **whole, along=...)` on pieces: (y, state), y one of the positions.

        Args:
          operation: gives a y (b, l, ...) and a state (b, ...), or trees of them.
          positions: arrays (b, l, ...) or None, a "mask" among them.
          rows: arrays (b, ...) or None.
          whole: arrays that every device has, or None.
        """
        length = next(x.shape[1] for x in positions.values() if x is not None)
        missing = -length % self.size
        if missing:
            if positions["mask"] is None:
                b = next(x.shape[0] for x in positions.values() if x is not None)
                positions = positions | {"mask": jnp.ones((b, length), bool)}
            positions = {name: _fill(name, x, missing) for name, x in positions.items()}

        def local(positions, rows, whole):
            return operation(**positions, **rows, **whole, along=self.along)

        by_position, by_row = PartitionSpec(self.rows, self.along.axis), PartitionSpec(self.rows)
        y, state = self.shard_map(local, (by_position, by_row, PartitionSpec()), (by_position, by_row))(
            positions, rows or {}, whole or {}
        )
        return (jax.tree.map(lambda m: m[:, :length], y) if missing else y), state

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`jax.shard_map` over the axis and those of the rows. Others, as of tensors, are left to the compiler."""
        axes = {self.along.axis, *self.rows}
        # `jax.jit`: outside of one, `shard_map` over some of the axes alone is an error.
        return jax.jit(
            jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
        )


def _fill(name, x, missing):
    """An array of positions with absent ones at its end, which belong to the last segment."""
    if x is None:
        return None
    ends = ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, ends, mode="edge" if name == "segment_ids" else "constant")


_cut_off = contextvars.ContextVar("_cut_off", default=False)
_mirrored = contextvars.ContextVar("_mirrored", default=False)


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
    if _cut_off.get() or sizes.get(AXIS, 1) == 1 or not isinstance(length, int) or length < sizes[AXIS]:
        return None
    rows = tuple(name for name in ROWS if name in sizes)
    if not isinstance(b, int) or b % functools.reduce(lambda n, name: n * sizes[name], rows, 1):
        rows = ()
    return Cut(Along(AXIS, _mirrored.get()), sizes[AXIS], rows)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, rows are not cut: for what is laid out over the devices in another way, and left to the compiler."""
    token = _cut_off.set(True)
    try:
        yield
    finally:
        _cut_off.reset(token)


@contextlib.contextmanager
def mirrored() -> Iterator[None]:
    """Inside, rows begin on the last device. See `flip_pieces`."""
    token = _mirrored.set(not _mirrored.get())
    try:
        yield
    finally:
        _mirrored.reset(token)


def lay(x: Shaped[Array, "*e"], axis: int) -> Shaped[Array, "*e"]:
    """x, one of its axes laid over the devices where the ambient mesh cuts rows and the devices divide it."""
    size = _sizes().get(AXIS, 1)
    if size == 1 or x.shape[axis] % size:
        return x
    laid = (AXIS if i == axis else PartitionSpec.UNCONSTRAINED for i in range(x.ndim))
    return lax.with_sharding_constraint(x, PartitionSpec(*laid))


def lay_whole(x: Shaped[Array, "b *e"]) -> Shaped[Array, "b *e"]:
    """x, whole rows of it on every device along the axis where the ambient mesh cuts rows."""
    if not is_cut():
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(PartitionSpec.UNCONSTRAINED, *[None] * (x.ndim - 1)))


def flip_pieces(x: Shaped[Array, "b l *e"], cut: Cut) -> Shaped[Array, "b l *e"]:
    """Each piece from its last position to its first, where it is: in `mirrored`, that is the row flipped."""
    spec = PartitionSpec(cut.rows, cut.along.axis)
    return cut.shard_map(lambda m: jnp.flip(m, 1), (spec,), spec)(x)


def each_piece(function: Callable[..., Any], cut: Cut, x: Shaped[Array, "b l *e"], *whole: Any) -> Any:
    """function(x, *whole) of each device's positions alone: they see nothing of one another.

    Left to the compiler, a function that makes one axis of rows and positions would have them all gathered.
    """
    piece, length = PartitionSpec(cut.rows, cut.along.axis), x.shape[1]
    y = cut.shard_map(function, (piece, *(PartitionSpec(),) * len(whole)), piece)(
        _fill("", x, -length % cut.size), *whole
    )
    return jax.tree.map(lambda m: m[:, :length], y)


def by_channels(
    function: Callable[..., Array], cut: Cut, x: Shaped[Array, "b l d"], *rows: Any
) -> Shaped[Array, "b l d"]:
    """function(x, *rows) of whole rows, a part of the channels on each device, by two all-to-alls of x's size / P.

    Args:
      function: works on each channel alone, and gives as many.
      cut: how rows are cut.
      x: one array of positions.
      rows: trees of arrays (b, ...) that every device along the axis has.
    """
    (_, length, d), axis = x.shape, cut.along.axis
    missing = -length % cut.size, -d % cut.size
    padded = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1])))

    def local(x, *rows):
        x = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)[:, :length]
        y = jnp.pad(function(x, *rows), ((0, 0), (0, missing[0]), (0, 0)))
        return lax.all_to_all(y, axis, split_axis=1, concat_axis=2, tiled=True)

    by_position, by_row = PartitionSpec(cut.rows, axis), PartitionSpec(cut.rows)
    y = cut.shard_map(local, (by_position, *(by_row,) * len(rows)), by_position)(padded, *rows)
    return y[:, :length, :d]
