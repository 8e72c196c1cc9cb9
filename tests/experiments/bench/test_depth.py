"""The benchmark of depth as a user runs it, at sizes that take a moment."""

import functools
import json

import pytest

from experiments.bench import depth


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, depth)


@pytest.mark.slow
def test_a_row_for_each_depth_and_switch_and_remat_saves_memory(tmp_path, run):
    path = tmp_path / "out.json"
    sizes = ("--d-model", 16, "--batch", 2, "--length", 64, "--vocab-size", 16)
    status, out, err = run(*sizes, "--pattern", "-/mlp", "--layers", 1, 6, "--json", path)
    assert status == 0, err
    figures = json.loads(path.read_text())["figures"]
    assert [(f["layers"], f["scan_layers"], f["remat"]) for f in figures] == [
        (layers, scan_layers, remat) for layers in (1, 6) for scan_layers in (False, True) for remat in (False, True)
    ]
    assert len([line for line in out.splitlines() if line.startswith(("| 1 |", "| 6 |"))]) == 8
    memory = {(f["layers"], f["scan_layers"], f["remat"]): f["memory_bytes"] for f in figures}
    assert memory[6, False, True] < memory[6, False, False]
    assert memory[6, True, True] < memory[6, True, False]
    assert all(f["seconds"] > 0 for f in figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 0), "length=0, expected at least 1"),
        (("--layers",), "expected at least one depth"),
        (("--pattern", "mambo"), "unknown mixer 'mambo', did you mean 'mamba'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err
