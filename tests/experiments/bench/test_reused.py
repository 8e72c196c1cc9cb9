"""Comparisons of reused models: a small one of each part, from start to table."""

import pytest

from experiments.bench import quantized, reused


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
def test_forms_of_a_model_stand_side_by_side(run_command, empty_folder):
    bench = reused.Bench(reused.Config(base_steps=2), 0, empty_folder)
    bench.train("base", "library", 2, model=reused._SHAPE)
    small = ("--forms", "float32", "int4", "mixed", "--eval-batches", "1", "--rounds", "1", "--context", "8")
    status, out, err = run_command(quantized, "base", *small, "--data.seq-len", "32", "--data.max-documents", "40")
    assert status == 0, err
    rows = {line.split()[1]: line.split("|") for line in out.splitlines() if line.startswith("| ")}
    sizes = {form: float(rows[form][3]) for form in ("float32", "int4", "mixed")}
    assert sizes["mixed"] <= sizes["int4"] < sizes["float32"]
