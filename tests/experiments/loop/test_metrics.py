"""Records survive kills and resumes, and the console, the pictures and the other trackers show the same numbers."""

import io
import json
import math
import sys
import time
import types

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments.loop.metrics import (
    Metrics,
    Progress,
    format_line,
    last_evaluation,
    peak_flops,
    plot_metrics,
    read_metrics,
    unreadable_lines,
)


def write_steps(folder, *steps, **options):
    with Metrics(folder, tensorboard=False, **options) as metrics:
        for step in steps:
            metrics.write(step, {"loss": 1 / step})


def test_records_come_back_as_they_were_written(tmp_path):
    with Metrics(tmp_path / "run", tensorboard=False) as metrics:
        metrics.write(1, {"loss": jnp.float32(1.5), "accuracy": np.float64(0.25), "tokens": 7})
        metrics.write(np.int64(2), {"loss": jnp.bfloat16(0.5)}, split="validation")
        assert read_metrics(tmp_path / "run") == [  # while the run goes on
            {"step": 1, "split": "train", "loss": 1.5, "accuracy": 0.25, "tokens": 7},
            {"step": 2, "split": "validation", "loss": 0.5},
        ]
    assert read_metrics(tmp_path / "elsewhere") == []


def test_the_file_stays_json_when_a_number_is_not_finite(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan, "grad_norm": jnp.inf, "update_norm": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "split": "train", "loss": "nan", "grad_norm": "inf", "update_norm": "-inf"}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["update_norm"]) == (math.inf, -math.inf)


