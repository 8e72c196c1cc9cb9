"""NumPy's archives of arrays (.npz) by other people: read in the memory that the file's bytes allow."""

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.tokenizers import first_line

# Packed bytes stand for at most a thousand; those of images for a few.
_MOST_OF_PACKED = 200
_SMALL = 1 << 28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names.

    Raises:
      ValueError: damaged, without one of them, with objects of Python, or far larger than the file's bytes explain.
    """
    most = max(_SMALL, _MOST_OF_PACKED * file.stat().st_size)
    try:
        with zipfile.ZipFile(file) as archive:
            return [_read(archive, name, most) for name in names]
    except Exception as error:  # damaged bytes make zipfile, zlib, tokenize and NumPy raise many kinds
        raise ValueError(f"{file.name} cannot be read ({first_line(error)})") from error


def _read(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > most:
        raise ValueError(f"{name} unpacks to {entry.file_size:,} bytes, expected at most {most:,} of such a file")
    with archive.open(entry) as packed:
        content = io.BytesIO(packed.read(entry.file_size + 1))
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"{name} is in version {version} of NumPy's format, expected 1.0 or 2.0")
    shape, _, dtype = _HEADERS[version](content)
    if math.prod(shape) * dtype.itemsize != entry.file_size - content.tell():
        raise ValueError(f"{name} has {entry.file_size:,} bytes, which {dtype}{shape} has not")
    content.seek(0)
    return np.load(content, allow_pickle=False)
