"""How a command's devices stand: five axes, each of which cuts something of a model or its batches.

    python -m experiments.causal_lm mamba2-1.3b --mesh.fsdp 8                     # parameters cut over 8 devices
    python -m experiments.causal_lm mamba2-1.3b --mesh.data 4 --mesh.sequence 2   # rows over 4, their positions over 2

    data        rows of a batch; parameters are on every device
    fsdp        rows too, and parameters, gradients and the optimiser's state, which are gathered where they are used
    sequence    positions of each row
    tensor      heads, inner channels, blocks and the vocabulary
    expert      rows too, and the experts of mixtures

A mesh always has all five, of size 1 where nothing is cut. Whatever runs a model does so inside `on_mesh`: models,
their layers and operations learn of it from JAX, `jax.sharding.get_abstract_mesh()`. Its axes are `AxisType.Auto`:
what is cut is said at a few places, and the compiler does the rest.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.loop.flags import UsageError

Fit = TypeVar("Fit", bound=Callable[..., Any])
AXES = ("data", "fsdp", "sequence", "tensor", "expert")
ROWS = ("data", "fsdp", "expert")
"""The axes that the rows of a batch lie over."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. Their product is the number of devices; -1, at one axis, is what the others leave."""

    data: int = -1
    """Groups of devices with rows of their own and all parameters."""
    fsdp: int = 1
    """Devices with rows of their own, that parameters and the optimiser's state are cut over."""
    sequence: int = 1
    """Devices that the positions of a row are cut over."""
    tensor: int = 1
    """Devices that heads, inner channels and the vocabulary are cut over."""
    expert: int = 1
    """Devices with rows of their own, that the experts of mixtures are cut over."""

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise ValueError(f"--mesh.{name} {size}, expected at least 1, or -1 for what the others leave")
        if len(rest := [name for name, size in dataclasses.asdict(self).items() if size == -1]) > 1:
            raise ValueError(f"--mesh.{rest[0]} -1 and --mesh.{rest[1]} -1, expected -1 at one axis only")


@functools.cache
def make_mesh(config: MeshConfig = MeshConfig(), devices: tuple[Any, ...] | None = None) -> Mesh:
    """Devices along the five axes: all there are, of all processes, or others that a program is compiled for.

    Raises:
      UsageError: there are fewer or more devices than the axes take.
    """
    sizes, count = dataclasses.asdict(config), len(devices or jax.devices())
    known = math.prod(size for size in sizes.values() if size != -1)
    if (-1 not in sizes.values() and known != count) or count % known:
        said = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items() if size != 1)
        expected = f"a divisor of {count}" if -1 in sizes.values() else count
        raise UsageError(f"{said or 'every axis 1'}: {known} devices, expected {expected}, the devices there are")
    shape = [count // known if size == -1 else size for size in sizes.values()]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def on_mesh(config: MeshConfig = MeshConfig()) -> Iterator[Mesh]:
    """Runs what is inside on a mesh."""
    with jax.set_mesh(mesh := make_mesh(config)):
        yield mesh


def meshed(fit: Fit) -> Fit:
    """Makes a function run on the mesh that its argument `config` says."""
    signature = inspect.signature(fit)

    @functools.wraps(fit)
    def with_mesh(*args: Any, **options: Any) -> Any:
        with on_mesh(signature.bind(*args, **options).arguments["config"].mesh):
            return fit(*args, **options)

    return cast(Fit, with_mesh)


def current_mesh() -> Mesh:
    """The mesh that this runs on; outside of one, all devices along "data"."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh


def row_groups(mesh: Mesh) -> int:
    """Among how many groups of devices the rows of a batch are shared out."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises a UsageError where the rows of a batch cannot be shared out evenly."""
    if batch_size % (row_groups(mesh) * accumulate):
        flags = " x ".join([*(f"--mesh.{axis}" for axis in ROWS), "--train.accumulate"])
        sizes = " x ".join(map(str, (*(mesh.shape[axis] for axis in ROWS), accumulate)))
        raise UsageError(f"--train.batch-size {batch_size}, expected a multiple of {flags}, {sizes}")


def check_length(mesh: Mesh, length: int, flag: str = "--data.seq-len") -> None:
    """Raises a UsageError where the positions of rows of this length cannot be shared out evenly."""
    if length % (pieces := mesh.shape["sequence"]):
        raise UsageError(f"{flag} {length}, expected a multiple of --mesh.sequence {pieces}")


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Cut along the first axis, the rows."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def placed(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the mesh's devices: those that are elsewhere go to each of them, whole."""
    devices = frozenset(mesh.devices.flat)
    return jax.tree.map(lambda x: x if x.sharding.device_set == devices else jax.device_put(x, everywhere(mesh)), tree)


def sharding_of_batch(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of a batch goes: rows over (data, fsdp, expert), and positions, of tokens say, over sequence.

    What the devices do not divide is on all of them: rows of a prediction, say; training checks its own, `check_rows`.
    """
    rows = ROWS if shape[0] % row_groups(mesh) == 0 else None
    positions = "sequence" if len(shape) == 2 and shape[1] % mesh.shape["sequence"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(rows, positions) if positions else PartitionSpec(rows))


def gathered(tree: Any) -> Any:
    """Arrays as NumPy's, whole in every process, wherever they lie. All processes must ask."""
    if jax.process_count() > 1:
        cut = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)  # noqa: E731
        tree = jax.tree.map(lambda x: _whole(everywhere(x.sharding.mesh))(x) if cut(x) else x, tree)
    return jax.device_get(tree)


@functools.cache
def _whole(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def own_rows(mesh: Mesh, shard: tuple[int, int] | None = None) -> Callable[[int], np.ndarray]:
    """Which rows of a batch this process makes: those that its devices hold; others may hold the same.

    Args:
      mesh: of the batch.
      shard: (index, count): the block of this index, of so many of equal size, whatever the devices hold.

    Returns:
      own(n): of a batch of n rows, the numbers of them, rising.
    """

    @functools.cache
    def own(n: int) -> np.ndarray:
        if shard is not None:
            index, count = shard
            if n % count:
                raise ValueError(f"batch_size={n}, expected a multiple of the number of hosts, {count}")
            return np.arange(n // count * index, n // count * (index + 1))
        if jax.process_count() == 1:
            return np.arange(n)
        blocks = by_rows(mesh).addressable_devices_indices_map((n,)).values()
        return np.unique(np.concatenate([np.arange(n)[block] for block in blocks]))

    return own


def spread(batch: Any, mesh: Mesh) -> Any:
    """Puts the rows that this process makes, see `own_rows`, on its devices: its part of a batch of all processes."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), sharding_of_batch(mesh, np.shape(x))), batch)
    groups = row_groups(mesh)
    mine, own = len(own_rows(mesh)(groups)), own_rows(mesh)

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape = (len(x) * groups // mine, *x.shape[1:])
        rows = own(shape[0])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(rows, start))
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding_of_batch(mesh, shape), part)

    return jax.tree.map(place, batch)


def spread_whole(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the devices of which every process has all rows."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding_of_batch(mesh, x.shape), lambda index: x[index])

    return jax.tree.map(place, batch)
