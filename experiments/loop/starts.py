"""How a run was started, each time: the command, the versions and the devices, in its folder's starts.json."""

import importlib.metadata
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import zoo
from experiments.loop import distributed
from experiments.loop.flags import SCRIPTS
from experiments.loop.json_files import write_json

STARTS_FILE = "starts.json"
_FIELDS = {"when", "step", "command", "devices", "processes", "python", "system", "versions"}
# What decides numbers.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record_start(folder: Path, step: int) -> None:
    """Adds this process to the starts of a run.

    Args:
      step: where it goes on; 0 for a new run.
    """
    write_json([*read_starts(folder), _this_start(step)], folder / STARTS_FILE)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; empty where none is known."""
    try:
        starts = json.loads((folder / STARTS_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [start for start in starts if _is_whole(start)] if isinstance(starts, list) else []


def _is_whole(start: Any) -> bool:
    """Whether an entry says what `record_start` has written: somebody may have edited it."""
    if not isinstance(start, dict) or _FIELDS - start.keys() or not isinstance(start["processes"], int):
        return False
    try:
        datetime.fromisoformat(start["when"])
    except (TypeError, ValueError):
        return False
    return isinstance(start["versions"], dict)


def _this_start(step: int) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": called(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": distributed.count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"subquadratic-zoo": zoo.__version__} | {name: _version(name) for name in _PACKAGES},
    }


def called() -> str | None:
    """The command line of this process; None in a notebook, or where another program imports us."""
    words = sys.orig_argv  # whatever has been taken off sys.argv since
    for number, word in enumerate(words[1:], 1):
        if words[number - 1] == "-m" and word.startswith("experiments."):
            return shlex.join(["python", "-m", *words[number:]])
        if Path(word).name in SCRIPTS:
            return shlex.join(["subq", *words[number + 1 :]])
    return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "?"
