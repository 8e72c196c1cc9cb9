"""Runs that go on with another length: what they say, and that a stable learning rate has no jump in it."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.loop.checkpoints import Checkpoints, Restored
from experiments.loop.extending import Rate, learning_rate_of
from experiments.loop.metrics import read_metrics
from experiments.loop.optim import OptimConfig, make_schedule
from experiments.loop.train import train
from tests.experiments.loop.test_train import make_config, make_task

COSINE = OptimConfig(learning_rate=1e-2, warmup_steps=2)
WSD = OptimConfig(learning_rate=1e-2, warmup_steps=2, schedule="wsd", decay_fraction=0.25)


def rates(config, steps):
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_wsd_warms_up_stays_and_falls_in_a_line():
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_fraction=0.2)
    found = rates(config, 200)
    assert [found[step] for step in (0, 5, 10, 100, 160, 180, 200)] == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.2])


@pytest.mark.parametrize("schedule", ["wsd", "trapezoid"])
def test_a_longer_schedule_is_the_shorter_one_until_that_decays(schedule):
    config = OptimConfig(warmup_steps=10, schedule=schedule, decay_fraction=0.25)
    assert rates(config, 100)[:76] == rates(config, 400)[:76]
    assert rates(config, 100)[76] < rates(config, 400)[76]


@pytest.mark.parametrize("schedule", ["wsd", "trapezoid"])
def test_without_a_decay_the_learning_rate_stays(schedule):
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule, decay_fraction=0)
    assert rates(config, 50)[10:] == [1.0] * 41


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_fraction": 0.2}, "decay_fraction=0.2 with schedule='cosine', expected 'wsd' or 'trapezoid'"),
        ({"decay_fraction": 1.5, "schedule": "wsd"}, "decay_fraction=1.5, expected 0 to 1"),
        ({"schedule": "wds"}, "schedule='wds', expected one of cosine, linear, trapezoid, wsd"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)


@pytest.mark.slow
def test_an_extended_wsd_run_is_bitwise_the_longer_one(tmp_path, capsys):
    whole = train(make_task(), make_config(16, save_every=2), WSD, tmp_path / "whole")
    train(make_task(), make_config(8, save_every=2, keep_last=9), WSD, tmp_path / "short")
    for step in Checkpoints(tmp_path / "short").steps():
        if step > 6:  # its decay began there
            shutil.rmtree(tmp_path / "short" / "checkpoints" / str(step))
    capsys.readouterr()
    extended = train(make_task(), make_config(16, save_every=2), WSD, tmp_path / "short")
    assert jax.tree.all(jax.tree.map(np.array_equal, extended.state.params, whole.state.params))
    out = capsys.readouterr().out
    assert "resumed from step 6" in out
    assert "schedule changes" not in out


@pytest.mark.slow
def test_an_extended_cosine_run_says_how_its_learning_rate_jumps(tmp_path, capsys):
    train(make_task(), make_config(4, log_every=1), COSINE, tmp_path)
    capsys.readouterr()
    train(make_task(), make_config(8, log_every=1), COSINE, tmp_path)
    out = capsys.readouterr().out
    before = float(make_schedule(COSINE, 4)(3))
    now = float(make_schedule(COSINE, 8)(3))
    line = f"the schedule changes: at step 4 the learning rate was {before:.1e}, in a run of 8 steps it is {now:.1e}"
    assert [text for text in out.splitlines() if "schedule" in text] == [line]


@pytest.mark.slow
def test_fewer_steps_than_done_train_nothing_and_say_how_to_go_on(tmp_path, capsys):
    train(make_task(), make_config(4), COSINE, tmp_path)
    capsys.readouterr()
    assert int(train(make_task(), make_config(3), COSINE, tmp_path).state.step) == 4
    out = capsys.readouterr().out
    assert "3 steps are asked for and more are done, so nothing is trained; ask for more than 4 to go on" in out
    assert "schedule" not in out
    train(make_task(), make_config(4), COSINE, tmp_path)
    assert capsys.readouterr().out == f"resumed from step 4 in {tmp_path}: all 4 steps are done\n"


@pytest.mark.slow
def test_a_warmup_longer_than_the_run_is_said(tmp_path, capsys):
    train(make_task(), make_config(2), OptimConfig(warmup_steps=50), tmp_path)
    assert "a warm-up of 50 steps is longer than the run of 2: it is cut to 1" in capsys.readouterr().out


def test_the_learning_rate_of_a_checkpoint_of_an_earlier_version_is_found_in_the_metrics(tmp_path):
    lines = [
        {"step": 2, "split": "train", "loss": 1.0, "learning_rate": 0.5},
        {"step": 4, "split": "validation", "loss": 1.0},
        {"step": 6, "split": "train", "loss": 1.0, "learning_rate": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning_rate_of(Restored(5, None, {}, {"loss": 1.0}), read_metrics(tmp_path)) == Rate(2, 0.5)
    assert learning_rate_of(Restored(1, None, {}, {}), read_metrics(tmp_path)) is None
    assert learning_rate_of(Restored(5, None, {}, {"learning_rate": 0.3}), []) == Rate(5, 0.3)
