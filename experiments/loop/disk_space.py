"""Whether a run's checkpoints will fit on the disk, asked before the first step."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax

from experiments.loop.flags import UsageError


def bytes_of(state: Any) -> int:
    """What the arrays of a state take in a checkpoint; keys, a few bytes each, are left out."""
    numbers = (x for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
    return sum(x.size * x.dtype.itemsize for x in numbers)


def said_of_space(folder: Path, size: int, n_checkpoints: int) -> str:
    """A line about a disk that is too small for all checkpoints that are kept; empty where it is not.

    Args:
      folder: the run's.
      size: bytes of one checkpoint.
      n_checkpoints: how many lie there at once, at most.

    Raises:
      UsageError: not even one fits, or their folder is read-only.
    """
    root = folder / "checkpoints"
    if root.exists() and not os.access(root, os.W_OK | os.X_OK):
        raise UsageError(f"{root} cannot be written, so no checkpoint could be saved")
    free = shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    text = f"{folder} has {_short(free)} of disk space left; a checkpoint takes {_short(size)}"
    if free < size:
        raise UsageError(f"{text}, so none could be saved")
    needed = n_checkpoints * size - there
    return f"{text}, the run {_short(needed)} in all: saving may fail" if free < needed else ""


def _short(size: int) -> str:
    """950 B, 31.2 MB."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
