"""The Monarch channel mixer against its formula, and which channels see which."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import zoo
from m2 import reference
from m2.mlp import ACTIVATIONS
from tests.numerics import assert_close, normal, with_random_parameters

FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_by_erf_in_float32_and_keeps_its_tail_below(dtype):
    x = jnp.asarray([-3.0, -2.0, -0.5, 0.0, 1.0, 4.0], dtype)
    assert_close(ACTIVATIONS["gelu"](x), jnp.asarray([FORMULAS["gelu"](float(v)) for v in x], dtype))
    tail = ACTIVATIONS["gelu"](x[0]).astype(float)
    np.testing.assert_allclose(tail, FORMULAS["gelu"](-3.0), rtol=1e-4 if dtype == jnp.float32 else 3e-2)
    program = str(jax.make_jaxpr(ACTIVATIONS["gelu"])(x))
    assert ("erfc" in program) == (dtype == jnp.bfloat16)


def make_mlp(dtype="float64", d_model=8, **options):
    config = m2.MonarchMLPConfig(**({"d_ff": 12} | options))
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    return with_random_parameters(lambda: m2.MonarchMLP(d_model, config, **dtypes, rngs=nnx.Rngs(0)))


def dense(linear):
    """The dense matrix of a structured linear map, cut to its widths."""
    if isinstance(linear, m2.MonarchLinear):
        matrix = reference.monarch_to_dense(linear.w1[...], linear.w2[...])
    else:
        matrix = reference.strided_to_dense(linear.kernel[...], len(linear.kernel))
    return np.asarray(matrix)[: linear.d_out, : linear.d_in]


@pytest.mark.parametrize("activation", list(FORMULAS))
def test_gated_multiplies_the_activated_first_half_with_the_second(x64, activation):
    mlp, x = make_mlp(activation=activation), normal(jax.random.key(1), 2, 3, 8)
    both = np.asarray(x) @ dense(mlp.gated_layers).T
    hidden = np.vectorize(FORMULAS[activation])(both[..., :12]) * both[..., 12:]
    assert_close(mlp(x), hidden @ dense(mlp.wo).T + np.asarray(mlp.wo.bias[...]))


@pytest.mark.parametrize(
    "options", [{}, {"n_blocks": 1}, {"n_blocks": 3}, {"order": 2}, {"order": 2, "n_blocks": None}, {"bias": False}]
)
def test_plain_activates_the_hidden_layer(x64, options):
    mlp, x = make_mlp(gated=False, **options), normal(jax.random.key(1), 2, 3, 8)
    assert mlp.gated_layers.bias is None
    hidden = np.vectorize(FORMULAS["gelu"])(np.asarray(x) @ dense(mlp.gated_layers).T)
    bias = np.asarray(mlp.wo.bias[...]) if options.get("bias", True) else 0
    assert_close(mlp(x), hidden @ dense(mlp.wo).T + bias)


def dependence(mlp, blocks=4):
    """For each piece of the output the set of pieces of the input that it depends on."""
    x = normal(jax.random.key(1), 1, 1, mlp.wo.d_out)
    jacobian = np.abs(jax.jacobian(lambda x: mlp(x))(x)[0, 0, :, 0, 0])
    width = len(jacobian) // blocks
    pieces = jacobian.reshape(blocks, width, blocks, width).max((1, 3)) > 1e-12
    return [set(np.flatnonzero(row)) for row in pieces]


@pytest.mark.slow
def test_four_gated_blocks_see_two_blocks_each_and_two_factors_see_all(x64):
    assert dependence(make_mlp(d_ff=16)) == [{0, 2}, {0, 2}, {1, 3}, {1, 3}]
    assert dependence(make_mlp(d_ff=16, gated=False)) == [{0}, {1}, {2}, {3}]
    assert dependence(make_mlp(d_ff=32, order=2, d_model=16)) == [{0, 1, 2, 3}] * 4


def test_parameters_are_the_published_ones_of_m2_bert():
    mlp = nnx.eval_shape(lambda: m2.MonarchMLP(768, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): param.shape for path, param in nnx.to_flat_state(nnx.state(mlp, nnx.Param))}
    assert shapes == {"gated_layers.kernel": (4, 1536, 192), "wo.kernel": (4, 192, 768), "wo.bias": (768,)}
    norm = 2 * 768  # which the block around it owns
    assert sum(math.prod(shape) for shape in shapes.values()) + norm == 1_771_776


def test_residual_scale_is_on_the_output_projection():
    def make(scale):
        return m2.MonarchMLP(8, m2.MonarchMLPConfig(), residual_scale=scale, rngs=nnx.Rngs(0))

    one, half = make(1.0), make(0.5)
    assert_close(half.wo.kernel[...], one.wo.kernel[...] / 2)
    assert_close(half.gated_layers.kernel[...], one.gated_layers.kernel[...])


def test_dropout_is_on_the_hidden_layer_and_only_with_rngs(x64):
    mlp, plain = make_mlp(dropout=0.5), make_mlp()
    x = normal(jax.random.key(1), 2, 3, 8)
    assert_close(mlp(x), plain(x))
    assert_close(plain(x, rngs=nnx.Rngs(dropout=0)), plain(x))
    dropped = mlp(x, rngs=nnx.Rngs(dropout=0))
    keep = np.asarray(mlp.dropout(jnp.ones((2, 3, 12)), deterministic=False, rngs=nnx.Rngs(dropout=0)))
    assert set(np.unique(keep)) == {0.0, 2.0}
    first, second = jnp.split(mlp.gated_layers(x), 2, axis=-1)
    hidden = np.asarray(ACTIVATIONS["gelu"](first) * second) * keep
    assert_close(dropped, hidden @ dense(mlp.wo).T + np.asarray(mlp.wo.bias[...]))


def test_bfloat16_computes_in_bfloat16():
    x = normal(jax.random.key(1), 2, 3, 32)
    y = make_mlp("bfloat16", 32, d_ff=64)(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, make_mlp("float32", 32, d_ff=64)(x))


def test_the_dense_channel_mixer_has_the_same_activations():
    assert set(FORMULAS) == set(ACTIVATIONS)
    for activation in ACTIVATIONS:
        zoo.MLPConfig(activation=activation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_ff": 0}, "d_ff=0, expected None or at least 1"),
        ({"order": 3}, "order=3, expected 1 or 2"),
        ({"n_blocks": None}, "n_blocks=None, expected at least 1 at order 1"),
        ({"n_blocks": 0}, "n_blocks=0, expected at least 1"),
        ({"activation": "gellu"}, "activation='gellu', expected one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
    ],
)
def test_config_errors_name_the_option(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        m2.MonarchMLPConfig(**options)


def test_an_input_of_another_width_is_an_error(unchecked):
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 7\), expected \(\.\.\., d_in\) with d_in=8"):
        make_mlp("float32")(jnp.ones((2, 3, 7)))
