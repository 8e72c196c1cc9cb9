"""Published weight files, read into NumPy without torch and without running anything in them, and written back.

Both formats say where each tensor's bytes lie, safetensors in a JSON header and torch's `.bin` (also called `.pth`, a
zip archive) in a pickle. Opening reads and checks these descriptions alone; the files are memory-mapped, and
`LazyTensor.read` copies one tensor out.

The safetensors header is parsed here. The package's NumPy side reads no float8 (0.8.0) and would be a second way to
hold a file open, next to the mapping that `.bin` needs anyway. The package writes.

A pickle is a program, and the one in a `.bin` is not run but read (`inert_pickle`): what it names is never imported,
torch neither. Names of torch's own state dicts stand for what says where a tensor is, any other for nothing. Training
keeps things of many kinds beside the weights, which are not looked at; one among the weights ends the reading. What a
pickle builds is a claim until `_locate` has held it against the file.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import reprlib
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from zoo.layers.names import unknown_name
from zoo.published.inert_pickle import Inert, Named, read_pickle
from zoo.published.json_files import parse_json, read_json

# What `open_weights` looks for, first found first read; then a lone `.pth`. The last is Codestral Mamba's.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
)

_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_SAFETENSORS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SAFETENSORS |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
_SAFETENSORS |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
_SAFETENSORS_DTYPES = {name: jnp.dtype(dtype) for name, dtype in _SAFETENSORS.items()}
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64"}
_STORAGES |= {"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
_STORAGE_DTYPES = {f"torch.{name}Storage": jnp.dtype(dtype) for name, dtype in _STORAGES.items()}
_MAX_AXES = 64  # NumPy's
# The longest header that the package reads.
_MAX_HEADER = 10**8
# What a file claims may be long, and nested so that to write it out takes for ever.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LazyTensor:
    """A tensor in a file: what it is, and where. Nothing of its data is read before `read`."""

    mapped: np.ndarray  # over the memory-mapped file, with the strides it has there

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mapped.shape

    @property
    def dtype(self) -> np.dtype:
        """bfloat16 and float8 are those of ml_dtypes, as in JAX."""
        return self.mapped.dtype

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}{list(self.shape)})"

    def read(self) -> np.ndarray:
        """The tensor as an array of the caller's own, in C order."""
        return np.array(self.mapped, order="C")


