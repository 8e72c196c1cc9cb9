"""Projections and convolutions of parts that lie side by side, where nothing is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm.tensor_cut
from ssm.conv import DepthwiseConv
from tests.places import ROOT


def test_parts_are_those_of_the_whole_projection():
    linear = nnx.Linear(3, 9, rngs=nnx.Rngs(0))
    x, scale = jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.arange(9.0)
    one, (others,) = ssm.tensor_cut.project(linear, x, [(2, 1), ((4, 2), (3, 1))], scale)
    np.testing.assert_array_equal(jnp.concatenate([one, others], axis=-1), linear(x) * scale)
    conv = DepthwiseConv(7, 4, use_bias=True, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
    parts, after = ssm.tensor_cut.convolve(conv, (others,), None, [(4, 2), (3, 1)])
    assert [part.shape[-1] for part in parts] == [4, 3]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=-1), conv(others)[0])
    np.testing.assert_array_equal(after, conv(others)[1])


def test_a_convolution_takes_the_weights_of_some_channels():
    conv = DepthwiseConv(7, 4, use_bias=True, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    some = conv(x[..., 2:6], weights=(conv.kernel[2:6], conv.bias[2:6]))
    for got, whole in zip(some, conv(x), strict=True):
        np.testing.assert_array_equal(got, whole[..., 2:6])


@pytest.mark.parametrize("name", ["apart", "tensor_cut"])
def test_both_packages_have_the_same(name):
    assert (ROOT / "ssm" / f"{name}.py").read_text() == (ROOT / "m2" / f"{name}.py").read_text()
