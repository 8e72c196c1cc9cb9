"""Ways to tune over seeds: a small comparison, from start to table."""

import pytest

from experiments.bench import tuned


@pytest.mark.slow
def test_tunes_are_compared_over_seeds(run_command):
    status, out, err = run_command(tuned, "--seeds", "0", "--steps", "2", "--base-steps", "2", "--shares", "0.1")
    assert status == 0, err
    rows = [line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("| ")][2:]
    assert rows[:6] == ["tune: before", "tune: all"] + [
        *(f"tune: {name} of rank 4" for name in ("LoRA", "DoRA")),
        *(f"tune: bottlenecks of {width}" for width in (8, 32)),
    ]
    assert rows[-2:] == ["merge: two tunes on English, their mean", "merge: two tunes on English, a soup"]
