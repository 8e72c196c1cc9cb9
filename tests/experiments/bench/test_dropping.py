"""The comparison of encoders that drop positions: the whole of it, at sizes that take a moment."""

import pytest

from experiments.bench import dropping


@pytest.mark.slow
def test_shares_stand_beside_their_operations(run_command):
    status, out, err = run_command(dropping, "--seeds", "0", "--epochs", "1", "--patterns", "attn/mlp")
    assert status == 0, err
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| attn/mlp")]
    assert len(rows) == 2 * len(dropping.SHARES)
    costs = [float(row[0].split("(")[1].split()[0]) for row in rows[: len(dropping.SHARES)]]
    assert costs[0] == 1
    assert costs == sorted(costs, reverse=True)
