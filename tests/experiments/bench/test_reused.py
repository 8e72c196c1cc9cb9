"""Comparisons of reused models: a small one of each part, from start to table."""

import pytest

from experiments.bench import quantized, reused
from experiments.bench.seed_runs import SeedRuns


@pytest.mark.slow
def test_parts_are_compared_over_seeds(run_command):
    status, out, err = run_command(
        reused, "--seeds", "0", "1", "--base-steps", "2", "--steps", "2", "--parts", "prune", "adapt", "--rates", "0.5"
    )
    assert status == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [
        "small model",
        "prune: refitted",
        "prune: cut alone",
        "adapt: before",
        "adapt: all",
        "adapt: rank 4",
    ]
    assert all(" ± " in row for row in rows[2:])


@pytest.mark.slow
def test_smaller_models_are_compared_at_once_and_taught(run_command):
    steps = ("--seeds", "0", "--base-steps", "2", "--steps", "2")
    status, out, err = run_command(reused, *steps, "--parts", "gates", "sizes", "factorize")
    assert status == 0, err
    names = [line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("| ")][2:]
    assert names[:5] == [
        f"gates: by {name}" for name in ("what is lost", "what is lost, taught", "gates", "gates, taught")
    ] + ["sizes: whole"]
    assert len(names) == 4 + 5 + 13


@pytest.mark.slow
def test_forms_of_a_model_stand_side_by_side(run_command, empty_folder):
    assert SeedRuns(0, empty_folder, 2, 2).start == str(empty_folder / "base")
    small = ("--forms", "float32", "int4", "mixed", "--eval-batches", "1", "--rounds", "1", "--context", "8")
    status, out, err = run_command(quantized, "base", *small, "--data.seq-len", "32", "--data.max-documents", "40")
    assert status == 0, err
    rows = {line.split()[1]: line.split("|") for line in out.splitlines() if line.startswith("| ")}
    sizes = {form: float(rows[form][3]) for form in ("float32", "int4", "mixed")}
    assert sizes["mixed"] <= sizes["int4"] < sizes["float32"]