def test_rewind_drops_what_came_after_the_step(tmp_path):
    write_steps(tmp_path, 1, 2, 3, 4)
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write(5, {"loss": 0.2}, split="validation")
        metrics.rewind(2)
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
        metrics.write(3, {"loss": 9.0})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 0.5, 9.0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", ['{"step": 3, "spl', "{", "\0\0\0", "7", "\xff"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, rest):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(rest)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, 3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_kill_during_rewind_loses_no_record(tmp_path, monkeypatch):
    write_steps(tmp_path, 1, 2, 3)
    metrics = Metrics(tmp_path, tensorboard=False)

    def kill(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        metrics.rewind(1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def read_tensorboard(folder):
    """(step, tag or session mark, value) of every event, file by file."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: int(path.name.rpartition(".")[2])):
        data = path.read_bytes()
        while data:  # a record: length (8 bytes), checksum (4), event, checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status:
                events.append((event.step, "start", None))
            events.extend((event.step, value.tag, value.simple_value) for value in event.summary.value)
    return events


def test_tensorboard_gets_the_numbers_and_is_told_where_a_resumed_run_begins(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": 0.5})
        metrics.write(2, {"loss": 0.25, "grad_norm": math.nan}, split="validation")
    with Metrics(tmp_path) as metrics:  # within the same second
        metrics.rewind(1)
        metrics.write(2, {"loss": 0.75})
    expected = [(1, "train/loss", 0.5), (2, "validation/loss", 0.25), (2, "start", None), (2, "train/loss", 0.75)]
    assert read_tensorboard(tmp_path) == expected


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **options): ...

        def log(self, data):
            calls.append(data)

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        write_steps(tmp_path, step, wandb="zoo", config={"steps": 2})
    first, log, finish, second, *_ = calls
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("zoo", {"steps": 2}, "allow")
    assert first["id"] == (tmp_path / "wandb_id.txt").read_text()
    assert (log, finish) == ({"step": 1, "train/loss": 1.0}, "finish")


def test_weights_and_biases_missing_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb='zoo'.*pip install wandb"):
        Metrics(tmp_path, wandb="zoo")


@pytest.mark.parametrize(
    "names",
    [("loss",), ("loss", "learning_rate"), ("loss", "bits_per_byte", "learning_rate", "tokens_per_second")],
)
def test_curves_are_drawn_from_any_set_of_numbers(tmp_path, names):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        for step in range(1, 30):
            metrics.write(step, {name: 1 / step for name in names})
        metrics.write(29, {"loss": math.nan}, split="validation")
    path = plot_metrics(tmp_path)
    assert path == tmp_path / "curves.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 500
    assert picture.std() > 0.02


def test_nothing_is_drawn_of_a_run_without_a_loss(tmp_path):
    assert plot_metrics(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_console_line_reads_in_a_fixed_order():
    metrics = {
        "seconds_left": 65.2,
        "tokens_per_second": jnp.float32(31234.0),
        "learning_rate": 1e-3,
        "param_norm": 12.34567,
        "grad_norm": 0.711,
        "bits_per_byte": 2.642,
        "loss": 1.83121,
    }
    line = "loss 1.8312  bits/byte 2.642  grad norm 0.71  lr 1.0e-03  31.2k tokens/s  param norm 12.35  left 1:05"
    assert format_line(120, 600, metrics) == f"step   120/600  {line}"
    assert format_line(1, 9, {"loss": math.nan, "accuracy": 0.5}) == "step     1/9  loss nan  accuracy 50.0%"


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.0, "7"), (950, "950"), (999.9, "1.00k"), (31234, "31.2k"), (312345, "312k"), (1.25e6, "1.25M")],
)
def test_speeds_are_shortened(value, text):
    assert format_line(1, 1, {"tokens_per_second": value}).endswith(f"  {text} tokens/s")


@pytest.mark.parametrize(("value", "text"), [(4.6, "0:05"), (3599.7, "1:00:00"), (90061, "25:01:01"), (math.inf, "?")])
def test_time_left_reads_as_a_clock(value, text):
    assert format_line(1, 1, {"seconds_left": value}).endswith(f"  left {text}")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with Progress(10) as progress:
        progress.update(1, loss=2.0)
        progress.print("step 1")
    assert capsys.readouterr() == ("step 1\n", "")


def test_progress_is_one_line_in_a_notebook(capsys, monkeypatch):
    shown = []

    def update(data, raw):
        shown[-1] = data["text/plain"]

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return types.SimpleNamespace(update=update)

    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell, display=types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with Progress(10) as progress:
        progress.print("step 1")
        progress.print("step 2")
    assert shown == ["step 2"]
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_with_loss_and_time_left_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress(10, start=4) as progress:
        progress.update(7, loss=2.0)
        progress.print("step 7")
        progress.update(10, loss=1.5)
    assert capsys.readouterr().out == "step 7\n"
    assert "4/10" in terminal.getvalue()
    last = terminal.getvalue().split("\r")[-1]
    assert "10/10" in last
    assert "loss=1.5000" in last
    assert "<" in last  # elapsed < left


def test_time_before_the_clock_is_restarted_is_not_in_the_time_left(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(1000) as progress:
        progress._bar._time = lambda: time.time() + 5000  # of compiling
        assert progress._bar.format_dict["elapsed"] > 1000
        progress.restart_clock()
        assert progress._bar.format_dict["elapsed"] < 1000


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peak_flops_are_of_the_whole_device_or_unknown(kind, flops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == flops


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "4", "split": "train", "loss": 1.0}',
        '{"step": true, "split": "train", "loss": 1.0}',
        '{"step": 4, "split": "train", "loss": "low"}',
        '{"step": 4, "split": "train", "loss": [1.0]}',
        '{"step": 4, "split": "train", "loss": null}',
        "[" * 100_000,
    ],
    ids=["text step", "true step", "text", "list", "null", "deep"],
)
def test_a_line_that_no_run_has_written_is_no_record(line, tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write(3, {"loss": 2.0}, split="validation")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert unreadable_lines(tmp_path) == [2]
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]
    assert last_evaluation(tmp_path)["loss"] == 2.0
    assert plot_metrics(tmp_path)


def test_records_whose_file_is_deleted_are_written_again(tmp_path):
    with Metrics(tmp_path / "run", tensorboard=False) as metrics:
        metrics.write(1, {"loss": 2.0})
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run").rmdir()
        metrics.write(2, {"loss": 1.0})
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == [2.0, 1.0]
