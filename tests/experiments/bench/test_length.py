"""The benchmark of length as a user runs it, at sizes that take a moment."""

import functools
import json

import pytest

from experiments.bench import length


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, length)


def test_a_row_for_each_length(tmp_path, run):
    path = tmp_path / "out.json"
    status, out, err = run("--patterns", "-/mlp", "--lengths", 32, 64, "--run", "--json", path)
    assert status == 0, err
    figures = json.loads(path.read_text())["figures"]
    assert [(f["length"], f["pieces"]) for f in figures] == [(32, 1), (64, 1)]
    assert all(f["memory_bytes"] > 0 and f["seconds"] > 0 and f["loss"] > 0 for f in figures)
    assert len([line for line in out.splitlines() if line.startswith("| -/mlp |")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths",), "lengths=(), expected at least one"),
        (("--lengths", 0), "lengths=(0,), expected multiples of pieces=(1,)"),
        (("--pieces", 1000), "pieces=(1000,), expected 1 to 1, the devices there are"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err
