"""The M2 mixer: any split equals the whole, padding changes nothing, documents stay apart; decoding is cheap.

Over an image it is its formula, written out.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
from m2 import streaming
from tests.numerics import assert_close, normal, with_random_parameters

LENGTH, D_MODEL = 20, 4
FORMS = {"plain": {}, "whole": {"residual_long_conv": True, "training_additions": True}}


@functools.cache
def make(form, causal=True, dtype="float64", l_max=32):
    config = m2.M2Config(l_max=l_max, filter=m2.HyenaFilterConfig(order=6), **FORMS[form])
    return with_random_parameters(
        lambda: m2.M2Mixer(D_MODEL, config, causal=causal, param_dtype=dtype, rngs=nnx.Rngs(0))
    )


def inputs(length=LENGTH, b=2):
    return normal(jax.random.key(length), b, length, D_MODEL)


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, params, x, **positions):
    return nnx.merge(graphdef, params)(x, **positions)


def whole(mixer, x, **positions):
    return _whole(*nnx.split(mixer), x, **positions)


@functools.partial(jax.jit, static_argnums=0)
def _extend(graphdef, params, *arguments, **positions):
    return nnx.merge(graphdef, params).extend(*arguments, **positions)


def extend(mixer, x, state, **positions):
    return _extend(*nnx.split(mixer), x, state, **positions)


@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_any_split_equals_the_whole(form, window, x64, monkeypatch):
    monkeypatch.setattr(streaming, "epoch", lambda slots: window)
    _extend.clear_cache()
    mixer, x = make(form), inputs()
    expected = whole(mixer, x)
    for split in ([LENGTH], [7, 1, 1, 11], [1] * LENGTH, [3, 3] + [1] * (LENGTH - 6)):
        state, parts = mixer.init_state(2, 25), []
        for part in jnp.split(x, np.cumsum(split)[:-1], axis=1):
            y, state = extend(mixer, part, state)
            parts.append(y)
        assert_close(jnp.concatenate(parts, axis=1), expected)


def test_epochs_are_about_the_root_of_the_length():
    assert [streaming.epoch(slots) for slots in (1, 2, 20, 1024, 32_768)] == [1, 2, 8, 128, 512]


@pytest.mark.parametrize("causal", [True, False])
def test_padding_at_either_end_changes_nothing(causal, x64):
    mixer, x = make("whole", causal), inputs()
    mask = np.ones((2, LENGTH), bool)
    mask[0, :7] = mask[1, 12:] = False
    y = whole(mixer, x, mask=jnp.asarray(mask))
    assert_close(y[:1, 7:], whole(mixer, x[:1, 7:]))
    assert_close(y[1:, :12], whole(mixer, x[1:, :12]))


def test_padding_leaves_no_gap_before_what_follows(x64):
    """Rows end at different places, then go on together, then one of them skips a position."""
    mixer, x = make("whole"), inputs()
    ends = np.array([[5], [9]])
    pieces = [
        (x[:, :9], np.arange(9) < ends),
        (x[:, 9:12], np.ones((2, 3), bool)),
        (x[:, 12:13], np.array([[True], [False]])),
        (x[:, 13:14], np.ones((2, 1), bool)),
    ]
    state = mixer.init_state(2, 25)
    for part, mask in pieces:
        y, state = extend(mixer, part, state, mask=jnp.asarray(mask))
    first = jnp.concatenate([x[:1, :5], x[:1, 9:14]], axis=1)
    second = jnp.concatenate([x[1:, :12], x[1:, 13:14]], axis=1)
    assert_close(y[:1], whole(mixer, first)[:, -1:])
    assert_close(y[1:], whole(mixer, second)[:, -1:])


@pytest.mark.parametrize("causal", [True, False])
def test_documents_in_a_row_do_not_see_each_other(causal, x64):
    mixer, x = make("whole", causal), inputs()
    segment_ids = jnp.asarray(np.repeat([[3, 1, 3]], 2, axis=0)[:, np.repeat([0, 1, 2], [6, 1, 13])])
    y = whole(mixer, x, segment_ids=segment_ids)
    alone = [whole(mixer, part) for part in (x[:, :6], x[:, 6:7], x[:, 7:])]
    assert_close(y, jnp.concatenate(alone, axis=1))


def test_documents_end_and_begin_in_pieces(x64):
    mixer, x = make("whole"), inputs()
    segment_ids = jnp.asarray(np.repeat([[0, 1, 2]], 2, axis=0)[:, np.repeat([0, 1, 2], [6, 7, 7])])
    expected = whole(mixer, x, segment_ids=segment_ids)
    state, parts = mixer.init_state(2, 25), []
    for first, last in ((0, 3), (3, 10), (10, 20)):
        y, state = extend(mixer, x[:, first:last], state, segment_ids=segment_ids[:, first:last])
        parts.append(y)
    assert_close(jnp.concatenate(parts, axis=1), expected)


def test_is_causal_to_rounding(x64):
    mixer, x = make("whole"), inputs(b=1)
    jacobian = jax.jacrev(lambda x: whole(mixer, x)[0].sum(-1))(x)[:, 0].sum(-1)
    assert np.abs(np.triu(jacobian, 1)).max() < 1e-13 * np.abs(jacobian).max()
    later = jax.jacrev(lambda x: whole(make("whole", causal=False), x)[0].sum(-1))(x)[:, 0].sum(-1)
    assert np.abs(np.triu(later, 1)).max() > 1e-3 * np.abs(later).max()


def test_bfloat16_is_near_float32():
    mixer = make("whole", dtype="float32")
    half = m2.M2Mixer(D_MODEL, mixer.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(mixer))
    x = inputs().astype(jnp.float32)
    y = whole(half, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    # Two projections and two gates, each rounded to eight bits.
    assert_close(y.astype(jnp.float32), whole(mixer, x), tolerance=4e-2)
    state = half.init_state(2, 25)
    assert (state.long.inputs.dtype, state.long.future.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_decode_step_costs_an_epoch_not_the_past():
    """FLOPs of a step between two FFTs grow like the epoch, the root of the length."""
    costs = []
    for slots in (1024, 4096):
        state = jax.eval_shape(lambda slots=slots: m2.init_conv_state(jnp.zeros((8, slots)), 1, jnp.float32))
        step = jax.jit(lambda u, state: streaming._step(u, state, None)[0])
        costs.append(step.lower(jax.ShapeDtypeStruct((1, 1, 8), jnp.float32), state).compile().cost_analysis()["flops"])
    assert costs[1] <= 2.2 * costs[0]
    assert costs[0] < 1024 * 8 * 2


GRID = (4, 5)


@functools.cache
def make_2d(form, dtype="float64", **options):
    config = m2.M2Config(l_max=16, conv="2d", filter=m2.HyenaFilterConfig(order=6), **FORMS[form], **options)
    return with_random_parameters(
        lambda: m2.M2Mixer(D_MODEL, config, causal=False, param_dtype=dtype, rngs=nnx.Rngs(0))
    )


def compiled_2d(mixer, grid=GRID):
    graphdef, params = nnx.split(mixer)
    return jax.jit(lambda x: nnx.merge(graphdef, params)(x, grid=grid))


def test_over_an_image_equals_its_formula_written_out(x64):
    """Depthwise 3x3, gate, sum over pairs of places, gate, and the same sum of the input."""
    mixer, x = make_2d("whole"), inputs()
    u = mixer.layernorm(x)
    p = np.asarray(mixer.in_linear(u)).reshape(2, *GRID, -1)
    padded, kernel = np.pad(p, ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(mixer.short_filter.kernel[...])
    p = sum(padded[:, i : i + GRID[0], j : j + GRID[1]] * kernel[:, i, j] for i in range(3) for j in range(3))
    x1, x2, v = np.split(p + np.asarray(mixer.short_filter.bias[...]), 3, axis=-1)

    def long(filter_fn, s):
        taps, y = np.asarray(filter_fn(GRID)), np.asarray(filter_fn.bias[...]) * s
        for r, c in np.ndindex(GRID):
            for i, j in np.ndindex(GRID):
                y[:, r, c] += taps[:, r - i, c - j] * s[:, i, j]
        return y

    y = x2 * long(mixer.filter_fn, x1 * v) + long(mixer.filter_fn2, np.asarray(u).reshape(2, *GRID, -1))
    assert_close(compiled_2d(mixer)(x), mixer.out_linear(jnp.asarray(y.reshape(x.shape))))


def test_filters_of_an_image_may_be_shared(x64):
    mixer = make_2d("plain", n_filters=2)
    taps = np.asarray(mixer._taps(mixer.filter_fn, GRID))
    assert taps.shape == (D_MODEL, 8, 10)
    np.testing.assert_array_equal(taps[::2], taps[1::2])


def test_over_an_image_bfloat16_is_near_float32():
    mixer, x = make_2d("whole", dtype="float32"), inputs().astype(jnp.float32)
    half = m2.M2Mixer(D_MODEL, mixer.config, causal=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(mixer))
    y = compiled_2d(half)(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), compiled_2d(mixer)(x), tolerance=4e-2)  # as in a row


def test_errors_over_an_image(unchecked):
    mixer, x = make_2d("plain", dtype="float32"), jnp.zeros((1, LENGTH, D_MODEL))
    with pytest.raises(ValueError, match="causal=True with conv='2d', which reads an image from every side"):
        m2.M2Mixer(D_MODEL, mixer.config, rngs=nnx.Rngs(0))
    for grid in (None, (3, 5)):
        with pytest.raises(ValueError, match=r"grid=.*, expected rows and columns of 20 places, the length of x"):
            mixer(x, grid=grid)
    with pytest.raises(ValueError, match="reads whole images, expected neither mask nor segment_ids"):
        mixer(x, grid=GRID, mask=jnp.ones((1, LENGTH), bool))
    with pytest.raises(ValueError, match="conv='3d', expected 'flat' or '2d'"):
        m2.M2Config(conv="3d")


def test_errors(unchecked):
    mixer = make("plain", dtype="float32")
    with pytest.raises(ValueError, match="max_len=33, expected at most l_max=32"):
        mixer.init_state(1, 33)
    with pytest.raises(ValueError, match="length=33, expected 1 to l_max=32"):
        mixer(jnp.zeros((1, 33, D_MODEL)))
    with pytest.raises(ValueError, match="causal=False: a bidirectional mixer has no state"):
        make("plain", causal=False, dtype="float32").init_state(1)
    with pytest.raises(ValueError, match="d_conv=0, expected at least 1"):
        m2.M2Config(d_conv=0)


@pytest.mark.parametrize("causal", [True, False])
def test_exported_for_any_batch_and_length(causal, unchecked):
    mixer = make("whole", causal, "float32", 64)
    b, length = jax.export.symbolic_shape("b, l", constraints=["l <= 64"])
    run = jax.jit(lambda x, mask: jnp.where(mask[..., None], mixer(x, mask=mask), 0))
    shapes = jax.ShapeDtypeStruct((b, length, D_MODEL), jnp.float32), jax.ShapeDtypeStruct((b, length), bool)
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(*shapes)
    for rows, size in ((2, 3), (1, 64)):
        x, mask = inputs(size, rows).astype(jnp.float32), jnp.broadcast_to(jnp.arange(size) < size - 1, (rows, size))
        assert_close(exported.call(x, mask), run(x, mask))
    b, length = jax.export.symbolic_shape("b, l")
    with pytest.raises(ValueError, match=r"length=l, a symbol without a bound, expected at most l_max=64: .*'l <= 64'"):
        jax.export.export(jax.jit(mixer))(jax.ShapeDtypeStruct((b, length, D_MODEL), jnp.float32))


def test_a_state_goes_through_an_exported_program(unchecked):
    mixer = make("whole", True, "float32", 64)
    step = jax.jit(mixer.extend)
    exported = jax.export.export(step)(inputs(1).astype(jnp.float32), mixer.init_state(2))
    again = jax.export.deserialize(exported.serialize())
    x, state = inputs(1).astype(jnp.float32), mixer.init_state(2)
    (y, after), (expected, expected_after) = again.call(x, state), step(x, state)
    assert_close((y, after.long.inputs), (expected, expected_after.long.inputs))
