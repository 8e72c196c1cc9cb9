"""A run's folder: what it is called, and whether it holds this run already."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiments import flags

Config = TypeVar("Config")  # an experiment's dataclass, with fields `run_dir`, `model` and `train`

# Fields that may change between two starts of one run.
FREE = ("run_dir", "model.remat", "model.scan_layers") + tuple(
    f"train.{name}" for name in ("steps", "log_every", "eval_every", "save_every", "keep_last", "tensorboard", "wandb")
)


def identity(config: Any, free: Collection[str] = ()) -> dict[str, Any]:
    """What a run is: the fields that must be the same for it to go on, by their flags' names: {"model.d_model": 128}.

    Args:
      config: an experiment's configuration.
      free: fields that may change between starts, besides `FREE`.
    """
    fields = _flatten(dataclasses.asdict(config))
    return {name: value for name, value in fields.items() if name not in FREE and name not in free}


def default_run_dir(
    config: Config, presets: Mapping[str, tuple[str, Config]], experiment: str, free: Collection[str] = ()
) -> Path:
    """runs/EXPERIMENT/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    mine = identity(config, free)
    changes = {name: _differences(identity(preset, free), mine) for name, (_, preset) in presets.items()}
    name = min(changes, key=lambda name: len(changes[name]))
    suffix = ""
    if changed := {field: now for field, (_, now) in changes[name].items()}:
        suffix = "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / experiment / (name + suffix)


def holds_run(config: Any, folder: Path, free: Collection[str] = ()) -> bool:
    """Whether the folder already holds this run, to go on with.

    Raises:
      ValueError: another run is there (names the first flag that differs), or other files.
    """
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"--run-dir {folder} is not empty and holds no run (no config.json); choose another folder"
            )
        return False
    there = flags.load_config(type(config), path)
    for name, (before, now) in _differences(identity(there, free), identity(config, free)).items():
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{folder} holds a run with {flag} {before}, not {now}; choose another --run-dir for this one")
    return True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"model": {"d_model": 128}} becomes {"model.d_model": 128}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two runs differ, with both values."""
    pairs = {name: (one.get(name), other.get(name)) for name in {**one, **other}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
