"""Students by modules and as a whole: a small comparison, from start to table."""

import pytest

from experiments.bench import modules


@pytest.mark.slow
def test_ways_of_learning_are_compared_over_seeds(run_command):
    status, out, err = run_command(modules, "--seeds", "0", "--steps", "4", "--teacher-steps", "2")
    assert status == 0, err
    rows = [line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "teacher",
        "logits: fresh",
        "logits: the teacher's ends",
        "modules: by hidden, put together",
        "modules: by hidden, then logits",
        "modules: by logits, put together",
        "modules: by logits, then logits",
    ]