def open_weights(path: Path | str) -> dict[str, LazyTensor]:
    """Opens a file, or the weights in a folder: the first of `FILES` that is there, or else the one `.pth`.

    An index is opened with the shards that it names.

    Args:
      path: a folder as published, e.g. a snapshot in the Hugging Face cache, or a file.

    Returns:
      Tensors by name. They keep the files mapped: replacing a file does not change them, truncating it in place does.

    Raises:
      FileNotFoundError: there are no weights, or a shard is missing.
      ValueError: a file that is damaged, disagrees with its index, holds anything but tensors, or asks for code; more
        than one `.pth`.
    """
    path = Path(path)
    if not path.is_file():
        found = [path / name for name in FILES if (path / name).is_file()][:1] or sorted(path.glob("*.pth"))
        if not found:
            raise FileNotFoundError(f"{path} holds no weights, looked for {', '.join(FILES)}, *.pth")
        if len(found) > 1:
            raise ValueError(f"{path} holds {', '.join(file.name for file in found)}: name the one to read")
        path = found[0]
    return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def save_weights(
    folder: Path | str,
    tensors: Mapping[str, np.ndarray],
    *,
    format: Literal["safetensors", "bin", "pth"] = "safetensors",
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes weights under the names that their readers look for: one file, or numbered shards and an index.

    Everything is written beside and then moved in, the index last, so each file is there whole or not at all.

    Args:
      folder: made if it does not exist. Files of the same names are replaced.
      tensors: arrays by name. Arrays that share memory are written once per name.
      format: "safetensors" (needs the package of that name), "bin", a zip that `torch.load(weights_only=True)` opens,
        or "pth", such a zip with the tensors under "model", as training scripts keep them.
      max_shard_bytes: tensor bytes in one file, at least 1; a larger tensor has a file of its own. Format "pth" has one
        file whatever its size.

    Returns:
      The files, the index last when there is one.

    Raises:
      ValueError: a dtype that the format does not hold, or an unknown format.
      FileExistsError: the folder holds weights that `open_weights` would read instead of these, or not tell from them.
    """
    dtypes = {"safetensors": _SAFETENSORS_DTYPES, "bin": _STORAGE_DTYPES, "pth": _STORAGE_DTYPES}
    if format not in dtypes:
        raise ValueError(unknown_name("format", format, dtypes))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}, expected at least 1")
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes[format].values():
            raise ValueError(f"tensors[{name!r}] has dtype {tensor.dtype}, which the format {format!r} does not hold")

    shards = [[*tensors]] if format == "pth" else _fill_shards(tensors, max_shard_bytes)
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "pth": "checkpoint.pth"}[format]
    stem, _, suffix = single.partition(".")
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [single]
    entry = single if len(shards) == 1 else f"{single}.index.json"

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loose = sorted(path.name for path in folder.glob("*.pth") if path.name != entry)
    for other in (*FILES, *loose) if format == "pth" else FILES[: FILES.index(entry)]:
        if (folder / other).exists():
            raise FileExistsError(f"{folder / other} exists and would be read instead of {entry}: remove it first")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        write = {"safetensors": _write_safetensors, "bin": _write_bin, "pth": _write_pth}[format]
        for name, shard in zip(names, shards, strict=True):
            write(Path(beside, name), {key: np.asarray(tensors[key], order="C") for key in shard})
        if entry != single:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
            Path(beside, entry).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            names.append(entry)
        for name in names:
            os.replace(Path(beside, name), folder / name)
    return [folder / name for name in names]


def _fill_shards(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[list[str]]:
    """Names in the order given, a new shard where the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong inside into a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes make json, zipfile, struct and pickle raise many kinds
        raise ValueError(f"{path}: truncated or damaged, {type(error).__name__}: {error}") from error


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    content = read_json(index)
    with _errors_name(index):
        weight_map = content["weight_map"]
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"names the shard {shard!r}, expected a file beside it")
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} is missing: {index.name} names it")
    tensors: dict[str, LazyTensor] = {}
    placed: dict[str, set[str]] = {shard: set() for shard in shards}
    for name, where in weight_map.items():
        placed[where].add(name)
    for shard in shards:
        held = _open_file(index.parent / shard)
        named = placed[shard]
        with _errors_name(index):
            for name in sorted(named - held.keys()):
                raise ValueError(f"places {name!r} in {shard}, which does not hold it")
            for name in sorted(held.keys() - named):
                where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise ValueError(f"{shard} holds {name!r}, but the index {where}")
        tensors.update(held)
    return tensors


def _open_file(path: Path) -> dict[str, LazyTensor]:
    with path.open("rb") as file, _errors_name(path):
        data = np.asarray(np.memmap(file, np.uint8, mode="r"))
        return _open_safetensors(data) if path.suffix == ".safetensors" else _open_bin(data, file)


