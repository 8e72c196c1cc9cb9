"""Epochs and shares as numbers of steps."""

from types import SimpleNamespace

import pytest

from experiments.loop.duration import check_duration, in_steps
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
        (duration(epochs=2, steps=7), "--steps 7 with --epochs 2; --epochs None goes by the steps"),
        (duration(warmup_fraction=1.0), "--warmup-fraction 1.0, expected 0 <= warmup-fraction < 1"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ValueError, match=message.replace("(", "[(]")):
        check_duration(config)
