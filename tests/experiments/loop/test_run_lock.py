"""One process at a time trains in a folder; whoever comes second changes nothing."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments import causal_lm, distill, needles, synthetic, vit
from experiments.encoders import finetune, masked_lm
from experiments.loop import run_lock as locks
from experiments.loop.flags import UsageError
from experiments.loop.run_lock import LOCK_FILE, lock_again, run_lock
from experiments.loop.train import train
from experiments.retrieval import retrieve
from tests.experiments.loop.test_train import OPTIM, make_config, make_task

HOLDS = """
import sys, time
from pathlib import Path
from experiments.loop.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that trains in tmp_path/run, and the folder."""
    folder = tmp_path / "run"
    arguments = [sys.executable, "-c", HOLDS, str(folder)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process, folder
        process.kill()


def test_a_second_process_is_refused_in_one_line_until_the_first_is_killed(other):
    process, folder = other
    with pytest.raises(UsageError, match=rf"run is being trained in by process {process.pid} on .+; nothing"):
        train(make_task(), make_config(1), OPTIM, folder)
    assert os.listdir(folder) == [LOCK_FILE]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_lock(folder):
        pass
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "fit",
    [causal_lm.fit, masked_lm.fit, finetune.fit, finetune.fit_seeds, retrieve.fit]
    + [vit.fit, vit.fit_seeds, synthetic.fit, synthetic.run, distill.fit, needles.fit],
    ids=lambda fit: f"{fit.__module__.rpartition('.')[2]}.{fit.__name__}",
)
def test_every_command_that_trains_asks_for_the_lock_first(fit, tmp_path, monkeypatch):
    def refuse(folder):
        raise UsageError(f"{folder} is taken")

    monkeypatch.setattr(locks, "_lock", refuse)
    module = sys.modules[fit.__module__]
    config = next(iter(module.PRESETS.values()))[1]
    with pytest.raises(UsageError, match="run is taken"):
        fit(config, tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_the_lock_may_be_taken_again_by_its_thread_alone(tmp_path):
    errors = []

    def elsewhere():
        try:
            with run_lock(tmp_path):
                pass
        except UsageError as error:
            errors.append(str(error))

    with run_lock(tmp_path):
        with run_lock(tmp_path / "." / ""):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        assert (tmp_path / LOCK_FILE).exists()
    assert len(errors) == 1
    assert "another thread" in errors[0]
    elsewhere()
    assert len(errors) == 1


def test_a_folder_made_for_the_lock_goes_with_it_unless_something_is_in_it(tmp_path):
    with run_lock(tmp_path / "a" / "b"):
        pass
    assert os.listdir(tmp_path) == []
    with run_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_that_is_said_and_the_run_goes_on(code, tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with run_lock(tmp_path):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be locked" in line
    assert "start no second run in it" in line


def test_a_folder_deleted_under_the_run_is_locked_again(tmp_path):
    folder = tmp_path / "run"
    with run_lock(folder):
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
        folder.mkdir()
        lock_again(folder)
        assert (folder / LOCK_FILE).exists()
        lock_again(folder)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_line(code, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(UsageError, match=rf"cannot be written: {os.strerror(code)}"), run_lock(tmp_path):
        pass


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match=r"run cannot be written: File exists"), run_lock(tmp_path / "run"):
        pass
