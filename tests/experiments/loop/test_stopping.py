"""Signals: a run that is stopped by one is saved, and its command does not end as if all were done."""

import os
import signal
import sys
import threading

import pytest

from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import train
from tests.experiments.loop.test_train import OPTIM, make_config, make_task

NUMBERS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(autouse=True)
def _heard():
    """SIGINT does what it does in a terminal: a shell that puts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signalling:
    """Batches in whose n-th a signal comes."""

    def __init__(self, batches, number, at):
        self.batches, self.number, self.left = batches, number, at

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def run(main):
    """The status with which a command exits, and whether signals do afterwards what they did before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        flags.run(main)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    return ended.value.code


@pytest.mark.parametrize(("number", "status"), NUMBERS)
@pytest.mark.parametrize("at", [2, 3], ids=["on the way", "in the last step"])
def test_a_stopped_run_is_saved_and_its_command_exits_as_the_signal_would_have_it(number, status, at, tmp_path, capsys):
    finished = []

    def main():
        task = make_task()
        task = task._replace(batches=Signalling(task.batches, number, at))
        finished.append(train(task, make_config(3), OPTIM, tmp_path))
        return 0  # as commands do whose run was stopped

    assert run(main) == status
    assert finished[0].stopped
    assert Checkpoints(tmp_path).latest() == at
    assert f"stopped at step {at} of 3, saved in {tmp_path}; the same command resumes" in capsys.readouterr().out
    assert run(lambda: 0) == 0  # the next command of this process has not been stopped


@pytest.mark.parametrize(("number", "status"), NUMBERS)
def test_a_command_without_a_run_ends_at_once(number, status, capsys):
    def main():
        os.kill(os.getpid(), number)
        threading.Event().wait(10)
        raise AssertionError("it went on")

    assert run(main) == status
    assert capsys.readouterr().err in ("interrupted\n", "terminated\n")


def test_errors_keep_their_status(capsys):
    def main():
        raise flags.UsageError("no")

    assert run(main) == 1
    assert capsys.readouterr().err == "error: no\n"


def test_a_command_in_a_thread_runs_without_handlers():
    codes = []

    def command():
        try:
            flags.run(lambda: sys.exit(7))
        except SystemExit as ended:
            codes.append(ended.code)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert codes == [7]
