"""Several real processes on this machine train as one does; where one ends, all do."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from experiments.loop import distributed
from experiments.loop.metrics import read_metrics
from experiments.loop.train import train
from tests.experiments.loop.test_train import OPTIM, make_config, make_task
from tests.places import ROOT
from zoo.published.checkpoint_files import (
    check_checkpoint,
    checkpoint_steps,
    checkpoints_root,
    read_arrays,
    read_record,
)

COMMAND = ["-m", "experiments.causal_lm", "tiny", "--model.n-layers", "2", "--model.d-model", "32", "--eval-batches"]
COMMAND += ["2", "--data.seq-len", "32", "--train.batch-size", "8", "--train.no-tensorboard", "--train.log-every", "1"]
COMMAND += ["--train.save-every", "3", "--train.eval-every", "6", "--prompt", "a", "--train.carry-state"]
TINY = """
import sys
from pathlib import Path
from experiments.loop import distributed, flags
from experiments.loop.train import train
from tests.experiments.loop.test_train import OPTIM, make_config, make_task
from experiments.loop.mesh import current_mesh, own_rows

class Own:
    def __init__(self, batches):
        self.batches, self.get_state, self.set_state = batches, batches.get_state, batches.set_state
        self.rows = own_rows(current_mesh())(8)
    def __next__(self):
        return {name: values[self.rows] for name, values in next(self.batches).items()}

def main():
    distributed.start(sys.argv[2], {})
    task = make_task()
    train(task._replace(batches=Own(task.batches), evaluate=lambda model: {}), make_config(3), OPTIM, Path(sys.argv[1]))

flags.run(main)
"""


FULL = """
import errno
from experiments.loop import checkpoints, distributed, metrics

write_pieces, write = checkpoints.write_pieces, metrics.Metrics.write

def refuse(path):
    if Path(path).is_relative_to(sys.argv[1]) and distributed.index() == {full}:
        raise OSError(errno.ENOSPC, "No space left on device")

def full_pieces(folder, arrays):
    refuse(folder)
    return write_pieces(folder, arrays)

def full_write(self, *args, **options):
    refuse(self.folder)
    return write(self, *args, **options)

