"""The kernel for TPUs, interpreted: the sum over pairs of positions, in value and every gradient."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import m2
import m2.conv
import m2.monarch_dft
from m2 import reference
from tests.numerics import assert_close, normal

NAMES = "u", "k", "bias", "input_gate", "output_gate"


@pytest.fixture
def interpreted(monkeypatch):
    """Finds reads of memory that nothing was written to, and races. Loops are loops, which interpret faster."""
    monkeypatch.setattr("m2.kernels.gated_conv_tpu.UNROLL", 1)
    monkeypatch.setattr(m2.conv, "INTERPRET", pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))


def inputs_for(shape, taps, names=NAMES, dtype=jnp.float32):
    _, l, d = shape
    shapes = {"k": (d, taps), "bias": (d,)}
    keys = dict(zip(NAMES, jax.random.split(jax.random.key(l), 5), strict=True))
    made = {name: normal(keys[name], *shapes.get(name, shape), dtype=jnp.float32) for name in names}
    return {name: x if name in shapes else x.astype(dtype) for name, x in made.items()}


def value_and_gradients(op, inputs):
    weight = normal(jax.random.key(9), *inputs["u"].shape, dtype=jnp.float32)

    def total(inputs):
        y = op(**inputs)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return y, gradients


def agree(inputs, causal):
    half = inputs["u"].dtype == jnp.bfloat16
    run = functools.partial(m2.fft_conv, causal=causal, implementation="pallas")
    y, gradients = value_and_gradients(run, inputs)
    assert y.dtype == inputs["u"].dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = value_and_gradients(functools.partial(reference.fft_conv, causal=causal), wide)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    tolerance = 2**-8 if half else None  # of numbers that are rounded to 8 bits behind the kernel
    assert_close(cast(y), expected[0], tolerance=tolerance)
    for name, gradient in cast(gradients).items():
        assert_close(gradient, expected[1][name], gradient=True, tolerance=tolerance, name=name)


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_matrix(causal, interpreted):
    """Two programs along the channels, rows of the batch side by side in each; no length or width fills a tile."""
    agree(inputs_for((2, 21, 130), 21 if causal else 42), causal)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_two_matrices(dtype, interpreted, monkeypatch):
    monkeypatch.setattr(m2.monarch_dft, "ORDER_1_LIMIT", 32)
    monkeypatch.setattr(m2.conv, "monarch_size", lambda least: 64)
    monkeypatch.setattr("m2.kernels.gated_conv_tpu.POSITIONS", 1)  # a program for each row
    agree(inputs_for((2, 27, 3), 27, dtype=dtype), True)


@pytest.mark.parametrize(
    "names",
    [("u", "k"), *(pytest.param(("u", "k", *more), marks=pytest.mark.slow) for more in (NAMES[2:4], NAMES[4:]))],
)
def test_gates_and_bias_are_optional(names, interpreted):
    agree(inputs_for((1, 9, 2), 9, names), True)


def test_other_platforms_take_their_own_way():
    inputs = inputs_for((1, 12, 2), 12)
    run = functools.partial(m2.fft_conv, implementation="pallas")
    assert_close(run(**inputs), m2.fft_conv(**inputs))
    lowered = jax.jit(run).trace(**inputs)
    assert "tpu_custom_call" in lowered.lower(lowering_platforms=("tpu",)).as_text()
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in lowered.lower(lowering_platforms=(platform,)).as_text()


def test_what_the_kernel_does_not_have(unchecked, x64):
    u, k = jnp.zeros((1, 4, 2), jnp.float32), jnp.zeros((2, 4), jnp.float32)
    long = jax.ShapeDtypeStruct((1, 20_000, 2), jnp.float32), jax.ShapeDtypeStruct((2, 20_000), jnp.float32)
    run = functools.partial(m2.fft_conv, implementation="pallas")
    for words, call in (
        ("segment_ids", lambda: run(u, k, segment_ids=jnp.zeros((1, 4), int))),
        ("bandwidth=0.5", lambda: run(u, k, bandwidth=0.5)),
        ("float64", lambda: run(u.astype(jnp.float64), k)),
        ("20000 positions and a filter of 20000 taps a side", lambda: jax.eval_shape(run, *long)),
    ):
        with pytest.raises(NotImplementedError, match=f"implementation='pallas' with {words}"):
            call()
