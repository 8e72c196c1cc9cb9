"""The checkpoints of a run, read: which there are, whether one is whole, and its arrays by name.

    run/checkpoints/120/state/          the arrays, an orbax checkpoint: {"params.embed.embedding": array, ...}
    run/checkpoints/120/record.json     dtype and shape of each array, where the data was, metrics
    run/checkpoints/120/manifest.json   size and SHA-256 of every other file

Training writes them (`experiments.loop.checkpoints`), perhaps at this very moment; nothing here changes a file.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zoo.published.json_files import parse_json

logger = logging.getLogger(__name__)


class Damaged(Exception):
    """Says what is wrong with a checkpoint, in a few words."""


def checkpoints_root(folder: Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(os.path.realpath(folder)) / "checkpoints"  # orbax wants it absolute


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(path.name) for path in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
    return []


def choose_checkpoint(
    folder: Path, step: int | Literal["latest", "best"] = "latest", *, best_metric: str = "loss"
) -> Path:
    """The folder of a run's checkpoint that is whole.

    Args:
      folder: the run's.
      step: a number, "latest", or "best": where `best_metric` is lowest. Damaged ones are passed over, with a warning.

    Raises:
      FileNotFoundError: no such checkpoint, or it is damaged.
    """
    root = checkpoints_root(folder)
    if step == "latest":
        candidates = checkpoint_steps(root)[::-1]
    elif step == "best":
        candidates = rank_checkpoints(root, best_metric)[0]
    else:
        candidates = [step]
    for candidate in candidates:
        path = root / str(candidate)
        try:
            check_checkpoint(path)
        except Damaged as damage:
            logger.warning("checkpoint %s is damaged (%s); skipped", path, damage)
            continue
        return path
    there = checkpoint_steps(root) or "none"
    raise FileNotFoundError(f"no sound checkpoint for step={step!r} in {root}; there are {there}")


def params_part(record: dict[str, Any]) -> str:
    """Which part of a checkpoint are the parameters to use: their running mean, where training kept one."""
    return "average" if any(name.startswith("average.") for name in record["arrays"]) else "params"


def read_params(checkpoint: Path) -> dict[str, np.ndarray]:
    """The parameters in a checkpoint that is whole, by name: {"backbone.layers.0.mixer.A_log": array, ...}."""
    record = read_record(checkpoint)
    prefix = params_part(record) + "."
    shapes = {name: shape for name, (_, shape) in record["arrays"].items() if name.startswith(prefix)}
    arrays = read_arrays(checkpoint / "state", shapes)
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def rank_checkpoints(root: Path, metric: str) -> tuple[list[int], dict[int, Damaged]]:
    """Steps that have a metric, lowest first, and the steps whose record cannot be trusted."""
    values, damaged = {}, {}
    for step in checkpoint_steps(root):
        folder = root / str(step)
        try:
            # A flipped digit must not make a bad checkpoint the best one, and have the best deleted.
            check_checkpoint(folder, only="record.json")
        except Damaged as damage:
            damaged[step] = damage
            continue
        value = read_record(folder)["metrics"].get(metric, math.nan)
        if not math.isnan(value):
            values[step] = value
    return sorted(values, key=lambda step: values[step]), damaged


def check_checkpoint(
    folder: Path, *, only: str | None = None, digests: bool = True, share: tuple[int, int] = (0, 1)
) -> None:
    """Raises Damaged unless the files (or one of them) are, byte for byte, those that the manifest lists.

    Without digests their sizes alone are looked at, which takes no time; with a share (i, n), the i-th of n processes
    reads every n-th file, and the sizes of all.
    """
    try:
        name = "manifest.json"
        manifest = parse_json((folder / name).read_bytes())
        if "record.json" not in manifest:
            raise Damaged("manifest.json does not list record.json")
        for number, name in enumerate(manifest if only is None else [only]):
            size, digest = manifest[name]
            with (folder / name).open("rb") as file:
                if (actual := os.fstat(file.fileno()).st_size) != size:
                    raise Damaged(f"{name} has {actual} bytes instead of {size}")
                if (
                    digests
                    and number % share[1] == share[0]
                    and hashlib.file_digest(file, "sha256").hexdigest() != digest
                ):
                    raise Damaged(f"{name} has other bytes than were written")
        _check_record(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except IsADirectoryError:
        raise Damaged(f"{name} is a folder") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(f"{name} is behind links that lead in a circle") from None
        if error.errno != errno.EIO:  # no permission, say: nothing is known about the bytes
            raise
        raise Damaged(f"{name} cannot be read from the disk") from None
    except (ValueError, TypeError, KeyError, RecursionError):  # from json or the unpacking
        raise Damaged("manifest.json makes no sense") from None


def _check_record(folder: Path) -> None:
    """Raises Damaged where a record agrees with its manifest and is none all the same."""
    try:
        record = read_record(folder)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not {"arrays", "data_state", "metrics"} <= record.keys():
        raise Damaged("record.json makes no sense")


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: "arrays", name to (dtype, shape), "data_state" and "metrics"."""
    return parse_json((folder / "record.json").read_bytes())


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps orbax's log, a page of traceback for a full disk, off the console: its exceptions say as much."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def read_arrays(path: Path, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint's folder `state`, given name and shape of each."""
    try:
        import orbax.checkpoint as ocp  # 0.2 s to 0.4 s, which `import zoo` should not wait for
        from etils import epath  # what orbax's paths are
    except ImportError as error:
        raise ImportError(f"{path} is of a training run; to read it: pip install orbax-checkpoint") from error

    stored = [name for name, shape in shapes.items() if 0 not in shape]
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(stored, 0),
        restore_args=dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    with quiet_orbax():  # a checkpointer would wait for all processes, of which one may read alone
        arrays = ocp.PyTreeCheckpointHandler().restore(epath.Path(path), args=arguments)
    return {name: arrays[name] if name in arrays else np.empty(tuple(shape)) for name, shape in shapes.items()}