def _open_safetensors(data: np.ndarray) -> dict[str, LazyTensor]:
    """Source: the format section of the safetensors README: u64 header size, JSON header, bytes without holes."""
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    if size > len(data) - 8:
        raise ValueError(f"truncated or damaged, a header of {size} bytes in a file of {len(data)}")
    if size > _MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes, expected at most {_MAX_HEADER:,}")
    header = parse_json(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    body = data[8 + size :]
    tensors, covered = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if about["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name!r} has dtype {about['dtype']}, known are {', '.join(_SAFETENSORS_DTYPES)}")
        shape, dtype = _sizes(name, about["shape"]), _SAFETENSORS_DTYPES[about["dtype"]]
        begin, end = _sizes(name, about["data_offsets"])
        if begin != covered or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"truncated or damaged, {name!r} {dtype}{list(shape)} in bytes {begin} to {end}")
        tensors[name] = LazyTensor(np.ndarray(shape, dtype, body[begin:end]))
        covered = end
    if covered != len(body):
        raise ValueError(f"truncated or damaged, tensors cover {covered} of {len(body)} bytes")
    return tensors


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, list | tuple) and len(values) > _MAX_AXES:
        raise ValueError(f"{name!r} has {len(values)} dimensions, expected at most {_MAX_AXES}")
    if not isinstance(values, list | tuple) or not all(type(n) is int and 0 <= n < 2**80 for n in values):
        raise ValueError(f"{name!r} has {_short.repr(values)} where sizes are expected")
    return tuple(values)


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str  # its bytes are the archive's entry data/<key>
    numel: int


class _View(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as sizes' strides
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def _call(name: str, args: tuple) -> Any:
    """What torch's own functions give in its files; of others, nothing."""
    match name:
        case "collections.OrderedDict" if not args:
            return {}
        case "torch._utils._rebuild_tensor_v2":
            storage, offset, sizes, strides, _requires_grad, _hooks, *metadata = args
            if any(metadata):  # the conjugate or negative bit: the bytes are not the values
                raise ValueError(f"a tensor carries {_short.repr(metadata[0])}, which is not supported")
            return _View(storage, offset, sizes, strides)
        case "torch._utils._rebuild_parameter":
            return args[0]
    if name in _STORAGE_DTYPES:
        raise ValueError(f"calls {name}, which weights files do not")
    return Inert(name)


def _storage(pid: Any) -> _Storage:
    kind, storage, key, _location, numel = pid if type(pid) is tuple else ()
    if kind != "storage" or type(storage) is not Named or storage.name not in _STORAGE_DTYPES:
        raise ValueError(f"refers to {_short.repr(pid)}, expected a storage")
    if type(key) is not str or len(key) > 200:
        raise ValueError(f"refers to the storage {_short.repr(key)}, expected a name")
    return _Storage(_STORAGE_DTYPES[storage.name], key, numel)


def _open_bin(data: np.ndarray, file: Any) -> dict[str, LazyTensor]:
    """Source: torch/serialization.py, `_save` and `_load`, and torch/_utils.py, `_rebuild_tensor_v2`."""
    if data[:2].tobytes() != b"PK":
        raise ValueError("not a zip archive; files of torch before 1.6 must be saved again with a newer torch")
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"holds {len(pickles)} files data.pkl, expected one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in archive.namelist():
        byteorder = _stored(archive, f"{prefix}byteorder", data).tobytes()
        if byteorder != b"little":
            raise ValueError(f"byteorder is {byteorder[:20]!r}, expected b'little'")
    top = _read_pickle(_stored(archive, pickles[0], data).tobytes())
    _refuse_inert(top)
    if not isinstance(top, dict):
        raise ValueError(f"holds a {type(top).__name__}, expected tensors by name")
    for key in ("state_dict", "model"):
        inner = top.get(key)
        if isinstance(inner, dict) and any(type(value) is _View for value in inner.values()):
            top = inner
            break
    for name, view in top.items():
        _refuse_inert(view)
        if type(name) is not str or type(view) is not _View:
            raise ValueError(f"holds a {type(view).__name__} at {_short.repr(name)}, expected tensors by name")
    return {name: _locate(name, view, archive, prefix, data) for name, view in top.items()}


def _read_pickle(content: bytes) -> Any:
    return read_pickle(content, call=_call, persistent=_storage)


def _refuse_inert(value: Any) -> None:
    """Raises a ValueError where something stands for a class or function of others, or for what they gave."""
    asked = value.asked if type(value) is Inert else value.name if type(value) is Named else None
    if asked is not None:
        raise ValueError(f"asks for {asked}, which is not part of a weights file; nothing was executed")


def _locate(name: str, view: _View, archive: zipfile.ZipFile, prefix: str, data: np.ndarray) -> LazyTensor:
    """Checks a view against the bytes of its storage."""
    if type(view.storage) is not _Storage:
        raise ValueError(f"{name!r} has no storage")
    dtype, key, numel = view.storage
    shape, strides = _sizes(name, view.sizes), _sizes(name, view.strides)
    offset, numel = _sizes(name, (view.offset, numel))
    storage = _stored(archive, f"{prefix}data/{key}", data)
    if len(storage) != numel * dtype.itemsize:
        raise ValueError(f"data/{key} has {len(storage)} bytes, expected {numel} elements of {dtype}")
    if len(shape) != len(strides):
        raise ValueError(f"{name!r} has sizes {shape} but strides {strides}")
    if 0 in shape:
        return LazyTensor(np.empty(shape, dtype))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= numel:
        raise ValueError(f"{name!r} reaches element {last} of data/{key}, which has {numel}")
    # A stride that is never taken can be any number, even one that NumPy cannot hold.
    strides = tuple(stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))
    return LazyTensor(np.ndarray(shape, dtype, storage, offset * dtype.itemsize, strides))


