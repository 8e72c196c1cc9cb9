"""The long convolution over an image is the sum over pairs of places, in value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2
import m2.conv
from m2 import reference
from m2.conv2d import direct_conv2d
from tests.numerics import assert_close, normal


def inputs_for(grid, taps=None, *, d=2, b=2, gated=True, dtype=None):
    keys = jax.random.split(jax.random.key(sum(grid)), 5)
    taps = taps or (2 * grid[0], 2 * grid[1])
    inputs = {
        "u": normal(keys[0], b, *grid, d, dtype=dtype),
        "k": normal(keys[1], d, *taps, dtype=dtype),
        "bias": normal(keys[2], d, dtype=dtype),
    }
    if gated:
        for name, key in (("input_gate", keys[3]), ("output_gate", keys[4])):
            inputs[name] = normal(key, b, *grid, d, dtype=dtype)
    return inputs


def agree(inputs):
    weight = normal(jax.random.key(9), *inputs["u"].shape, dtype=inputs["u"].dtype)
    results = []
    ways = [functools.partial(m2.fft_conv2d, implementation=implementation) for implementation in ("xla", "monarch")]
    for op in (*ways, reference.fft_conv2d):

        def total(inputs, op=op):
            y = op(**inputs)
            return jnp.sum(y * weight), y

        results.append(jax.jit(jax.value_and_grad(total, has_aux=True))(inputs))
    *results, ((_, expected), expected_gradients) = results
    for (_, y), gradients in results:
        assert_close(y, expected, name="value")
        assert_close(gradients, expected_gradients, gradient=True, name="gradient")


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (5, 9), (8, 8)])
def test_fft_conv2d_is_the_sum_over_pairs(grid, x64):
    agree(inputs_for(grid))


@pytest.mark.parametrize("taps", [(2, 6), (40, 4)])
def test_filters_may_be_smaller_or_larger_than_the_image(taps, x64):
    agree(inputs_for((5, 9), taps))


def test_channels_in_blocks(x64, monkeypatch):
    monkeypatch.setattr(m2.conv2d, "BLOCK_BYTES", 1)
    monkeypatch.setattr(m2.conv, "LEAST_BLOCK", 2)
    agree(inputs_for((3, 4), d=5))


def test_large_images_take_real_ffts_on_a_cpu(x64, monkeypatch):
    monkeypatch.setattr(m2.conv2d, "HALF_SIZE_LIMIT", 1)
    agree(inputs_for((3, 4)))


def test_gates_and_bias_are_optional_and_float32_is_near():
    inputs = inputs_for((5, 9), gated=False, dtype=jnp.float32)
    agree(inputs)
    del inputs["bias"]
    agree(inputs)


def test_bfloat16_only_enters_and_leaves():
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs_for((5, 9)))
    y = jax.jit(m2.fft_conv2d)(**inputs)
    assert y.dtype == jnp.bfloat16
    expected = jax.jit(reference.fft_conv2d)(**jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
    assert_close(y.astype(jnp.float32), expected, tolerance=2**-9)  # half of a unit in the eighth bit


def test_an_image_of_one_row_is_the_convolution_both_ways(x64):
    inputs = inputs_for((1, 11))
    row = {name: x[:, 0] for name, x in inputs.items() if x.ndim > 1}
    one_axis = jax.jit(functools.partial(m2.fft_conv, causal=False))
    assert_close(jax.jit(m2.fft_conv2d)(**inputs)[:, 0], one_axis(**row, bias=inputs["bias"]))


def test_filters_that_are_products_convolve_along_one_axis_and_then_the_other(x64):
    u, rows, columns = (normal(jax.random.key(i), *shape) for i, shape in enumerate([(4, 6, 3), (3, 8), (3, 12)]))

    @jax.jit
    def in_turn(u, rows, columns):
        along_columns = m2.fft_conv(u, columns, causal=False)
        return m2.fft_conv(along_columns.swapaxes(0, 1), rows, causal=False).swapaxes(0, 1)

    products = rows[:, :, None] * columns[:, None]
    assert_close(jax.jit(m2.fft_conv2d)(u[None], products)[0], in_turn(u, rows, columns))


def test_backward_keeps_only_the_inputs():
    inputs = inputs_for((8, 8), dtype=jnp.float32)
    _, pull = jax.vjp(lambda inputs: m2.fft_conv2d(**inputs), inputs)
    assert sum(x.nbytes for x in jax.tree.leaves(pull)) <= sum(x.nbytes for x in inputs.values())


def test_cost_is_linear_in_the_places_to_the_log():
    def flops(side):
        arguments = jnp.zeros((1, side, side, 4)), jnp.zeros((4, 2 * side, 2 * side))
        return jax.jit(m2.fft_conv2d).lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(64) / flops(32) <= 4.9  # 4 log(128^2) / log(64^2) = 4.7; the sum over pairs has 16


def test_few_taps_are_those_of_a_centred_convolution(x64):
    u, k = normal(jax.random.key(0), 2, 4, 5, 3), normal(jax.random.key(1), 3, 3, 3)
    expected = jax.lax.conv_general_dilated(
        u, k.transpose(1, 2, 0)[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )  # fmt: skip
    assert_close(direct_conv2d(u, k), expected)
    one = np.zeros((3, 2, 1))
    one[:, 0] = 1  # of two taps, the first is above
    np.testing.assert_array_equal(direct_conv2d(u, jnp.asarray(one))[:, 1:], u[:, :-1])


def test_errors_name_the_argument(unchecked):
    u, k = jnp.zeros((2, 4, 5, 3)), jnp.zeros((3, 8, 10))
    for arguments, words in (
        ({"k": jnp.zeros((4, 8, 10))}, r"k has shape \(4, 8, 10\), expected \(d, m, n\) with d=3"),
        ({"k": jnp.zeros((3, 8, 5))}, "k has 8 x 5 taps, expected even numbers"),
        ({"bias": jnp.zeros(2)}, r"bias has shape \(2,\), expected \(d,\) with d=3"),
        ({"output_gate": jnp.zeros((2, 4, 5, 1))}, "output_gate has shape"),
        ({"u": jnp.zeros((2, 0, 5, 3))}, "expected at least one place"),
        ({"implementation": "cuda"}, "implementation='cuda', expected 'xla', 'monarch' or None"),
    ):
        with pytest.raises(ValueError, match=words):
            m2.fft_conv2d(**({"u": u, "k": k} | arguments))
    with pytest.raises(NotImplementedError, match="implementation='pallas' has one axis"):
        m2.fft_conv2d(u, k, implementation="pallas")
