"""How long a run is, said in passes over its rows and in shares of its steps."""

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol, TypeVar

from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig

Config = TypeVar("Config", bound=Any)


class Duration(Protocol):
    """The part of an experiment's configuration that says how long its runs are."""

    @property
    def epochs(self) -> float | None:
        """Passes over the training rows, in place of train.steps."""

    @property
    def warmup_fraction(self) -> float | None:
        """Share of the steps that warm up, in place of optim.warmup_steps."""

    @property
    def train(self) -> TrainConfig: ...

    @property
    def optim(self) -> OptimConfig: ...


def check_duration(config: Duration) -> None:
    """Raises a ValueError where epochs or the share are out of range, or steps are given beside epochs."""
    if config.epochs is not None and config.epochs <= 0:
        raise ValueError(f"--epochs {config.epochs}, expected more than 0")
    if config.epochs is not None and config.train.steps != TrainConfig().steps:
        raise ValueError(f"--steps {config.train.steps} with --epochs {config.epochs}, expected one of the two")
    if config.warmup_fraction is not None and not 0 <= config.warmup_fraction < 1:
        raise ValueError(f"--warmup-fraction {config.warmup_fraction}, expected 0 <= warmup-fraction < 1")


def make_way(preset: Config, given: Collection[str]) -> Config:
    """A preset that says nothing of its length where the command line says it in the other unit.

    Args:
      preset: an experiment's configuration, with the fields of a `Duration`.
      given: the fields that flags name, see `flags.parse`.
    """
    by_steps, by_epochs = "train.steps" in given, "epochs" in given
    if by_steps and not by_epochs:
        return dataclasses.replace(preset, epochs=None)
    if by_epochs and not by_steps:
        return dataclasses.replace(preset, train=dataclasses.replace(preset.train, steps=TrainConfig().steps))
    return preset


def in_steps(config: Duration, n_batches: int, *, eval_epochs: int = 1) -> tuple[TrainConfig, OptimConfig]:
    """Training and optimiser with numbers of steps for epochs and shares.

    Args:
      n_batches: steps of an epoch.
      eval_epochs: where epochs are given, passes between evaluations.
    """
    train, optim = config.train, config.optim
    if config.epochs is not None:
        steps = max(1, round(config.epochs * n_batches))
        train = dataclasses.replace(train, steps=steps, eval_every=eval_epochs * n_batches)
    if config.warmup_fraction is not None:
        optim = dataclasses.replace(optim, warmup_steps=round(config.warmup_fraction * train.steps))
    return train, optim
