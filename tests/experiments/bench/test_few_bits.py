"""Small models in few bits over seeds: a small comparison, from start to table."""

import pytest

from experiments.bench import few_bits


@pytest.mark.slow
def test_forms_are_compared_over_seeds(run_command):
    status, out, err = run_command(few_bits, "--seeds", "0", "--steps", "2", "--parts", "experts")
    assert status == 0, err
    rows = [line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row.partition(", ")[0] for row in rows[:3]] == [f"experts: {x}" for x in ("float32", "2 bits", "4 bits")]
    assert [row.rpartition(", ")[2] for row in rows[3:]] == ["by map", "by expert"] * 2


@pytest.mark.slow
def test_a_model_is_trained_in_few_bits_beside_its_floats(run_command):
    status, out, err = run_command(few_bits, "--seeds", "0", "--steps", "2", "--parts", "trained", "--bits", "1")
    assert status == 0, err
    rows = [line.split(" | ")[0][2:].partition(": ")[2] for line in out.splitlines() if line.startswith("| trained")]
    ways = ["rounded", "in order", "trained on, rounded", "trained on, in order", "trained in them"]
    taught = [f"trained in them, taught by floats {name}" for name in ("as they began", "trained on")]
    ways += [way for name in taught for way in (name, f"{name} and their directions")]
    assert rows == ["float32", "float32, trained on", *(f"1 bits, {way}" for way in ways)]
