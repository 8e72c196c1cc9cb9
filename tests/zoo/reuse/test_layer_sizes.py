"""Sizes of layers for a time: the best of all that keep to it, and a model that has them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, jitted
from tests.zoo.reuse.models import IDS, causal
from zoo.reuse.compensation import cost, refit
from zoo.reuse.importance import Reader, removals
from zoo.reuse.layer_sizes import least_lost

BATCHES = [{"ids": jnp.asarray(np.random.default_rng(1).integers(0, 11, (16, 12)))}]


def output(model):
    run, params = jitted(model)
    return run(params, IDS)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_within_the_time_loses_less(seed):
    rng = np.random.default_rng(seed)
    sizes = [0, 2, 4, 8]
    times = dict(zip(sizes, sorted(map(float, rng.integers(0, 12, 4))), strict=True))
    lost = [dict(zip(sizes, rng.random(4), strict=True)) for _ in range(4)]
    lost[1].pop(8)
    budget = int(rng.integers(4 * int(times[0]) + 1, 50))
    within = [c for c in itertools.product(*lost) if sum(times[size] for size in c) <= budget]
    best = min(sum(of[size] for of, size in zip(lost, c, strict=True)) for c in within)
    found = least_lost(lost, times, float(budget), ticks=budget)
    assert found in within
    np.testing.assert_allclose(sum(of[size] for of, size in zip(lost, found, strict=True)), best, rtol=1e-12)
    assert least_lost(lost, {size: time * 0.1 for size, time in times.items()}, budget * 0.1) in within


def test_what_is_lost_after_each_is_what_refitting_leaves():
    draw = np.random.default_rng(0).standard_normal
    x, W = draw((200, 6)), draw((6, 3))
    H = x.T @ x / 200
    order, lost = removals([Reader(W, H, np.arange(6), np.arange(6)[:, None])], 6)
    assert sorted(order.tolist()) == list(range(6))
    for n in range(1, 6):
        kept = np.sort(order[n:])
        change = np.array(W)
        change[kept] -= np.asarray(refit(jnp.asarray(W), jnp.asarray(H), kept))
        change = jnp.asarray(change)
        whole = float(cost(jnp.asarray(W), jnp.asarray(H)))
        np.testing.assert_allclose(lost[n], float(cost(change, jnp.asarray(H))) / whole, rtol=1e-3)
    np.testing.assert_allclose((lost[0], lost[6]), (0, 1), atol=1e-3)


def test_layers_that_say_less_get_less_of_the_time(tmp_path):
    """Of the one channel mixer all channels repeat one; what has been chosen is built, saved and loaded."""
    model = nnx.merge(*nnx.split(causal("mamba/mlp mamba/mlp")))
    mlp = model.backbone.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        if (linear := getattr(mlp, name)) is not None:
            linear.kernel[...] = jnp.repeat(linear.kernel[...][:, :1], 8, axis=1)
    times = {n: float(n) for n in (0, 1, 2, 4, 8)}
    sizes = zoo.layer_sizes(model, BATCHES, times=times, budget=9.1)
    assert sizes == (1, 8)
    small = zoo.prune(model, BATCHES, d_ff=sizes)
    assert small.config.pattern == "mamba/mlp[d_ff=1] mamba/mlp[d_ff=8]"
    assert_close(output(small), output(model), tolerance=2e-4)
    zoo.save_pretrained(small, tmp_path)
    assert jnp.array_equal(output(zoo.from_pretrained(tmp_path)), output(small))


@pytest.mark.slow
def test_a_channel_mixer_of_no_channels_is_gone():
    model = causal("mamba/mlp attn/mlp")
    small = zoo.prune(model, BATCHES, d_ff=(0, 4))
    assert (small.config.pattern, small.config.mlp.d_ff) == ("mamba attn/mlp", 4)
    only = zoo.prune(model, BATCHES, d_ff=(0, 8))
    assert_close(output(only), output(zoo.prune(model, BATCHES, d_ff=[0, 8], compensate=False)), tolerance=0.0)
    assert zoo.prune(model, BATCHES, d_ff=(0, 0)).config.pattern == "mamba attn"


def test_sizes_that_cannot_be_are_said():
    model = causal("mamba/mlp")
    with pytest.raises(ValueError, match=r"budget=1, expected at least 6, what the fastest sizes take"):
        least_lost([{1: 0.5}, {1: 0.5}], {1: 3.0}, 1.0)
    with pytest.raises(ValueError, match=r"expected one of at least 0 for each mlp"):
        zoo.prune(model, BATCHES, d_ff=(1, 2))
    with pytest.raises(ValueError, match="9 of 8 units"):
        zoo.prune(causal("mamba/mlp attn/mlp"), BATCHES, d_ff=(9, 2))
    with pytest.raises(ValueError, match="expected a model with dense channel mixers"):
        zoo.layer_sizes(causal("mamba"), BATCHES, times={0: 0.0}, budget=1.0)
