"""The dense channel mixers against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, normal, with_random_parameters

FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
}


def make_mlp(dtype="float64", **options):
    config = zoo.MLPConfig(**({"d_ff": 7, "bias": True} | options))
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    return with_random_parameters(lambda: zoo.MLP(5, config, **dtypes, rngs=nnx.Rngs(0)))


def apply(linear, x):
    return x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])


@pytest.mark.parametrize("activation", list(FORMULAS))
def test_gated_multiplies_the_activated_gate_with_the_up_projection(x64, activation):
    mlp, x = make_mlp(activation=activation), normal(jax.random.key(1), 2, 3, 5)
    act = np.vectorize(FORMULAS[activation])
    hidden = act(apply(mlp.gate_proj, np.asarray(x))) * apply(mlp.up_proj, np.asarray(x))
    assert_close(mlp(x), apply(mlp.down_proj, hidden))


def test_plain_activates_the_up_projection(x64):
    mlp, x = make_mlp(gated=False, activation="gelu"), normal(jax.random.key(1), 2, 3, 5)
    assert mlp.gate_proj is None
    hidden = np.vectorize(FORMULAS["gelu"])(apply(mlp.up_proj, np.asarray(x)))
    assert_close(mlp(x), apply(mlp.down_proj, hidden))


def test_multipliers_are_those_of_the_gate_and_of_the_output(x64):
    mlp, x = make_mlp(gate_multiplier=0.7, out_multiplier=1.3), normal(jax.random.key(1), 2, 3, 5)
    act = np.vectorize(FORMULAS["silu"])
    hidden = act(0.7 * apply(mlp.gate_proj, np.asarray(x))) * apply(mlp.up_proj, np.asarray(x))
    assert_close(mlp(x), 1.3 * apply(mlp.down_proj, hidden))


def test_bfloat16_computes_in_bfloat16():
    x = normal(jax.random.key(1), 2, 3, 5)
    y = make_mlp("bfloat16")(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, make_mlp("float32")(x))


@pytest.mark.parametrize(
    ("d_model", "options", "d_ff"),
    [
        (128, {}, 352),  # 341.3, rounded up to a multiple of 16
        (48, {}, 128),
        (128, {"gated": False}, 512),
        (128, {"d_ff": 100}, 100),
    ],
)
def test_hidden_width(d_model, options, d_ff):
    mlp = nnx.eval_shape(lambda: zoo.MLP(d_model, zoo.MLPConfig(**options), rngs=nnx.Rngs(0)))
    shapes = {name[0]: param.shape for name, param in nnx.to_flat_state(nnx.state(mlp))}
    gate = {} if mlp.gate_proj is None else {"gate_proj": (d_model, d_ff)}
    assert shapes == {"up_proj": (d_model, d_ff), "down_proj": (d_ff, d_model)} | gate


def test_biases_go_without_weight_decay():
    params = nnx.to_flat_state(nnx.state(make_mlp("float32")))
    without = {path for path, param in params if param.get_metadata("decay", True) is False}
    assert without == {(name, "bias") for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize(
    ("options", "biases"),
    [
        ({"bias": False}, set()),
        ({"bias": False, "out_bias": True}, {"down_proj"}),
        ({"bias": True, "out_bias": False}, {"gate_proj", "up_proj"}),
        ({"bias": False, "out_bias": True, "gated": False}, {"down_proj"}),
    ],
)
def test_the_output_may_have_a_bias_of_its_own(options, biases):
    params = nnx.to_flat_state(nnx.state(make_mlp("float32", **options)))
    assert {path[0] for path, _ in params if path[-1] == "bias"} == biases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation": "sillu"},
            "unknown activation 'sillu', did you mean 'silu'\\? Known: gelu, gelu_tanh, quick_gelu",
        ),
        ({"d_ff": 0}, "d_ff=0, expected None or at least 1"),
    ],
)
def test_config_errors_name_the_option(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.MLPConfig(**options)


def test_a_series_of_one_more_term_begins_as_the_activation_itself(x64):
    x = normal(jax.random.key(1), 2, 3, 5)
    one, two = (zoo.MLP(5, zoo.MLPConfig(d_ff=7, series=n), param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for n in (1, 2))
    assert one.terms is None
    assert_close(two(x), one(x))
    slopes = nnx.grad(lambda mlp: mlp(x).sum())(two)
    assert (np.asarray(slopes.terms.scale[...])[1] != 0).all()


@pytest.mark.parametrize("gated", [True, False])
def test_a_series_adds_what_its_terms_give(gated, x64):
    mlp, x = make_mlp(series=3, gated=gated, activation="gelu"), normal(jax.random.key(1), 2, 3, 5)
    act, (a, b) = np.vectorize(FORMULAS["gelu"]), (np.asarray(p[...]) for p in (mlp.terms.scale, mlp.terms.shift))
    up = apply(mlp.up_proj, np.asarray(x))
    inside = apply(mlp.gate_proj, np.asarray(x)) if gated else up
    hidden = sum(act(a[i] * inside + b[i]) for i in range(3)) * (up if gated else 1)
    assert_close(mlp(x), apply(mlp.down_proj, hidden))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series": 0}, "series=0, expected at least 1"),
        ({"series": 2, "activation": "relu"}, "activation='relu' with 2 terms, expected one that has a slope at 0"),
    ],
)
def test_series_that_cannot_be(options, message, x64):
    with pytest.raises(ValueError, match=message):
        make_mlp(**options)
