"""Bottleneck adapters: the same model at first, and nothing but adapters is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, with_random_parameters
from zoo.models.frozen import Frozen


def make(pattern="mamba attn/mlp", kind=zoo.CausalLMConfig, **fields):
    config = kind(d_model=8, n_layers=2, vocab_size=16, pattern=pattern, attn=zoo.AttentionConfig(n_heads=2), **fields)
    return with_random_parameters(lambda: zoo.models.build.build(config, rngs=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "kind"), [("mamba attn/mlp", zoo.CausalLMConfig), ("mamba2[head_dim=4]/monarch", zoo.MaskedLMConfig)]
)
def test_a_fresh_one_computes_the_same_and_trains_adapters_alone(pattern, kind):
    model, ids = make(pattern, kind), jnp.arange(10).reshape(2, 5)
    adapted = zoo.add_adapters(model, width=3, rngs=nnx.Rngs(1))
    assert_close(adapted(ids), model(ids))
    names = [".".join(map(str, path)) for path in dict(nnx.to_flat_state(nnx.state(adapted, nnx.Param)))]
    assert names
    assert all(".adapter" in name for name in names)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(adapted, nnx.Param))) == len(names) // 2 * 2 * 3 * 8
    assert model.config.adapter_width is None


@pytest.mark.slow
def test_a_step_moves_nothing_else():
    model, ids = make(), jnp.arange(10).reshape(2, 5)
    adapted = zoo.add_adapters(model, width=3, trained="norm_f.scale", rngs=nnx.Rngs(1))
    graphdef, params, rest = nnx.split(adapted, nnx.Param, ...)
    before = jax.tree.map(np.asarray, nnx.state(adapted, Frozen))
    gradient = jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p, rest)(ids)).sum())(params)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    tuned = nnx.merge(graphdef, optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradient)), rest)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, nnx.state(tuned, Frozen)), before)
    assert float(jnp.abs(tuned(ids) - model(ids)).max()) > 1e-3
    moved = tuned.backbone.norm_f.scale[...] - model.backbone.norm_f.scale[...]
    assert float(jnp.abs(moved).max()) > 0


def test_it_is_saved_and_loaded(tmp_path):
    adapted = with_random_parameters(lambda: zoo.add_adapters(make(), width=3, rngs=nnx.Rngs(1)))
    zoo.save_pretrained(adapted, tmp_path)
    again = zoo.from_pretrained(tmp_path, kind=zoo.CausalLM)
    ids = jnp.arange(10).reshape(2, 5)
    assert again.config.adapter_width == 3
    assert_close(again(ids), adapted(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "adapter_width=0, expected None or at least 1"),
        ({"trained": "nothing"}, "trained"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.add_adapters(make(), rngs=nnx.Rngs(1), **options)


def test_adapters_do_not_lie_upon_each_other():
    adapted = zoo.add_adapters(make(), width=3, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="adapters of width 3 already"):
        zoo.add_adapters(adapted, rngs=nnx.Rngs(1))
