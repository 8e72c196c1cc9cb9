"""The machine's ceilings and each operation's share of its own, at sizes that take a moment."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import limits


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, limits)


def test_every_ceiling_is_measured_and_each_operation_has_a_share(tmp_path, run):
    path = tmp_path / "out.json"
    status, out, err = run("--quick", "--rounds", 1, "--only", "monarch", "selective", "--json", path)
    assert status == 0, err
    figures = json.loads(path.read_text())["figures"]
    assert {figure["ceiling"] for figure in figures if "ceiling" in figure} == {*limits.PARTS}
    assert all(figure["per_second"] > 0 for figure in figures if "ceiling" in figure)
    shares = [figure for figure in figures if "share" in figure]
    assert [figure["operation"] for figure in shares] == ["monarch_matmul", "monarch_matmul", "selective_scan"]
    assert all(figure["share"] > 0 and figure["by"] in limits.PARTS for figure in shares)
    assert len([line for line in out.splitlines() if line.startswith(("| monarch", "| selective"))]) == 3


def test_the_limit_is_the_part_that_takes_longest():
    counts, reached = {"product": 4e9, "exp": 1e9, "bytes": 1e9}, {"product": 1e9, "exp": 1e9, "bytes": 8e9, "fft": 1.0}
    assert limits.limit(counts, reached) == ("product", 4e3)


@pytest.mark.parametrize("quick", [True, False])
def test_counts_are_of_known_parts(quick):
    for operation in limits.operations(quick):
        assert {*operation.counts} <= {*limits.PARTS}
        assert all(amount > 0 for amount in operation.counts.values())


def test_products_are_counted_as_the_compiler_counts_them():
    l, h, p = 64, 2, 16
    both_ways = limits._attention(l, h, p, False).counts["product"]
    dense = lambda q, k, v: jnp.einsum("hls,hsp->hlp", jnp.einsum("hlp,hsp->hls", q, k), v)  # noqa: E731
    arrays = [jnp.zeros((h, l, p)) for _ in range(3)]
    assert jax.jit(dense).lower(*arrays).cost_analysis()["flops"] == pytest.approx(both_ways)
    causal = limits._attention(l, h, p, True).counts["product"]
    assert causal / both_ways == pytest.approx((l + 1) / (2 * l))


def test_exponentials_that_follow_each_other_stay_finite():
    x = limits._repeated_exp(jnp.linspace(-4, 0, 9), 50)
    assert np.all(np.isfinite(x))


def test_an_unknown_operation_is_one_line(run):
    status, _, err = run("--only", "nothing")
    assert status
    assert "--only nothing matches none of: attention, causal" in err
