"""A disk that is too small is said before the first step."""

import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments.loop.disk_space import bytes_of, said_of_space
from experiments.loop.flags import UsageError
from experiments.loop.train import train
from tests.experiments.loop.test_train import OPTIM, make_config, make_task


@pytest.fixture
def free(monkeypatch):
    def set_free(n_bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=n_bytes))

    return set_free


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_training(free, tmp_path):
    free(1000)
    with pytest.raises(UsageError, match=r"has 1 kB of disk space left; a checkpoint takes .* kB, so none could be"):
        train(make_task(), make_config(2), OPTIM, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_disk_without_room_for_all_is_said_and_what_lies_there_counts(free, tmp_path):
    free(2_500_000)
    assert said_of_space(tmp_path, 1_000_000, 2) == ""
    assert "a checkpoint takes 1 MB, the run 3 MB in all: saving may fail" in said_of_space(tmp_path, 1_000_000, 3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "file").write_bytes(bytes(600_000))
    assert said_of_space(tmp_path, 1_000_000, 3) == ""


def test_checkpoints_that_are_read_only_are_said_before_training(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write anywhere
    with pytest.raises(UsageError, match="checkpoints cannot be written"):
        said_of_space(tmp_path, 1, 1)


def test_the_size_of_a_state_is_that_of_its_arrays():
    assert bytes_of({"a": jnp.zeros((3, 4)), "b": jnp.int32(0), "key": jax.random.key(0)}) == 52
