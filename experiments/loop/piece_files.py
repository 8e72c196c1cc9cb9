"""Pieces of arrays in orbax's files: each process writes its own, and reads those that its devices need.

    state/ocdbt.process_0/    what process 0 has written, in tensorstore's format (OCDBT, zarr)
    state/ocdbt.process_1/    what process 1 has
    state/manifest.ocdbt      all of it as one, by reference; with _METADATA it is a checkpoint that orbax reads

orbax's own arrays are JAX's, on devices. Here they are pieces on the host, since a stack of layers becomes an array
for each of them there, where it costs no memory of a device. orbax makes one checkpoint of what all have written.
"""

import asyncio
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.loop import distributed
from experiments.loop.host_arrays import Bounds, HostArray
from zoo.published.checkpoint_files import quiet_orbax

Finish = Callable[[], None]

# Bytes that are read at once at most, where a device needs a part of a piece.
_CHUNK = 1 << 25


def write_pieces(path: Path, arrays: Mapping[str, HostArray]) -> Finish:
    """Writes the pieces that this process has; returns when they are on disk.

    Args:
      path: a folder that is there and empty, but for what other processes write.

    Returns:
      for process 0 to call when all have written: makes one checkpoint of it, and raises an OSError where a part of an
      array is not there.

    Raises:
      OSError: disk full and the like.
    """
    import orbax.checkpoint as ocp  # 0.2 s to 0.4 s, which `--help` should not wait for
    from etils import epath

    present = {name: array for name, array in arrays.items() if math.prod(array.shape)}  # orbax refuses empty ones
    types = ocp.type_handlers.create_type_handler_registry((HostArray, _type_handler(ocp)))
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={distributed.index()}, barrier_sync_key_prefix=f"p{distributed.index()}"
    )
    with quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types, multiprocessing_options=alone)

    def finish() -> None:
        with _os_errors(path):
            handler.finalize(epath.Path(path))
            if missing := missing_parts(path, present):
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise OSError(f"not written: {', '.join(missing[:3])}{more}")

    with _os_errors(path):
        handler.save(epath.Path(path), args=ocp.args.PyTreeSave(present))
    return finish


def read_pieces(path: Path, asked: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The pieces that are asked for, in the types that are.

    Raises:
      ValueError: a part of them is not there.
    """
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    async def read(name: str, array: HostArray) -> HostArray:
        if not math.prod(array.shape):
            return array.filled({bounds: np.empty(_sizes(bounds), array.dtype) for bounds in array.pieces})
        store = await ts.open(_spec(path, name) | {"open": True}, context=context)
        parts = [store[tuple(slice(*ends) for ends in bounds)] if bounds else store for bounds in array.pieces]
        pieces = await asyncio.gather(*(part.read() for part in parts))
        return array.filled(
            {
                bounds: np.asarray(piece).astype(array.dtype, copy=False)
                for bounds, piece in zip(array.pieces, pieces, strict=True)
            }
        )

    async def read_all() -> list[HostArray]:
        return await asyncio.gather(*(read(name, array) for name, array in asked.items()))

    return dict(zip(asked, asyncio.run(read_all()), strict=True))


def missing_parts(path: Path, arrays: Mapping[str, HostArray]) -> list[str]:
    """The arrays of which a checkpoint does not hold every part, by what lies there: none of it is read."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    there: dict[str, int] = {}
    for key in store.list().result():
        name, _, part = key.decode().rpartition("/")
        if re.fullmatch(r"\d+(\.\d+)*", part):
            there[name] = there.get(name, 0) + 1
    return [name for name, array in arrays.items() if there.get(name, 0) != _n_chunks(array)]


def _type_handler(ocp: Any) -> Any:
    class Handler(ocp.type_handlers.TypeHandler):
        """Writes `HostArray`s, as orbax writes arrays of NumPy; they are read as these."""

        def typestr(self) -> str:
            return "np.ndarray"

        async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
            raise NotImplementedError("orbax reads these as arrays of NumPy")

        async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
            raise NotImplementedError("orbax reads these as arrays of NumPy")

        async def serialize(
            self, values: Sequence[HostArray], infos: Sequence[Any], args: Sequence[Any] | None = None
        ) -> Sequence[Any]:
            await _write_all({info.name: value for value, info in zip(values, infos, strict=True)}, infos[0].parent_dir)
            return []

    return Handler()


async def _write_all(arrays: Mapping[str, HostArray], path: Path) -> None:
    import tensorstore as ts

    transaction, context = ts.Transaction(atomic=True), ts.Context()  # all of it in few files

    async def write(name: str, array: HostArray) -> None:
        # Compression takes 8 % off float32 weights and makes saving five times slower.
        layout = {"shape": array.shape, "chunks": _chunk(array), "compressor": None}
        store = await ts.open(
            _spec(path / f"ocdbt.process_{distributed.index()}", name)
            | {"metadata": layout, "store_data_equal_to_fill_value": True},
            dtype=np.dtype(array.dtype).name,
            create=True,
            transaction=transaction,
            context=context,
        )
        for bounds in array.pieces:
            part = store[tuple(slice(*ends) for ends in bounds)] if bounds else store
            await part.write(array[bounds], can_reference_source_data_indefinitely=True)

    await asyncio.gather(*(write(name, array) for name, array in arrays.items() if array.pieces))
    await transaction.commit_async()


def _spec(path: Path, name: str) -> dict[str, Any]:
    store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": store}


def _sizes(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _chunk(array: HostArray) -> list[int]:
    """Shape of what is read at once: a piece, or an even part of a large one. No two processes write to the same."""
    chunk, size = list(array.piece_shape), np.dtype(array.dtype).itemsize
    for axis in range(len(chunk)):  # parts along the first axes lie together in memory
        while math.prod(chunk) * size > _CHUNK and chunk[axis] > 1:
            smallest = next((d for d in range(2, math.isqrt(chunk[axis]) + 1) if chunk[axis] % d == 0), chunk[axis])
            chunk[axis] //= smallest
    return chunk


def _n_chunks(array: HostArray) -> int:
    return math.prod(n // c for n, c in zip(array.shape, _chunk(array), strict=True))


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Makes an OSError of tensorstore's word for a full disk and the like."""
    try:
        with quiet_orbax():
            yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
