"""Arrays as one process holds them: pieces in its own memory, cut as they are over its devices.

A state that no process has whole is saved, restored and stacked in this form. Each piece is in one process only, that
of the first device that holds it, so that the pieces of all processes together are the array, each once.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import distributed

Bounds = tuple[tuple[int, int], ...]
"""Where a piece begins and ends along each axis."""


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys, or describes one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    """What JAX says as slices."""
    return tuple((s.start or 0, n if s.stop is None else s.stop) for s, n in zip(index, shape, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class HostArray:
    """Pieces of an array."""

    shape: tuple[int, ...]
    """Of the whole array."""
    dtype: Any
    pieces: Mapping[Bounds, np.ndarray | None]
    """None: of one that is asked for."""
    piece_shape: tuple[int, ...]
    """Of every piece of the array, in whatever process."""

    def layers(self) -> list["HostArray"]:
        """Those that this one is a stack of."""
        return [
            HostArray(
                self.shape[1:],
                self.dtype,
                {
                    rest: None if piece is None else piece[i - start]
                    for ((start, stop), *others), piece in self.pieces.items()
                    for rest in [tuple(others)]
                    if start <= i < stop
                },
                self.piece_shape[1:],
            )
            for i in range(self.shape[0])
        ]

    def filled(self, pieces: Mapping[Bounds, np.ndarray]) -> "HostArray":
        """The array with the pieces that it asks for."""
        return dataclasses.replace(self, pieces=dict(pieces))

    def __getitem__(self, bounds: Bounds) -> np.ndarray:
        piece = self.pieces[bounds]
        assert piece is not None
        return piece


class Stack(HostArray):
    """Arrays of equal shapes along a new first axis."""

    def __init__(self, layers: Sequence[HostArray]):
        object.__setattr__(self, "_layers", layers)
        shape = (len(layers), *layers[0].shape)
        super().__init__(shape, layers[0].dtype, {}, (len(layers), *layers[0].piece_shape))

    def __getitem__(self, bounds: Bounds) -> np.ndarray:
        (start, stop), *rest = bounds
        layers: Sequence[HostArray] = self._layers  # type: ignore[attr-defined]
        return np.stack([layer[tuple(rest)] for layer in layers[start:stop]])


def to_host(tree: Any) -> Any:
    """Copies what this process writes of the arrays of a tree into its memory; returns when that is done.

    The copies stay as they are when the memory of the arrays is given away. Keys, and what is copied already, are left.
    """
    for leaf in jax.tree.leaves(tree):
        for shard in _own_shards(leaf):
            shard.data.copy_to_host_async()
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) or isinstance(leaf, HostArray) else _on_host(leaf), tree)


def wanted(tree: Any) -> Any:
    """The pieces that the devices of this process need of a tree's arrays. Keys are left."""
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else wanted_of(leaf), tree)


def wanted_of(leaf: Any) -> HostArray:
    """The pieces that this process needs of an array; of keys, their numbers."""
    sharding, shape, dtype = leaf.sharding, leaf.shape, leaf.dtype
    if is_key(leaf):  # their numbers are one axis more, which is never cut
        numbers = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = numbers.shape, numbers.dtype
    indices = sharding.addressable_devices_indices_map(shape).values()
    pieces = dict.fromkeys(bounds_of(index, shape) for index in indices)
    return HostArray(shape, dtype, pieces, sharding.shard_shape(shape))


def to_devices(tree: Any, like: Any) -> Any:
    """The inverse: arrays whose types and shardings are those of another tree, of arrays or `jax.ShapeDtypeStruct`s.

    Args:
      tree: of `HostArray`s with the pieces that `wanted(like)` asks for.
    """
    return jax.tree.map(lambda one, found: found if is_key(found) else _on_devices(one, found), like, tree)


def _own_shards(leaf: Any) -> Iterator[Any]:
    if isinstance(leaf, jax.Array) and not is_key(leaf):
        yield from (shard for shard in leaf.addressable_shards if shard.replica_id == 0)


def _on_host(leaf: Any) -> HostArray:
    if not isinstance(leaf, jax.Array):
        array = np.array(leaf)
        whole = tuple((0, n) for n in array.shape)
        return HostArray(array.shape, array.dtype, {whole: array} if distributed.is_first() else {}, array.shape)
    pieces = {}
    for shard in _own_shards(leaf):
        piece = np.asarray(shard.data)
        # A CPU's is the array's own memory, in which the next step writes.
        pieces[bounds_of(shard.index, leaf.shape)] = piece.copy() if piece.base is not None else piece
    return HostArray(leaf.shape, leaf.dtype, pieces, leaf.sharding.shard_shape(leaf.shape))


def _on_devices(like: Any, array: HostArray) -> jax.Array:
    def place(index: Any) -> np.ndarray:
        return array[bounds_of(index, array.shape)]

    placed = jax.make_array_from_callback(array.shape, like.sharding, place)
    if not is_key(like):
        return placed
    implementation = jax.random.key_impl(jnp.empty((0,), like.dtype))
    wrap = functools.partial(jax.random.wrap_key_data, impl=implementation)
    return jax.jit(wrap, out_shardings=like.sharding)(placed)
