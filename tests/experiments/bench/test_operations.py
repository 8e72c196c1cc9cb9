"""The benchmark as a user runs it, at sizes that take a moment: each contender of ours, peers where installed."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import contenders, masked_lm, models, monarch, operations, turns
from experiments.bench.contenders import Missing, Sizes
from tests.numerics import assert_close

TINY = ("--lengths", "16", "--d-model", "32", "--d-state", "4", "--vocab-size", "16", "--tokens", "2", "--rounds", "1")
SIZES = Sizes(batch=1, length=16, d_model=32, d_inner=64, d_state=4, layers=1, vocab_size=16, tokens=2)


@pytest.fixture
def run(run_command):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, bench)


def test_a_row_for_each_pass_and_a_record_of_every_time(tmp_path, run):
    path = tmp_path / "out.json"
    status, out, err = run("mamba2", *TINY, "--only", "zoo", "--json", path)
    assert status == 0, err
    record = json.loads(path.read_text())
    assert [figure["pass"] for figure in record["figures"]] == list(contenders.PASSES.values())
    assert all(len(figure["ms"]) == 1 and figure["ms"][0] > 0 for figure in record["figures"])
    assert record["versions"]["jax"] == jax.__version__
    assert record["hardware"] in out
    rows = [line for line in out.splitlines() if line.startswith("| mamba")]
    assert len(rows) == 3
    assert {row.count("|") for row in rows} == {9}
    assert [bool(row.split("|")[8].strip()) for row in rows] == [True, True, False]  # decoding is many calls
    assert [bool(figure["memory_bytes"]) for figure in record["figures"]] == [True, True, False]
    assert all(row.split("|")[6].strip() == "1.00" for row in rows)


def test_each_of_our_models_runs(run):
    status, out, err = run("mamba", "mamba3", *TINY, "--only", "zoo", "--passes", "forward")
    assert status == 0, err
    assert [out.count(f"| zoo.CausalLM {name} ") for name in ("mamba", "mamba3", "mamba3 mimo")] == [1, 2, 1]


def test_decoding_is_timed_once_and_scans_have_none(run):
    arguments = (
        "scan",
        "mamba",
        *TINY,
        "--only",
        "sequential",
        "zoo",
        "--lengths",
        8,
        16,
        "--passes",
        "decode",
        "forward",
    )
    status, out, err = run(*arguments)
    assert status == 0, err
    assert out.count("decode, a token") == 1
    assert out.count("| forward") == 4


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch, run):
    find_spec = importlib.util.find_spec
    hidden = {"torch", "mambapy", "transformers", "mamba2_jax", "mamba3_jax"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name))
    status, out, err = run("mamba2", *TINY, "--passes", "decode")
    assert status == 0, err
    assert out.count("| mamba2 ") == 1
    assert "not timed: mamba2-jax, chunk 64: pip install mamba2-jax\n" in out
    assert "transformers, chunk 64: pip install torch transformers\n" in out


@pytest.mark.slow
def test_monarch_mixer_and_what_it_replaces_over_lengths(tmp_path, run):
    picture = tmp_path / "speed.png"
    arguments = ("--only", "zoo", "Monarch", "--lengths", 8, 16, "--passes", "forward", "--plot", picture)
    status, out, err = run("mlp", "bert", *TINY, *arguments)
    assert status == 0, err
    assert out.count("| mlp ") == 6
    assert out.count("| bert ") == 4
    assert out.count("\nbert, forward: zoo.MaskedLM m2/monarch is ") == 1
    assert picture.stat().st_size > 0


def test_each_convolution_is_the_same_one():
    ours, by_monarch, naive, _ = monarch.CONTENDERS["conv"].values()
    expected = naive(SIZES)
    for contender in (ours, by_monarch):
        for which, call in contender(SIZES).items():
            assert_close(call(), expected[which](), gradient=which == "backward")


@pytest.mark.slow
def test_the_head_at_every_position_costs_more_and_gives_the_same():
    contenders = masked_lm.CONTENDERS["mlm"]
    gathered, everywhere = (contenders[name](SIZES) for name in ("attn/mlp", "attn/mlp, all logits"))
    for which, call in gathered.items():
        assert_close(call(), everywhere[which](), gradient=which == "backward")


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ((1, 1, 1), "faster than theirs from 8 on"),
        ((1, 3, 1), "faster than theirs from 32 on"),
        ((3, 1, 3), "slower than theirs at 32"),
    ],
)
def test_crossover(theirs, says):
    figures = [
        {"what": "bert", "pass": "forward", "contender": name, "length": length, "tokens_per_second": speed}
        for name, speeds in (("ours", (2, 2, 2)), ("theirs", theirs))
        for length, speed in zip((8, 16, 32), speeds, strict=True)
    ]
    assert operations.crossovers(figures) == [f"bert, forward: ours is {says}"]
    assert operations.crossovers(figures[:1] + figures[3:4]) == []


GROUPS = {**models.CONTENDERS, **monarch.CONTENDERS}
OURS = ("zoo", "m2", "jax.numpy")
PEERS = [(what, name) for what, group in GROUPS.items() for name in group if not name.startswith(OURS)]


@pytest.mark.slow  # imports PyTorch, and compiles as many models as there are peers
@pytest.mark.parametrize(("what", "name"), PEERS, ids=[f"{what} {name}" for what, name in PEERS])
def test_peers_run_where_they_are_installed(what, name):
    try:
        calls = GROUPS[what][name](SIZES)
    except Missing as reason:
        pytest.skip(str(reason))
    for which, call in calls.items():
        assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(call()))
        assert which == "decode" or call.memory() > 0


def test_decoding_goes_on_from_the_prompt():
    ids = models.make_ids(SIZES)[:, : SIZES.tokens]
    decode = models.CONTENDERS["mamba2"]["zoo.CausalLM mamba2"](SIZES)["decode"]
    whole = models.our_model(SIZES, "mamba2")(jnp.asarray(np.tile(ids, 2)))
    assert_close(decode()[:, 0], whole[:, -1])


def test_a_result_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="broken"):
        turns.time_in_turns({"broken": lambda: np.array([np.nan])}, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "rounds=0, expected at least 1"),
        (("--lengths", 0), "lengths=(0,), expected at least one length, of at least 1"),
        (("mamba2", "--d-model", 24), "head_dim"),
        (("--only", "nothing"), "--only nothing matches none of: ssm.selective_scan sequential"),
        (("mamba4",), "unknown bench 'mamba4', did you mean 'mamba"),
        (("depths",), "unknown bench 'depths', did you mean 'depth'"),
        (("scan", "mamba4"), "invalid choice"),
        (("conv", "--plot", "out.png"), "plot=out.png, expected more than one length"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err


def test_the_help_shows_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "python -m experiments.bench mamba2 mamba3" in out
    assert "--passes" in out


@pytest.mark.parametrize("name", ["vision", "decode", "depth", "length", "recall"])
def test_every_bench_is_reached_by_its_name(name, run):
    status, out, _ = run(name, "--help")
    assert status == 0
    assert f"python -m experiments.bench {name}" in out


def test_bench_prints_a_row_for_each_contender(tmp_path, run):
    arguments = ("--lengths", 32, "--d-inner", 8, "--rounds", 1, "--only", "ssm", "--json", tmp_path / "out.json")
    status, out, err = run("scan", *arguments)
    assert status == 0, err
    assert out.count("ssm.selective_scan") == 4
    assert len(json.loads((tmp_path / "out.json").read_text())["figures"]) == 4
