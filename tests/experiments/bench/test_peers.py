"""The comparison with other packages as a user runs it: rows, ratios, what is missing, what differs."""

import functools
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import contenders, cores, peer_operations, peers
from experiments.bench.pairs import Pair, Row, disagreement

TINY = ("--quick", "--rounds", 2)


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, peers)


def test_a_line_for_each_pass_a_picture_and_a_record(tmp_path, run):
    record, picture = tmp_path / "out.json", tmp_path / "out.png"
    status, out, err = run(*TINY, "--only", "jax, dense", "--json", record, "--plot", picture)
    assert status == 0, err
    figures = json.loads(record.read_text())["figures"]
    assert [(figure["what"], figure["pass"]) for figure in figures] == [("monarch", "forward"), ("monarch", "backward")]
    assert all(len(figure["rounds"]) == len(figure["peer_rounds"]) == 2 for figure in figures)
    assert all(figure["low"] <= figure["ratio"] <= figure["high"] for figure in figures)
    rows = [line for line in out.splitlines() if line.startswith("| monarch")]
    assert len(rows) == 2
    assert {row.count("|") for row in rows} == {10}
    assert picture.stat().st_size > 0


def test_a_missing_peer_is_named_and_the_others_are_timed(run, monkeypatch):
    found = contenders.importlib.util.find_spec
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    status, out, err = run(*TINY, "--only", "monarch", "--passes", "forward")
    assert status == 0, err
    assert "not timed: monarch (4,8,6)(4,8,8), torch bmm: pip install torch" in out
    assert len([line for line in out.splitlines() if line.startswith("| monarch")]) == 1


@pytest.mark.parametrize(("theirs", "status"), [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_results_that_should_be_the_same_and_are_not_end_in_status_1(theirs, status, run, monkeypatch):
    def build():
        ours = lambda: (jnp.ones(3), jnp.zeros(2))  # noqa: E731
        return Pair({"prefill": ours}, {"prefill": lambda: np.ones(3)}, {"prefill": lambda y: [theirs * y]})

    monkeypatch.setattr(peers, "chosen_rows", lambda config: [Row("thing", "l=3", "other", build)])
    ended, out, _ = run("--rounds", 1)
    assert ended == status
    assert ("thing l=3, other, prefill: results differ by" in out) == bool(status)


def test_the_ratio_is_the_median_of_the_rounds_that_both_took():
    row = Row("thing", "l=3", "other", lambda: Pair({}, {}))
    figure = peers.figure_of(row, "decode", [[1.0, 2.0, 4.0, 100.0], [2.0, 2.0, 2.0]], None)
    assert (figure["ratio"], figure["low"], figure["high"]) == (1.0, 0.5, 2.0)
    assert (figure["ms"], figure["peer_ms"]) == (3.0, 2.0)


def test_disagreement_is_of_the_worst_array_and_ours_may_go_on():
    ours = (np.full(4, 2.0), np.full(4, 3.0), np.zeros(1))
    assert disagreement(ours, [np.full(4, 2.0), np.full(4, 3.3)]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="are to be compared"):
        disagreement(ours, [np.zeros(3)])


def test_every_row_has_a_name_of_its_own():
    for quick in (True, False):
        names = [row.name for row in peers.chosen_rows(peers.Config(quick=quick))]
        assert len(names) == len({*names})
        assert len(names) > 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "rounds=0, expected at least 1"),
        (("--threads", 100_000), "threads=100000, expected 1 to"),
        (("--only", "nothing"), "--only nothing matches none of: attention"),
        (("--passes", "sideways"), "passes=['sideways'], expected some of forward"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err


def test_factors_that_do_not_fit_are_refused():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"expected 4 \* 8 = 4 \* 7"):
        peer_operations.monarch((4, 8, 6), (4, 8, 7), 16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds no process to cores")
def test_the_cores_are_given_back():
    before = os.sched_getaffinity(0)
    with cores.use_cores(1):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
def test_all_of_it_runs_where_the_peers_are_installed_and_gives_the_same_numbers(run):
    for package in ("torch", "transformers", "timm", "mambapy"):
        pytest.importorskip(package)
    status, out, err = run("--quick", "--rounds", 1)
    assert status == 0, err + out
    assert out.count("| forward ") > 10
