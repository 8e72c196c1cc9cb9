"""A run's folder: what it is called, whether it holds this run already, and the model in it."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiments.loop import distributed, flags
from experiments.loop.fingerprints import check_inputs
from experiments.loop.flatten import flatten as flatten
from experiments.loop.json_files import write_json
from experiments.loop.mesh import AXES
from experiments.loop.run_lock import LOCK_FILE
from zoo.models.build import ModelConfig
from zoo.models.causal import TokenConfig
from zoo.published.run_folder import MODEL_FILE
from zoo.stack.backbone_config import BackboneConfig, word_config
from zoo.stack.pattern import mixer_name, pattern_mixers

TokenModelConfig = TypeVar("TokenModelConfig", bound=TokenConfig)
# How long a run is, where it is not said in steps; runs of other lengths have other folders unless one is named.
LENGTH = ("epochs",)
Config = TypeVar("Config")  # an experiment's dataclass, with fields `run_dir`, `model` and `train`

# Fields that may change between two starts of one run.
FREE = (
    (
        "run_dir",
        "model.remat",
        "model.remat_keeps",
        "model.remat_rounds",
        "model.remat_positions",
        "model.scan_layers",
        "optim.decay_fraction",
    )
    + tuple(
        f"train.{name}"
        for name in (
            "steps",
            "log_every",
            "eval_every",
            "save_every",
            "keep_last",
            "tensorboard",
            "wandb",
            "allow_changed",
        )
        + ("rescue", "distributed")
    )
    + tuple(f"mesh.{axis}" for axis in AXES)
)


def identity(config: Any, free: Collection[str] = ()) -> dict[str, Any]:
    """What a run is: the fields that must be the same for it to go on, by their flags' names: {"model.d_model": 128}.

    Args:
      config: an experiment's configuration.
      free: fields that may change between starts, besides `FREE`.
    """
    fields = flatten(dataclasses.asdict(config))
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
    return distributed.agreed(lambda: _holds_run(config, folder, free))


def _holds_run(config: Any, folder: Path, free: Collection[str]) -> bool:
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(path.name != LOCK_FILE for path in folder.iterdir()):
            raise ValueError(
                f"--run-dir {folder} is not empty and holds no run (no config.json); choose another folder"
            )
        return False
    there = flags.load_config(type(config), path)
    free = (*free, *LENGTH)
    for name, (before, now) in _differences(identity(there, free), identity(config, free)).items():
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{folder} holds a run with {flag} {before}, not {now}; choose another --run-dir for this one")
    return True


def resumed(config: Any, folder: Path, free: Collection[str] = ()) -> Path | None:
    """The folder, where it already holds this run and what its first start has made; None for a new run.

    Raises:
      ValueError: as `holds_run`.
    """
    return folder if holds_run(config, folder, free) else None


def begin(config: Any, folder: Path, model: ModelConfig | None = None, inputs: Mapping[str, Any] | None = None) -> None:
    """Writes what a run's folder says before its first step; config.json is the last, and makes it a run.

    Args:
      config: an experiment's configuration.
      model: which model the checkpoints are of. None: of no model, or of several.
      inputs: what it learns from, see `fingerprints.check_inputs`.

    Raises:
      ValueError: the run is there and has learned from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_inputs(folder, inputs or {}, config.train.allow_changed)
    if model is not None:
        save_model_config(model, folder)
    flags.save_config(config, folder / "config.json")


def fit_vocabulary(model: TokenModelConfig, vocab_size: int, tokenizer: str) -> TokenModelConfig:
    """A model's configuration with a vocabulary: the tokenizer's, where it has none yet.

    Args:
      vocab_size: ids that the tokenizer needs.
      tokenizer: its name, for the error.

    Raises:
      ValueError: the tokenizer has ids that the model has no row for.
    """
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=vocab_size)
    if vocab_size > model.vocab_size:
        raise ValueError(
            f"--model.vocab-size {model.vocab_size} is smaller than the vocabulary of --data.tokenizer "
            f"{tokenizer}, {vocab_size}; set it to 0 to take the tokenizer's"
        )
    return model


def check_filters(model: BackboneConfig, length: int, flag: str = "--data.seq-len") -> None:
    """Raises a ValueError where rows of this length are longer than a long convolution's filters."""
    for mixer in pattern_mixers(model.pattern, model.n_layers):
        if mixer_name(mixer) == "m2" and length > (l_max := word_config(model, mixer).l_max):
            raise ValueError(f"{flag} {length} with --model.m2.l-max {l_max}: filters are at most l-max long")


def save_model_config(model: ModelConfig, folder: Path) -> None:
    """Writes which model the checkpoints of a run are of, in one step; `read_model_config` reads it."""
    write_json({"kind": type(model).__name__, "config": dataclasses.asdict(model)}, folder / MODEL_FILE)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two runs differ, with both values."""
    pairs = {name: (one.get(name), other.get(name)) for name in {**one, **other}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
