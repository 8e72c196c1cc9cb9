"""Comparisons of options of training: a small one of each part, from start to table."""

import pytest

from experiments.bench import in_training


@pytest.mark.slow
def test_parts_are_compared_over_seeds(run_command):
    status, out, err = run_command(in_training, "--seeds", "0", "1", "--steps", "2", "--parts", "shared", "decoder")
    assert status == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [
        "shared: four blocks",
        "shared: one block",
        "shared: one block, norms of each depth",
        "decoder: two blocks",
        "decoder: two blocks, two above in training",
        "decoder: four blocks",
    ]
    assert all(" ± " in row for row in rows[2:])
