"""The convolution of a few taps over an image against its reference and the framework's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from ssm import reference
from ssm.conv2d import DepthwiseConv2d
from tests.numerics import assert_close, normal


def make_inputs(m, n, *, grid=(3, 4), b=2, e=5):
    keys = jax.random.split(jax.random.key(0), 3)
    return {"x": normal(keys[0], b, *grid, e), "weight": normal(keys[1], m, n, e), "bias": normal(keys[2], e)}


def value_and_gradients(function, inputs):
    weight = normal(jax.random.key(8), *inputs["x"].shape)

    def total(inputs):
        y = function(**inputs)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return y, gradients


@pytest.mark.parametrize(("m", "n", "grid"), [(3, 3, (3, 4)), (1, 2, (2, 1)), (4, 5, (2, 3)), (3, 3, (1, 1))])
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_its_reference(x64, m, n, grid, bias):
    inputs = make_inputs(m, n, grid=grid)
    inputs = inputs if bias else inputs | {"bias": None}
    expected = value_and_gradients(reference.depthwise_conv2d, inputs)
    assert_close(value_and_gradients(ssm.depthwise_conv2d, inputs), expected)


@pytest.mark.parametrize("taps", [2, 3])
def test_is_flax_s_convolution(x64, taps):
    conv = DepthwiseConv2d(5, taps, use_bias=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    conv.bias[...] = normal(jax.random.key(2), 5)
    theirs = nnx.Conv(5, 5, (taps, taps), feature_group_count=5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    nnx.update(theirs, nnx.state(conv))
    x = make_inputs(taps, taps)["x"]
    assert_close(conv(x), theirs(x))


def test_half_precision_is_added_up_in_float32():
    inputs = {name: a.astype(jnp.bfloat16) for name, a in make_inputs(3, 3).items()}
    y = ssm.depthwise_conv2d(**inputs)
    exact = reference.depthwise_conv2d(**{name: a.astype(jnp.float32) for name, a in inputs.items()})
    assert y.dtype == jnp.bfloat16
    assert np.array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("weight", (3, 3, 4), r"weight has shape \(3, 3, 4\)"), ("bias", (4,), r"bias has shape \(4,\)")],
)
def test_mistakes_name_the_argument(unchecked, name, shape, message):
    with pytest.raises(ValueError, match=message):
        ssm.depthwise_conv2d(**make_inputs(3, 3) | {name: jnp.zeros(shape)})
