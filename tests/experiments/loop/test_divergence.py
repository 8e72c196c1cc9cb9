"""After a loss that is no number, the run goes on from a checkpoint that it can go on from."""

import os

import pytest

from experiments.loop.optim import OptimConfig
from experiments.loop.train import train
from tests.experiments.loop.test_train import OPTIM, make_config, make_task

FAR_TOO_HIGH = OptimConfig(learning_rate=1e30, warmup_steps=0)


@pytest.mark.slow
def test_a_checkpoint_that_had_diverged_is_not_the_last_good_one(tmp_path):
    train(make_task(), make_config(2), OPTIM, tmp_path)
    with pytest.raises(FloatingPointError, match=r"the last good checkpoint is step 2, for step(s 3,)?.* had diverged"):
        train(make_task(), make_config(9, save_every=1, eval_every=100, keep_last=9), FAR_TOO_HIGH, tmp_path)
    checkpoints = os.listdir(tmp_path / "checkpoints")
    assert "3.diverged" in checkpoints
    assert "3" not in checkpoints
    finished = train(make_task(), make_config(4), OPTIM, tmp_path)  # the run goes on
    assert int(finished.state.step) == 4


def test_a_run_whose_checkpoints_all_diverged_says_so_and_keeps_them(tmp_path):
    with pytest.raises(FloatingPointError, match=r"no checkpoint to go on from: steps? 1.* had diverged before"):
        train(make_task(), make_config(9, save_every=1, eval_every=100, keep_last=9), FAR_TOO_HIGH, tmp_path)
    assert "1" in os.listdir(tmp_path / "checkpoints")


@pytest.mark.slow
def test_a_batch_that_is_no_number_says_nothing_against_the_checkpoint(tmp_path):
    for _ in range(2):  # in the second start it is the first step
        with pytest.raises(FloatingPointError, match=r"at step 3 .*(is step 2|from: step 2 had)"):
            train(make_task(spoil_at=3), make_config(9), OPTIM, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]