checkpoints.write_pieces, metrics.Metrics.write = full_pieces, full_write
"""


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def start(count, words, *, devices=1, each=lambda index: [], cwd=ROOT):
    """Starts processes of a command, each with some devices, and what only it is told."""
    port, started = free_port(), []
    for index in range(count):
        place = f"localhost:{port},{count},{index}"
        several = [] if count == 1 else [place] if words[0] == "-c" else ["--distributed", place]
        optimise = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count", "--ignored")
        environment = os.environ | {
            "XLA_FLAGS": f"{optimise} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        arguments = [sys.executable, *words, *several, *each(index)]
        output, errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 as long as the process
        process = subprocess.Popen(arguments, cwd=cwd, env=environment, stdout=output, stderr=errors)
        started.append(Started(process, output, errors))
    return started


class Started(NamedTuple):
    """A process, and the files that it writes to: a pipe would be full at some time."""

    process: subprocess.Popen
    output: Any
    errors: Any

    def end(self, seconds=600):
        """Exit status, output and errors, once it has ended."""
        self.process.wait(seconds)
        for file in (self.output, self.errors):
            file.seek(0)
        return self.process.returncode, self.output.read(), self.errors.read()


@contextlib.contextmanager
def running(*arguments, **options):
    started = start(*arguments, **options)
    try:
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.wait()


def run(*arguments, **options):
    """Runs processes to their end: exit status, output and errors of each."""
    with running(*arguments, **options) as started:
        return [one.end() for one in started]


def steps_of(folder):
    return checkpoint_steps(checkpoints_root(folder))  # changes nothing, the run is going on


def arrays_of(folder, step):
    checkpoint = folder / "checkpoints" / str(step)
    check_checkpoint(checkpoint)
    record = read_record(checkpoint)
    return read_arrays(checkpoint / "state", {name: shape for name, (_, shape) in record["arrays"].items()})


def assert_same_run(folder, other, step, tolerance=1e-5):
    """Losses at every step, and all that a checkpoint holds."""
    losses = [[record.get("loss") for record in read_metrics(one)] for one in (folder, other)]
    np.testing.assert_allclose(*np.array(losses, float), rtol=0, atol=tolerance)
    here, there = arrays_of(folder, step), arrays_of(other, step)
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_allclose(
            here[name].astype(np.float64), there[name].astype(np.float64), rtol=tolerance, atol=tolerance, err_msg=name
        )
    states = [read_record(one / "checkpoints" / str(step))["data_state"] for one in (folder, other)]
    assert states[0] == states[1]


def wait_until(true, processes=(), seconds=240):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it took too long"
        assert all(one.process.poll() is None for one in processes), [one.end(60) for one in processes]
        time.sleep(0.1)


def test_two_processes_train_as_one_does(tmp_path):
    results = run(2, ["-c", TINY, str(tmp_path / "two")])
    assert [status for status, *_ in results] == [0, 0], results
    assert "step     3/3" in results[0][1]
    assert results[1][1] == ""  # one prints
    train(make_task()._replace(evaluate=lambda model: {}), make_config(3), OPTIM, tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gpu-1:4321,2,2", "expected auto, off, or host:port,count,index"),
        ("gpu-1,2,0", "expected auto, off, or host:port,count,index"),
        ("2", "expected auto, off, or host:port,count,index"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(spec, expected):
    with pytest.raises(ValueError, match=expected):
        distributed.start(spec, {})


def test_a_launcher_of_several_is_not_overheard(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS=4 says that there are several"):
        distributed.start(None, {})
    distributed.start("off", {})
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.start(None, {})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, of 6 steps."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (result,) = run(1, [*COMMAND, "--steps", "6", "--run-dir", str(folder)])
    assert result[0] == 0, result
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 1, ""), (4, 1, "--mesh.fsdp 4"), (2, 2, "--mesh.fsdp 2"), (2, 2, "--mesh.tensor 4")],
)
def test_several_processes_train_as_one_does(tmp_path, alone, count, devices, mesh):
    words = [*COMMAND, "--steps", "6", "--run-dir", str(tmp_path / "run"), *mesh.split()]
    results = run(count, words, devices=devices)
    assert [status for status, *_ in results] == [0] * count, results
    assert "--- sample" in results[0][1]
    assert not any(output for _, output, _ in results[1:])
    assert_same_run(tmp_path / "run", alone, 6)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(tmp_path, alone):
    """Checkpoints of one process at step 3 and of two at step 4, restored by two and by four devices of one."""
    folder = tmp_path / "run"
    for steps, count, devices, mesh in ((4, 1, 1, ""), (5, 2, 2, "--mesh.fsdp 4"), (6, 1, 4, "--mesh.data 2")):
        words = [*COMMAND, "--steps", str(steps), "--run-dir", str(folder), *mesh.split()]
        words += ["--mesh.fsdp", "2"] if "--mesh.data" in mesh else []
        results = run(count, words, devices=devices)
        assert [status for status, *_ in results] == [0] * count, results
    whole = tmp_path / "whole"
    for steps in (4, 5, 6):  # the schedule depends on the length, so one process is stopped as often
        (result,) = run(1, [*COMMAND, "--steps", str(steps), "--run-dir", str(whole)])
        assert result[0] == 0, result
    assert_same_run(folder, whole, 6)


@pytest.mark.slow
def test_damage_that_process_1_finds_is_known_to_all(tmp_path):
    folder, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "6"
    words = [*COMMAND, "--run-dir", str(folder), "--steps"]
    assert run(1, [*words, "6"])[0][0] == 0
    names = list(json.loads((newest / "manifest.json").read_text()))
    damaged = next(newest / name for name in names[1::2] if name.startswith("state"))  # its share is every other file
    damaged.write_bytes(bytes(byte ^ 1 for byte in damaged.read_bytes()))
    results = run(2, [*words, "7"])
    assert [status for status, *_ in results] == [0, 0], results
    assert "resumed from step 3" in results[0][1]
    assert f"{damaged.relative_to(newest)} has other bytes than were written" in results[0][2]
    assert {path.name for path in newest.parent.iterdir()} >= {"6.damaged", "7"}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_others_end_and_the_run_is_resumed(tmp_path, killed):
    folder = tmp_path / "run"
    words = [*COMMAND, "--run-dir", str(folder), "--steps", "100000"]
    with running(2, words) as processes:
        wait_until(lambda: steps_of(folder), processes)
        processes[killed].process.kill()
        before = time.monotonic()
        status, _, said = processes[1 - killed].end()
        assert time.monotonic() - before < distributed.SILENCE + 30
        assert status == 1
        assert f"error: process {killed}" in said.splitlines()[-1]
        assert "the same commands resume the run" in said.splitlines()[-1]
    step = steps_of(folder)[-1]
    results = run(2, [*words[:-1], str(step + 2)])
    assert [status for status, *_ in results] == [0, 0], results
    assert "resumed from step" in results[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_ends_all_after_the_same_step_saved(tmp_path, told):
    folder = tmp_path / "run"
    words = [*COMMAND, "--run-dir", str(folder), "--steps", "100000"]
    with running(2, words) as processes:
        wait_until(lambda: steps_of(folder), processes)
        processes[told].process.send_signal(signal.SIGTERM)
        said = [one.end() for one in processes]
        assert [status for status, *_ in said] == [143, 143], said
    last = read_metrics(folder)[-1]["step"]
    assert f"stopped at step {last} of 100000, saved" in said[0][1]
    assert steps_of(folder)[-1] == last


@pytest.mark.slow
def test_a_second_start_of_several_processes_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    words = [*COMMAND, "--run-dir", str(folder), "--steps", "100000"]
    with running(2, words) as processes:
        wait_until(lambda: steps_of(folder), processes)
        config = (folder / "config.json").read_text()
        second = run(2, words)
        assert [status for status, *_ in second] == [1, 1]
        assert f"error: {folder} is being trained in by process" in second[0][2]
        assert (folder / "config.json").read_text() == config
        assert all(one.process.poll() is None for one in processes)


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_one_that_compiles_for_longer_is_waited_for(tmp_path, slow):
    """Longer than the half minute that XLA's exchanges on CPUs take to connect at most."""
    begin, main = TINY.split("def main():")
    sleepy = f"""
import time
from experiments.loop.train import TrainStep
compile_ = TrainStep.compile
def compile_late(self, *args):
    time.sleep(45 if distributed.index() == {slow} else 0)
    compile_(self, *args)
TrainStep.compile = compile_late
"""
    results = run(2, ["-c", f"{begin}{sleepy}\ndef main():{main}", str(tmp_path / "two")])
    assert [status for status, *_ in results] == [0, 0], results


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_where_one_cannot_write_all_go_on_elsewhere(tmp_path, full):
    folder = tmp_path / "two"
    begin, main = TINY.split("def main():")
    results = run(2, ["-c", f"{begin}{FULL.format(full=full)}\ndef main():{main}", str(folder)])
    assert [status for status, *_ in results] == [1, 1], results
    rescued = tmp_path / "two.rescued"
    assert f"error: trained to step 3 of 3, but {folder} (No space left on device)" in results[0][2]
    assert f"--run-dir {rescued} resumes it" in results[0][2]
    train(make_task()._replace(evaluate=lambda model: {}), make_config(3), OPTIM, tmp_path / "one")
    assert_same_run(rescued, tmp_path / "one", 3)
    results = run(2, ["-c", TINY, str(rescued)])
    assert [status for status, *_ in results] == [0, 0], results
    assert "resumed from step 3" in results[0][1]


@pytest.mark.slow
def test_flags_that_differ_are_named(tmp_path):
    words = [*COMMAND, "--run-dir", str(tmp_path / "run")]
    results = run(2, words, each=lambda index: ["--optim.learning-rate", f"0.00{index + 1}"])
    assert [status for status, *_ in results] == [1, 1]
    assert "error: --optim.learning-rate is 0.001 in process 0 and 0.002 in process 1" in results[0][2]
    assert not (tmp_path / "run").exists()
