"""Operations whose rows, and whose channels or heads, have nothing to do with each other: each device runs its own.

Left to the compiler, an operation that loops over rows or heads, or that a kernel computes, would have all of them
gathered on every device. So under `jax.set_mesh` it runs inside `jax.shard_map` over the axes of rows, which
rows lie over, and "tensor", which channels lie over, where these divide them. Without a mesh nothing changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

ROWS, CHANNELS = ("data", "fsdp", "expert"), "tensor"


def apart(function: Callable[..., Any], arrays: Sequence[Any], axes: Sequence[str], out: Any, channels: str) -> Any:
    """function(*arrays), each device with its own rows and channels.

    Args:
      function: gives one array, or a tree of them.
      arrays: what it takes: arrays, None, or tuples of these.
      axes: the axes of each in letters, "b l d", of which "b" are rows. One of size 1 stands for all rows.
      out: the axes of what it gives, in the structure of that.
      channels: the letter of channels or heads, "d" or "h".
    """
    sizes = _sizes()
    if not sizes:
        return function(*arrays)
    widths = _widths(arrays, axes)
    over: dict[str, Any] = {}
    rows = tuple(axis for axis in ROWS if axis in sizes)
    if rows and widths["b"] % math.prod(sizes[axis] for axis in rows) == 0:
        over["b"] = rows
    if CHANNELS in sizes and widths[channels] % sizes[CHANNELS] == 0:
        over[channels] = CHANNELS
    if not over:
        return function(*arrays)

    def spec(letters, shape=None):
        cut = [None if shape is not None and shape[i] == 1 else over.get(c) for i, c in enumerate(letters.split())]
        return PartitionSpec(*cut)

    given = tuple(
        jax.tree.map(lambda x, letters=letters: spec(letters, x.shape), array)
        for array, letters in zip(arrays, axes, strict=True)
    )
    run = jax.shard_map(
        function,
        in_specs=given,
        out_specs=jax.tree.map(spec, out),
        axis_names={*sizes},
        check_vma=False,
    )
    return jax.jit(run)(*arrays)  # outside of a jit, `shard_map` over some of the axes alone is an error


def _widths(arrays: Sequence[Any], axes: Sequence[str]) -> dict[str, Any]:
    """How wide each axis is, by its letter."""
    widths: dict[str, Any] = {}
    for array, letters in zip(arrays, axes, strict=True):
        for x in jax.tree.leaves(array):
            for letter, width in zip(letters.split(), x.shape, strict=True):
                widths[letter] = max(width, widths.get(letter, 0))
    return widths


def _sizes() -> dict[str, int]:
    """The axes of the ambient mesh with more than one device, but for those of a `shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return {name: size for (name, size), kind in kinds if size > 1 and kind == AxisType.Auto}
