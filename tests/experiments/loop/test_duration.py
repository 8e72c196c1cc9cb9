"""Epochs and shares as numbers of steps."""

import sys
from types import SimpleNamespace

import pytest

from experiments.encoders import finetune_presets
from experiments.loop import flags
from experiments.loop.duration import check_duration, in_steps, make_way
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig


def duration(epochs=None, warmup_fraction=None, steps=1000):
    optim = OptimConfig(warmup_steps=7)
    return SimpleNamespace(
        epochs=epochs, warmup_fraction=warmup_fraction, train=TrainConfig(steps=steps, eval_every=70), optim=optim
    )


@pytest.mark.parametrize(
    ("config", "steps", "eval_every", "warmup_steps"),
    [
        (duration(), 1000, 70, 7),
        (duration(epochs=2.5), 25, 20, 7),
        (duration(epochs=0.01), 1, 20, 7),
        (duration(warmup_fraction=0.1), 1000, 70, 100),
        (duration(epochs=3, warmup_fraction=0.1), 30, 20, 3),
    ],
)
def test_epochs_and_shares_become_steps(config, steps, eval_every, warmup_steps):
    check_duration(config)
    train, optim = in_steps(config, 10, eval_epochs=2)
    assert (train.steps, train.eval_every, optim.warmup_steps) == (steps, eval_every, warmup_steps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (duration(epochs=0), "--epochs 0, expected more than 0"),
        (duration(epochs=2, steps=7), "--steps 7 with --epochs 2, expected one of the two"),
        (duration(warmup_fraction=1.0), "--warmup-fraction 1.0, expected 0 <= warmup-fraction < 1"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ValueError, match=message.replace("(", "[(]")):
        check_duration(config)


@pytest.mark.parametrize(
    ("arguments", "epochs", "steps"),
    [
        ([], 4, 1000),
        (["--steps", "7"], None, 7),
        (["--train.steps=7"], None, 7),
        (["--epochs", "2"], 2, 1000),
        (["--epochs", "None", "--steps", "7"], None, 7),
    ],
)
def test_what_the_user_says_wins_over_the_preset(arguments, epochs, steps, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune", "tiny", *arguments])
    config = flags.parse(finetune_presets.PRESETS, prog="", description="", make_way=make_way)
    assert (config.epochs, config.train.steps) == (epochs, steps)


def test_epochs_win_over_a_presets_steps(monkeypatch):
    preset = finetune_presets.Config(train=TrainConfig(steps=70))
    monkeypatch.setattr(sys, "argv", ["finetune", "mine", "--epochs", "2"])
    config = flags.parse({"mine": ("", preset)}, prog="", description="", make_way=make_way)
    assert (config.epochs, config.train.steps) == (2, 1000)
