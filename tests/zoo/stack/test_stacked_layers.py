"""Parameters with equal layers in one array each: the same model, and a program that does not grow with its depth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, normal
from zoo.models.frozen import freeze

D_MODEL = 8


def make_model(pattern, n_layers, **options):
    options = {"scan_layers": True, "attn": zoo.AttentionConfig(n_heads=2), "mlp": zoo.MLPConfig(d_ff=12)} | options
    config = zoo.CausalLMConfig(d_model=D_MODEL, n_layers=n_layers, pattern=pattern, vocab_size=16, **options)
    return zoo.CausalLM(config, rngs=nnx.Rngs(0))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("pattern", "n_layers", "stacks", "alone"),
    [
        ("-/mlp", 3, ["0+1+2"], []),
        ("attn", 1, [], [0]),
        ("(-/mlp*2 attn)*2 -/mlp", 7, ["0+1+3+4", "2+5"], [6]),
        ("-/mlp attn/mlp@a", 6, ["0+2+3"], [1]),  # the shared block is there once
        ("attn, first without norm", 3, ["1+2"], [0]),
        ("-/mlp, not in loops", 3, [], [0, 1, 2]),
    ],
)
def test_layers_of_a_loop_are_one_array_and_come_back(pattern, n_layers, stacks, alone):
    pattern, _, variant = pattern.partition(", ")
    model = make_model(pattern, n_layers, first_norm="first" not in variant, scan_layers="not" not in variant)
    params = params_of(model)
    stacked = zoo.stack_layers(params, model)
    assert list(stacked["backbone"].get("stacked_layers", {})) == stacks
    assert list(stacked["backbone"]["layers"]) == alone
    assert_same(zoo.unstack_layers(stacked), params)
    on_host = zoo.unstack_layers(jax.device_get(stacked), split=tuple)
    assert_same(on_host, params)
    assert_same(zoo.stack_like(on_host, stacked), stacked)


def test_an_optimiser_state_is_stacked_and_unstacked_like_the_parameters():
    model = make_model("-/mlp", 3)
    params = params_of(model)
    stacked = zoo.stack_layers(params, model)
    apart, together = ((optax.adam(1.0).init(tree), {"step": 3}) for tree in (params, stacked))
    assert len(jax.tree.leaves(together)) < len(jax.tree.leaves(apart))
    assert_same(zoo.unstack_layers(together), apart)
    assert_same(zoo.stack_like(apart, together), together)


def test_layers_of_which_not_all_are_there_stay_as_they_are():
    model = freeze(make_model("-/mlp", 3), lambda name: "layers.1." in name)
    params = params_of(model)
    assert list(params["backbone"]["layers"]) == [1]
    assert_same(zoo.stack_layers(params, model), params)
    everywhere = freeze(make_model("-/mlp", 3), lambda name: name.endswith("kernel"))
    stacked = zoo.stack_layers(params_of(everywhere), everywhere)
    assert list(stacked["backbone"]["stacked_layers"]) == ["0+1+2"]


@pytest.mark.parametrize("pattern", ["-/mlp", "(-/mlp*2 attn)*2 -/mlp"])
def test_gradients_are_those_of_layers_by_themselves(x64, pattern):
    model = make_model(pattern, 7, dtype="float64", param_dtype="float64")
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    params, ids, out = params_of(model), jnp.arange(6)[None], normal(jax.random.key(1), 1, 6, 16)

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, zoo.unstack_layers(params), rest)(ids) * out)

    apart, together = (jax.jit(jax.grad(loss))(tree) for tree in (params, zoo.stack_layers(params, model)))
    assert_close(zoo.unstack_layers(together), apart, tolerance=1e-5)
