"""The short convolution against its reference, and the state that it hands from call to call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
from ssm import reference
from tests.numerics import assert_close, normal

convolve = jax.jit(ssm.causal_conv1d)  # compiled once for each shape, rather than operation by operation


def make_inputs(length, *, b=2, e=3, w=4):
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "x": normal(keys[0], b, length, e),
        "weight": normal(keys[1], e, w),
        "bias": normal(keys[2], e),
        "initial_state": normal(keys[3], b, w - 1, e),
    }


def make_segments(length, *, b=2):
    """Packed documents of a few positions each, different in each row."""
    return jnp.asarray(np.cumsum(np.random.default_rng(0).random((b, length)) < 0.2, axis=1))


def last_inputs(x, initial_state, segment_ids=None):
    """The final state in so many words: row by row, the last inputs, those of earlier segments blanked."""
    history, length = initial_state.shape[1], x.shape[1]
    inputs = jnp.concatenate([initial_state, x], axis=1)[:, length:]
    if segment_ids is None:
        return inputs
    ids = np.asarray(segment_ids)
    blank = np.zeros((len(ids), history, 1))
    for row in range(len(ids)):
        for i in range(history):
            source = i + length - history  # below 0: the initial state, which belongs to the first position's segment
            blank[row, i] = np.any(ids[row, max(source, 0) :] != ids[row, -1])
    return jnp.where(blank, 0, inputs)


def value_and_gradients(function, inputs):
    """The output and the final state, and the gradient of both, each weighted at random, in every input."""

    y_weight = normal(jax.random.key(8), *inputs["x"].shape)
    state_weight = normal(jax.random.key(9), *inputs["initial_state"].shape)

    def total(inputs):
        y, state = function(**inputs)
        return jnp.sum(y * y_weight) + jnp.sum(state * state_weight), (y, state)

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return out, gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "w"), [(1, 4), (2, 4), (3, 4), (5, 1), (20, 2), (64, 4), (100, 4)])
def test_agrees_with_reference_in_value_and_every_gradient_in_float64(x64, length, w, packed):
    inputs = make_inputs(length, w=w)
    segment_ids = make_segments(length) if packed else None

    def expected(x, weight, bias, initial_state):
        options = {"initial_state": initial_state, "segment_ids": segment_ids}
        return reference.causal_conv1d(x, weight, bias, **options), last_inputs(x, initial_state, segment_ids)

    out, gradients = value_and_gradients(lambda **kw: ssm.causal_conv1d(**kw, segment_ids=segment_ids), inputs)
    expected_out, expected_gradients = value_and_gradients(expected, inputs)
    assert_close(out, expected_out)
    assert_close(gradients, expected_gradients, gradient=True)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_weights_summed_in_turns_are_those_summed_at_once(x64, monkeypatch, packed):
    # Nine turns of 8 positions, and 3 positions more.
    inputs, options = make_inputs(75), {"segment_ids": make_segments(75)} if packed else {}
    loops = []
    for shortest in (76, 75):
        monkeypatch.setattr("ssm.conv.SUMMED_IN_TURNS_FROM", shortest)
        loops.append(value_and_gradients(lambda **kw: ssm.causal_conv1d(**kw, **options), inputs)[1])
    assert_close(loops[1], loops[0], gradient=True)


def test_without_bias_and_state_both_are_zero(x64):
    inputs = make_inputs(6)
    zeros = inputs | {"bias": jnp.zeros(3), "initial_state": jnp.zeros((2, 3, 3))}
    assert_close(convolve(inputs["x"], inputs["weight"]), convolve(**zeros))


def test_one_tap_scales_and_carries_nothing(x64):
    inputs = make_inputs(5, w=1)
    mask, segment_ids = jnp.ones((2, 5), bool).at[:, 3:].set(False), make_segments(5)
    y, state = convolve(**inputs, mask=mask, segment_ids=segment_ids)
    assert state.shape == (2, 0, 3)
    assert_close(y[:, :3], (inputs["x"] * inputs["weight"][:, 0] + inputs["bias"])[:, :3])


def test_an_empty_sequence_returns_its_state():
    inputs = make_inputs(0)
    for mask in (None, jnp.ones((2, 0), bool)):
        y, state = convolve(**inputs, mask=mask)
        assert y.shape == (2, 0, 3)
        assert_close(state, inputs["initial_state"])


@pytest.mark.parametrize("pieces", [(0, 9), (2, 7), (5, 4), (8, 1), (1,) * 9])
def test_split_anywhere_and_carried_on_is_the_whole(x64, pieces):
    inputs = make_inputs(9)
    segment_ids = jnp.asarray([[3, 3, 3, 3, 3, 3, 3, 3, 3], [5, 5, 5, 5, 5, 5, 2, 2, 2]])
    if len(pieces) == 9:
        segment_ids = segment_ids[:1].repeat(2, axis=0)  # the first position of a call goes on: it opens no segment
    whole = convolve(**inputs, segment_ids=segment_ids)
    state, outputs, start = inputs["initial_state"], [], 0
    for length in pieces:
        here = slice(start, start + length)
        piece = {"x": inputs["x"][:, here], "segment_ids": segment_ids[:, here], "initial_state": state}
        y, state = convolve(**(inputs | piece))
        outputs.append(y)
        start += length
    assert_close((jnp.concatenate(outputs, axis=1), state), whole)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_right_padding_leaves_the_state_and_the_output_of_the_unpadded_row(x64, length):
    inputs = make_inputs(8)
    mask = jnp.stack([jnp.arange(8) < length, jnp.arange(8) < 8])  # a short row, a full one
    y, state = convolve(**inputs, mask=mask)
    for row, end in ((0, length), (1, 8)):
        alone = inputs | {k: inputs[k][row : row + 1] for k in ("x", "initial_state")}
        expected, expected_state = convolve(**(alone | {"x": alone["x"][:, :end]}))
        assert_close((y[row : row + 1, :end], state[row : row + 1]), (expected, expected_state))


def test_left_padding_is_no_padding(x64):
    inputs = make_inputs(8) | {"initial_state": None}
    y, state = convolve(**inputs, mask=jnp.arange(8)[None] >= jnp.asarray([[6], [2]]))
    for row, start in ((0, 6), (1, 2)):
        expected = convolve(**(inputs | {"x": inputs["x"][row : row + 1, start:]}))
        assert_close((y[row : row + 1, start:], state[row : row + 1]), expected)


def test_a_row_with_nothing_there_keeps_its_state():
    inputs = make_inputs(5)
    _, state = convolve(**inputs, mask=jnp.zeros((2, 5), bool))
    assert_close(state, inputs["initial_state"])


def test_masked_inputs_have_no_gradient_even_where_they_are_not_numbers():
    inputs = make_inputs(6)
    mask = jnp.ones((2, 6), bool).at[:, 4:].set(False)
    x = inputs["x"].at[:, 4:].set(jnp.nan)
    gradient = jax.grad(lambda x: convolve(x, inputs["weight"], mask=mask)[0][:, :4].sum())(x)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[:, 4:])


def test_packed_documents_equal_each_alone(x64):
    inputs = make_inputs(9)
    segment_ids = jnp.asarray([[4, 4, 4, 4, 4, 9, 9, 9, 9], [1, 1, 0, 1, 1, 1, 1, 1, 7]])
    packed, state = convolve(**inputs, segment_ids=segment_ids)
    for row, bounds in ((0, (0, 5, 9)), (1, (0, 2, 3, 8, 9))):
        for start, stop in itertools.pairwise(bounds):
            history = inputs["initial_state"][row : row + 1] * (start == 0)
            x = inputs["x"][row : row + 1, start:stop]
            y, last = convolve(**(inputs | {"x": x, "initial_state": history}))
            assert_close(packed[row : row + 1, start:stop], y)
        assert_close(state[row : row + 1], last)


def test_padding_that_is_a_segment_of_its_own_ends_the_one_before_it(x64):
    # As in the scan, whose state is zero from where a segment begins, whether or not the positions are there.
    inputs = make_inputs(6)
    segment_ids = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    _, state = convolve(**inputs, mask=jnp.arange(6)[None] < jnp.asarray([[4], [4]]), segment_ids=segment_ids)
    assert not np.any(state[0])
    assert_close(state[1], inputs["x"][1, 1:4])


def test_bfloat16_stays_bfloat16():
    inputs = {k: v.astype(jnp.bfloat16) for k, v in make_inputs(20).items()}
    exact = {k: v.astype(jnp.float32) for k, v in inputs.items()}
    y, state = convolve(**inputs)
    assert y.dtype == state.dtype == jnp.bfloat16
    assert_close(y, reference.causal_conv1d(**exact))


def test_float32_parameters_leave_the_dtype_to_the_input():
    inputs = make_inputs(6)
    y, state = convolve(**(inputs | {"x": inputs["x"].astype(jnp.bfloat16)}))
    assert y.dtype == state.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 5))}, r"x has shape \(2, 5\), expected \(b, l, e\)"),
        ({"weight": jnp.zeros((4, 3))}, r"weight has shape \(4, 3\), expected \(e, w\) with e=3"),
        ({"bias": jnp.zeros(4)}, r"bias has shape \(4,\), expected \(e\) with e=3"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"initial_state .*\(2, 4, 3\), expected .* = \(2, 3, 3\)"),
        ({"mask": jnp.ones((2, 4), bool)}, r"mask has shape \(2, 4\), expected \(b, l\) with b=2, l=5"),
        ({"segment_ids": jnp.ones((1, 5), int)}, r"segment_ids has shape \(1, 5\), expected \(b, l\) with b=2, l=5"),
    ],
)
def test_errors_name_the_argument(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        ssm.causal_conv1d(**(make_inputs(5) | change))