def _stored(archive: zipfile.ZipFile, name: str, data: np.ndarray) -> np.ndarray:
    """The bytes of an archive's entry. Not `archive.read`: torch can be told to write no checksums."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"{name} is compressed or encrypted, which torch does not do")
    header = data[entry.header_offset :][:30].tobytes()
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"truncated or damaged, {name} is not where the archive says")
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    return data[begin : begin + entry.file_size]


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError("writing this format needs safetensors: pip install safetensors") from error
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses files without


def _write_bin(path: Path, tensors: dict[str, np.ndarray]) -> None:
    _write_archive(path, _pickle_state_dict(tensors), tensors)


def _write_pth(path: Path, tensors: dict[str, np.ndarray]) -> None:
    inner = _pickle_state_dict(tensors)[2:-1]  # without PROTO and STOP
    key = pickle.dumps("model", protocol=2)[2:-1]
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, key, inner, pickle.SETITEM, pickle.STOP]
    _write_archive(path, b"".join(parts), tensors)


def _write_archive(path: Path, pickled: bytes, tensors: dict[str, np.ndarray]) -> None:
    """Source: torch/serialization.py, `_save`; torch/csrc/.../inline_container.cc for the alignment."""
    with zipfile.ZipFile(path, "w") as archive:
        _store(archive, "data.pkl", pickled)
        _store(archive, "byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            _store(archive, f"data/{key}", tensor.reshape(-1).view(np.uint8).data)
        _store(archive, "version", b"3\n")


def _store(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an entry whose bytes begin at a multiple of 64 in the file."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    # The local header, the name, the zip64 field that force_zip64 adds, and the head of the padding field.
    begin = archive.start_dir + 30 + len(entry.filename) + 20 + 4
    padding = -begin % 64
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as out:
        out.write(content)


def _pickle_state_dict(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle that torch would write, opcode by opcode: a Pickler writes only globals that it can import."""
    storages = {dtype: storage.removeprefix("torch.") for storage, dtype in _STORAGE_DTYPES.items()}

    def put(value):
        return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP

    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim))
        parts += [put(name), pickle.GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", pickle.MARK]
        parts += [pickle.MARK, put("storage"), pickle.GLOBAL, f"torch\n{storages[tensor.dtype]}\n".encode()]
        parts += [put(str(key)), put("cpu"), put(tensor.size), pickle.TUPLE, pickle.BINPERSID]
        parts += [put(0), put(tensor.shape), put(strides), pickle.NEWFALSE]
        parts += [pickle.GLOBAL, b"collections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE]
        parts += [pickle.TUPLE, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])
