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
