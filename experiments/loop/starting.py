"""What a run that is begun with --init starts from: weights, the architecture that they have, and how it is trained."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx

from experiments.loop import runs
from experiments.loop.train import split_model
from zoo.models.build import abstract
from zoo.reuse.quantize import options_of
from zoo.reuse.quantize import with_options as quantized_as
from zoo.stack.backbone_config import BackboneConfig

Loaded = TypeVar("Loaded")
Model = TypeVar("Model", bound=nnx.Module)

# Fields of a model's config that its parameters' names and shapes do not depend on: flags may say them beside --init.
_REMAT = ("remat", "remat_keeps", "remat_rounds", "remat_positions")
OPTIONS = ("dropout", "drop_path", "dtype", "param_dtype", *_REMAT, "scan_layers", "keep")


def load_start(init: str | Path, kept: Path | None, load: Callable[[str | Path], Loaded]) -> Loaded:
    """Loads what a run starts from: itself where it goes on, so that what it was begun with need not be there any more.

    Args:
      init: what it was begun with.
      kept: the run's folder, where it goes on; None for a new one.
      load: loads a run's folder too.
    """
    if kept is not None and (kept / runs.MODEL_FILE).is_file():
        with contextlib.suppress(FileNotFoundError):  # it was stopped before its first checkpoint
            return load(kept)
    return load(init)


def check_agreement(init: str, asked: BackboneConfig, there: BackboneConfig, given: Collection[str]) -> None:
    """Raises a ValueError where a flag says something else of the architecture than what --init has.

    Args:
      init: what a run is begun with.
      asked: `--model.` as presets and flags say it.
      there: the model that the run starts with.
      given: the fields that flags name, see `flags.given`.
    """
    values, found = (runs.flatten(dataclasses.asdict(config), "model.") for config in (asked, there))
    for name in sorted({*given} & values.keys() & found.keys() - {f"model.{option}" for option in OPTIONS}):
        unknown_yet = name in ("model.vocab_size", "model.n_classes") and values[name] == 0
        if values[name] != found[name] and not unknown_yet:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {values[name]}, but --init {init} has {found[name]}; leave the flag out")


def with_options(model: Model, asked: BackboneConfig, given: Collection[str]) -> Model:
    """A model with those of `OPTIONS` that flags name; its parameters are its own arrays, or casts of them.

    Args:
      model: what --init has.
      asked, given: as in `check_agreement`.
    """
    config: Any = model.config  # type: ignore[attr-defined]
    changes = options(asked, given)
    if all(getattr(config, name) == value for name, value in changes.items()):
        return model
    changed = dataclasses.replace(config, **changes)
    graphdef, like, _ = split_model(quantized_as(abstract(changed), options_of(model)))
    _, params, rest = split_model(model)
    return nnx.merge(graphdef, jax.tree.map(lambda value, to: value.astype(to.dtype), params, like), rest)


def options(asked: BackboneConfig, given: Collection[str]) -> dict[str, Any]:
    """Those of `OPTIONS` that flags name, as they say them; arguments as in `check_agreement`."""
    return {name: getattr(asked, name) for name in OPTIONS if f"model.{name}" in given}
