"""Structured linear maps against the dense ones that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
from m2 import reference
from m2.linear import default_n_blocks
from tests.numerics import assert_close, normal, with_random_parameters

KINDS = {"block-diagonal": m2.BlockdiagLinear, "Monarch": m2.MonarchLinear}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def make_linear(kind, d_in, d_out, n_blocks, dtype="float64", use_bias=True):
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    options = {"n_blocks": n_blocks, "use_bias": use_bias} | dtypes
    return with_random_parameters(lambda: KINDS[kind](d_in, d_out, **options, rngs=nnx.Rngs(0)))


def by_hand(kind, params, x, d_out):
    """The dense matrix, cut to the widths; the parameters as a plain dict."""
    if kind == "Monarch":
        dense = reference.monarch_to_dense(params["w1"], params["w2"])
    else:
        dense = reference.strided_to_dense(params["kernel"], len(params["kernel"]))
    y = jnp.einsum("oi,...i->...o", dense[:d_out, : x.shape[-1]], x, precision="highest")
    return y + params["bias"] if "bias" in params else y


def count(module):
    return sum(param.size for param in jax.tree.leaves(nnx.state(module, nnx.Param)))


@every_kind
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out", "n_blocks"), [(6, 9, 3), (10, 7, 4), (5, 5, 1)])
def test_agrees_with_the_dense_map_in_value_and_every_gradient_in_float64(x64, kind, use_bias, d_in, d_out, n_blocks):
    graphdef, params = nnx.split(make_linear(kind, d_in, d_out, n_blocks, use_bias=use_bias))
    x, weight = normal(jax.random.key(1), 2, 3, d_in), normal(jax.random.key(2), 2, 3, d_out)

    def gradients(op):
        def total(params, x):
            y = op(params, x)
            return jnp.sum(y * weight), y

        (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(nnx.to_pure_dict(params), x)
        return y, gradients

    def module(params, x):
        return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))(x)

    y, found = gradients(module)
    expected_y, expected = gradients(lambda params, x: by_hand(kind, params, x, d_out))
    assert ("bias" in found[0]) == use_bias
    assert_close(y, expected_y)
    assert_close(found, expected, gradient=True)


@every_kind
def test_bfloat16_computes_in_bfloat16(kind):
    x = normal(jax.random.key(1), 2, 3, 64)
    y = make_linear(kind, 64, 64, 4, "bfloat16")(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, make_linear(kind, 64, 64, 4, "float32")(x))


@every_kind
def test_without_a_dtype_input_and_parameters_promote(kind):
    linear = KINDS[kind](8, 8, n_blocks=2, rngs=nnx.Rngs(0))
    assert linear(jnp.ones((1, 8), jnp.bfloat16)).dtype == jnp.float32


def test_block_diagonal_parameters_are_the_published_ones():
    linear = nnx.eval_shape(lambda: m2.BlockdiagLinear(768, 3072, n_blocks=4, rngs=nnx.Rngs(0)))
    assert (linear.kernel.shape, linear.bias.shape) == ((4, 768, 192), (3072,))
    uneven = nnx.eval_shape(lambda: m2.BlockdiagLinear(10, 7, n_blocks=4, rngs=nnx.Rngs(0)))
    assert (uneven.kernel.shape, uneven.bias.shape) == ((4, 2, 3), (7,))


@pytest.mark.parametrize(("d_in", "n_blocks", "bound"), [(256, 4, 64**-0.5), (254, 4, 64**-0.5), (256, 1, 256**-0.5)])
def test_block_diagonal_initial_values_are_uniform_within_the_published_bounds(d_in, n_blocks, bound):
    linear = m2.BlockdiagLinear(d_in, 400, n_blocks=n_blocks, rngs=nnx.Rngs(0))
    for param, limit in ((linear.kernel, bound), (linear.bias, 400**-0.5)):
        assert 0.97 * limit < float(jnp.abs(param[...]).max()) <= limit
        assert float(jnp.std(param[...])) == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize(("d_in", "d_out"), [(256, 256), (256, 1024), (1024, 256)])
def test_monarch_initial_values_keep_the_variance(d_in, d_out):
    linear = m2.MonarchLinear(d_in, d_out, rngs=nnx.Rngs(0))
    y = jax.jit(lambda x: linear(x))(normal(jax.random.key(1), 64, d_in))
    assert float(jnp.var(y)) == pytest.approx(1, rel=0.15)


@every_kind
def test_scale_is_on_the_whole_map(kind):
    one, half = (KINDS[kind](8, 8, n_blocks=2, use_bias=False, scale=s, rngs=nnx.Rngs(0)) for s in (1.0, 0.5))
    x = normal(jax.random.key(1), 3, 8)
    assert_close(half(x), one(x) / 2)


@every_kind
def test_the_bias_goes_without_weight_decay(kind):
    params = nnx.to_flat_state(nnx.state(make_linear(kind, 8, 8, 2, "float32")))
    assert {path for path, param in params if param.get_metadata("decay", True) is False} == {("bias",)}


def test_parameters_and_flops_of_monarch_grow_with_the_width_to_the_one_and_a_half():
    def cost(d):
        linear = m2.MonarchLinear(d, d, use_bias=False, rngs=nnx.Rngs(0))
        assert linear.w1.shape == (int(d**0.5),) * 3
        compiled = jax.jit(lambda x: linear(x)).lower(jnp.zeros((1, d))).compile()
        return np.array([count(linear), compiled.cost_analysis()["flops"]])

    assert list(cost(256)) == [2 * 256**1.5, 4 * 256**1.5]
    assert list(cost(1024)) == list(8 * cost(256))


def test_the_middle_of_a_monarch_map_is_as_wide_as_its_smaller_side():
    for d_in, d_out in ((768, 3072), (3072, 768)):
        linear = nnx.eval_shape(lambda d_in=d_in, d_out=d_out: m2.MonarchLinear(d_in, d_out, rngs=nnx.Rngs(0)))
        assert linear.w1.shape == (24, 32, d_in // 24)
        assert linear.w2.shape == (24, d_out // 24, 32)
        assert count(linear) == (d_in + d_out) * 768 // 24 + d_out


@pytest.mark.parametrize(
    ("widths", "n_blocks"),
    [
        ((256, 256), 16),
        ((768, 3072), 24),
        ((3072, 768), 24),
        ((5, 5), 2),
        ((64, 64), 8),
        ((97, 97), 10),
        ((96, 97), 10),
    ],
)
def test_the_number_of_blocks_is_near_the_root(widths, n_blocks):
    assert default_n_blocks(*widths) == n_blocks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m2.BlockdiagLinear(8, 8, n_blocks=0, rngs=nnx.Rngs(0)), "n_blocks=0, expected at least 1"),
        (lambda: m2.BlockdiagLinear(0, 8, n_blocks=2, rngs=nnx.Rngs(0)), "d_in=0, expected at least 1"),
        (lambda: m2.MonarchLinear(8, 0, rngs=nnx.Rngs(0)), "d_out=0, expected at least 1"),
        (lambda: m2.MonarchLinear(8, 8, n_blocks=-1, rngs=nnx.Rngs(0)), "n_blocks=-1, expected at least 1"),
        # 7 would be padded to 8 like any width that is not divisible, if it were not for the check.
        (lambda: m2.BlockdiagLinear(8, 8, n_blocks=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7))), r"\(2, 7\).* d_in=8"),
        (lambda: m2.MonarchLinear(8, 8, n_blocks=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7))), r"\(2, 7\).* d_in=8"),
    ],
)
def test_errors_name_the_argument(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
