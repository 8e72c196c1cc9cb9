"""The long convolution: both ways of computing it are the sum over pairs of positions, in value and every gradient."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import m2
import m2.conv
import m2.monarch_dft
from m2 import reference
from tests.numerics import assert_close, make_positions, normal

# Compiling is most of the time that these tests take.
QUICK = {"xla_backend_optimization_level": 0}
LENGTHS = (1, 63, 100, *(pytest.param(length, marks=pytest.mark.slow) for length in (2, 64, 65)))


def inputs_for(length, taps, *, d=2, b=2, gated=True, dtype=None):
    keys = jax.random.split(jax.random.key(length + 1000 * taps), 5)
    inputs = {
        "u": normal(keys[0], b, length, d, dtype=dtype),
        "k": normal(keys[1], d, taps, dtype=dtype),
        "bias": normal(keys[2], d, dtype=dtype),
    }
    if gated:
        for name, key in (("input_gate", keys[3]), ("output_gate", keys[4])):
            inputs[name] = normal(key, b, length, d, dtype=dtype)
    return inputs


def value_and_gradients(op, inputs):
    weight = normal(jax.random.key(9), *inputs["u"].shape, dtype=inputs["u"].dtype)

    def total(inputs):
        y = op(**inputs)
        return jnp.sum((y * weight).astype(jnp.promote_types(y.dtype, jnp.float32))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(inputs)
    return y, gradients


def agree(inputs, **options):
    """Compares with the reference, for each implementation."""
    positions = {name: options.pop(name) for name in ("mask", "segment_ids") if name in options}
    causal = options.get("causal", True)
    expected = value_and_gradients(lambda **x: reference.fft_conv(**x, causal=causal, **positions), inputs)
    for implementation in ("xla", "monarch"):
        op = lambda **x: m2.fft_conv(**x, **positions, **options, implementation=implementation)  # noqa: B023, E731
        actual = value_and_gradients(op, inputs)
        assert_close(actual[0], expected[0], name=f"{implementation} value")
        assert_close(actual[1], expected[1], gradient=True, name=f"{implementation} gradient")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_fft_conv_is_the_sum_over_pairs(length, causal, x64):
    agree(inputs_for(length, length if causal else 2 * length), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [6, 400, *(pytest.param(taps, marks=pytest.mark.slow) for taps in (2, 14))])
def test_filters_may_be_shorter_or_longer_than_the_sequence(taps, causal, x64):
    agree(inputs_for(101, taps), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [31, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 64, 100))])
def test_no_tap_reaches_into_another_document(length, causal, x64):
    agree(
        inputs_for(length, length if causal else 2 * length), causal=causal, **make_positions(length, boundaries=0.05)
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_channels_in_blocks(causal, x64, monkeypatch):
    monkeypatch.setattr(m2.conv, "BLOCK_BYTES", 1)
    monkeypatch.setattr(m2.conv, "LEAST_BLOCK", 2)
    # The last block of 2 starts where it still fits.
    agree(inputs_for(33, 34, d=5), causal=causal, **make_positions(33, boundaries=0.1))


def test_blocks_fill_the_cache_or_bound_temporaries_and_are_about_even():
    def blocks(d, positions, rows=1):
        return m2.conv.Blocks.of(d, rows, positions, jnp.bfloat16, 2**16)

    assert [blocks(768, positions).cpu for positions in (1, 64, 256, 10**6)] == [768, 256, 64, 16]
    assert [blocks(d, 10**6).cpu for d in (1, 8, 17, 46)] == [1, 8, 9, 16]
    assert [blocks(768, 4096, rows).device for rows in (1, 8, 16, 32, 64)] == [768, 768, 384, 256, 128]
    assert [blocks(d, 10**6).device for d in (100, 128, 192, 1000)] == [100, 128, 128, 128]


def test_a_program_takes_the_way_of_the_platform_that_it_is_compiled_for():
    """In both passes: on a CPU half as long complex FFTs for blocks of channels, real ones on a GPU, none on a TPU."""
    u, k = jnp.zeros((1, 512, 40)), jnp.zeros((40, 512))
    traced = jax.jit(jax.grad(lambda u, k: jnp.sum(m2.fft_conv(u, k) ** 2), (0, 1))).trace(u, k)
    ways = {"while": "stablehlo.while", "fft": "type = FFT", "rfft": "type = RFFT", "product": "stablehlo.dot_general"}
    for platform, expected in (("cpu", {"while", "fft"}), ("cuda", {"rfft"}), ("tpu", {"product"})):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert {way for way, word in ways.items() if word in text} == expected, platform


@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_take_real_ffts_on_a_cpu(causal, x64, monkeypatch):
    monkeypatch.setattr(m2.conv, "HALF_SIZE_LIMIT", 1)
    agree(inputs_for(33, 34), causal=causal)


@pytest.mark.slow
def test_documents_and_short_filters_go_together(x64):
    agree(inputs_for(50, 6), causal=False, **make_positions(50, boundaries=0.05))


def small_factors(monkeypatch, order):
    """Makes small DFTs products of as many matrices as those of thousands of positions are."""
    limits = {1: (1 << 10, 1 << 15), 2: (4, 1 << 15), 3: (4, 4)}[order]
    monkeypatch.setattr(m2.monarch_dft, "ORDER_1_LIMIT", limits[0])
    monkeypatch.setattr(m2.monarch_dft, "ORDER_2_LIMIT", limits[1])
    monkeypatch.setattr(m2.monarch_dft, "ROWS", 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_monarch_of_several_factors(order, causal, x64, monkeypatch):
    small_factors(monkeypatch, order)
    agree(inputs_for(97, 97 if causal else 194), causal=causal)


def test_gates_and_bias_are_optional(x64):
    inputs = inputs_for(10, 10, gated=False)
    agree(inputs)
    del inputs["bias"]
    agree(inputs)


def test_float32_and_bfloat16():
    inputs = inputs_for(100, 100)
    agree(inputs)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    expected = reference.fft_conv(**wide)
    for implementation in ("xla", "monarch"):
        y = m2.fft_conv(**half, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        # Only the output is rounded: half of a unit in the eighth bit, 2^-9, at most.
        assert_close(y.astype(jnp.float32), expected, tolerance=2**-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("bandwidth", [0.5, 0.1, 0.001])
def test_bandwidth_keeps_the_lowest_frequencies(bandwidth, order, x64, monkeypatch):
    small_factors(monkeypatch, order)
    inputs = inputs_for(100, 100, gated=False)
    n = m2.conv.fft_size(199)
    response = np.fft.rfft(inputs["k"], n)
    response[:, np.arange(n // 2 + 1) > bandwidth * n / 2] = 0
    y = np.fft.irfft(np.fft.rfft(inputs["u"], n, axis=1) * response.T, n, axis=1)[:, :100]
    expected = jnp.asarray(y + inputs["bias"] * inputs["u"])
    grads = []
    for implementation in ("xla", "monarch"):
        op = lambda **x: m2.fft_conv(**x, bandwidth=bandwidth, implementation=implementation)  # noqa: B023, E731
        actual, gradients = value_and_gradients(op, inputs)
        assert_close(actual, expected)
        grads.append(gradients)
    assert_close(grads[0], grads[1], gradient=True)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_narrow_band_costs_less():
    u, k = jnp.zeros((1, 1024, 8)), jnp.zeros((8, 1024))
    whole, narrow = (
        flops(lambda u, k, band=band: m2.fft_conv(u, k, bandwidth=band, implementation="monarch"), u, k)
        for band in (1.0, 0.25)
    )
    assert narrow < 0.75 * whole


@pytest.mark.parametrize("implementation", ["xla", "monarch"])
def test_cost_is_sub_quadratic(implementation):
    short, long = (
        flops(lambda u, k: m2.fft_conv(u, k, implementation=implementation), jnp.zeros((1, l, 8)), jnp.zeros((8, l)))
        for l in (1024, 4096)
    )
    # FFTs: 4 log(4096) / log(1024) = 4.8. Monarch of order 2: 4 * 4^(1/2) = 8, a little less than all of it twiddles.
    assert long / short <= (4.9 if implementation == "xla" else 8.0)


def test_a_short_filter_costs_by_its_own_length():
    u = jnp.zeros((1, 8192, 4))
    short, long = (flops(lambda u, k: m2.fft_conv(u, k), u, jnp.zeros((4, taps))) for taps in (32, 8192))
    assert short < 0.8 * long


def test_backward_keeps_only_the_inputs():
    """What the backward pass holds on to: the inputs, no spectrum and no gated product."""
    inputs = inputs_for(64, 64, dtype=jnp.float32)
    _, pull = jax.vjp(lambda inputs: m2.fft_conv(**inputs), inputs)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull))
    assert kept <= sum(x.nbytes for x in inputs.values())


def test_causal_to_rounding(x64):
    """Through FFTs every position touches every other: above the diagonal is rounding error, and nothing else."""
    inputs = inputs_for(20, 20, d=1, b=1, gated=False)
    jacobian = jax.jacrev(lambda u: m2.fft_conv(u, inputs["k"])[0, :, 0])(inputs["u"])[:, 0, :, 0]
    above = np.abs(np.triu(jacobian, 1)).max()
    assert above < 1e-14 * np.abs(jacobian).max() * 20


def test_exported_for_any_batch():
    (b,) = jax.export.symbolic_shape("b")
    inputs = inputs_for(20, 20, d=3, b=2, gated=False, dtype=jnp.float32)
    run = jax.jit(m2.fft_conv)
    shapes = [jax.ShapeDtypeStruct((b, *inputs["u"].shape[1:]), jnp.float32), inputs["k"]]
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(*shapes)
    assert_close(exported.call(inputs["u"], inputs["k"]), run(inputs["u"], inputs["k"]))


def test_errors_name_the_argument(unchecked):
    u, k = jnp.zeros((2, 5, 3)), jnp.zeros((3, 5))
    for arguments, words in (
        ({"k": jnp.zeros((4, 5))}, r"k has shape \(4, 5\), expected \(d, m\) with d=3"),
        ({"bias": jnp.zeros(2)}, r"bias has shape \(2,\), expected \(d,\) with d=3"),
        ({"input_gate": jnp.zeros((2, 5, 1))}, "input_gate has shape"),
        ({"mask": jnp.zeros((2, 4), bool)}, r"mask has shape \(2, 4\), expected \(b, l\) = \(2, 5\)"),
        ({"causal": False}, "k has 5 taps, expected an even number"),
        ({"bandwidth": 0.0}, "bandwidth=0.0, expected 0 < bandwidth <= 1"),
        ({"bandwidth": 0.5, "segment_ids": jnp.zeros((2, 5), int)}, "bandwidth=0.5 and segment_ids"),
        ({"bandwidth": 0.5, "k": jnp.zeros((3, 2))}, "a filter of 2 taps a side for 5 positions"),
        ({"implementation": "cuda"}, "implementation='cuda', expected 'xla', 'monarch', 'pallas' or None"),
    ):
        with pytest.raises(ValueError, match=words):
            m2.fft_conv(**({"u": u, "k": k} | arguments))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3)])
def test_nothing_convolved_is_nothing(shape):
    k = jnp.ones((3, 4))
    gradient = jax.grad(lambda u, k: jnp.sum(m2.fft_conv(u, k)), (0, 1))(jnp.zeros(shape), k)
    assert [x.shape for x in gradient] == [shape, k.shape]
    assert not jnp.any(gradient[1])
