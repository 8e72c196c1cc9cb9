"""The selective scan against its reference, and the properties that every caller leans on."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
from ssm import reference
from tests.numerics import assert_close, make_positions, normal, value_and_gradients

LENGTHS = (1, *(pytest.param(length, marks=pytest.mark.slow) for length in (2, 63, 100)), 64, 65, 1000)
IMPLEMENTATIONS = ("sequential", "associative")


def make_inputs(length, *, b=2, e=3, n=4, seed=0):
    """Arguments of a scan whose decays cover nearly 0 to nearly 1."""
    keys = jax.random.split(jax.random.key(seed), 8)
    return {
        "u": normal(keys[0], b, length, e),
        "delta": jax.nn.softplus(normal(keys[1], b, length, e) - 1),
        "A": -jnp.exp(normal(keys[2], e, n)),
        "B": normal(keys[3], b, length, n),
        "C": normal(keys[4], b, length, n),
        "D": normal(keys[5], e),
        "z": normal(keys[6], b, length, e),
        "initial_state": normal(keys[7], b, e, n),
    }


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_reference_in_value_and_every_gradient_in_float64(x64, length, packed):
    inputs, positions = make_inputs(length), make_positions(length) if packed else {}
    expected, expected_gradients = value_and_gradients(reference.selective_scan, inputs, positions)
    for implementation in IMPLEMENTATIONS:
        scan = functools.partial(ssm.selective_scan, implementation=implementation)
        out, gradients = value_and_gradients(scan, inputs, positions)
        assert_close(out, expected, name=implementation)
        for name in inputs:
            assert_close(gradients[name], expected_gradients[name], gradient=True, name=f"{implementation} {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_agrees_with_reference_in_float32(implementation):
    inputs, positions = make_inputs(100), make_positions(100)
    scan = functools.partial(ssm.selective_scan, implementation=implementation)
    out, gradients = value_and_gradients(scan, inputs, positions)
    expected, expected_gradients = value_and_gradients(reference.selective_scan, inputs, positions)
    assert_close(out, expected)
    assert_close(gradients, expected_gradients, gradient=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_their_dtype_and_a_float32_state(implementation):
    inputs = make_inputs(100)
    low = {k: v.astype(jnp.bfloat16) if k not in ("A", "D", "initial_state") else v for k, v in inputs.items()}
    exact = {k: v.astype(jnp.float32) for k, v in low.items()}
    scan = functools.partial(ssm.selective_scan, implementation=implementation)
    (y, state), gradients = value_and_gradients(scan, low, {})
    (expected, expected_state), expected_gradients = value_and_gradients(reference.selective_scan, exact, {})
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert_close(y, expected)
    assert_close(state, expected_state)
    for name, gradient in gradients.items():
        assert gradient.dtype == low[name].dtype
        # A float32 gradient of bfloat16 inputs still passes through the rounded output y.
        assert_close(gradient, expected_gradients[name], tolerance=2e-2, name=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_chunk_size_changes_nothing(x64, chunk_size, implementation):
    inputs, positions = make_inputs(100), make_positions(100)
    scan = functools.partial(ssm.selective_scan, implementation=implementation, chunk_size=chunk_size)
    out, gradients = value_and_gradients(scan, inputs, positions)
    expected, expected_gradients = value_and_gradients(reference.selective_scan, inputs, positions)
    assert_close(out, expected)
    assert_close(gradients, expected_gradients, gradient=True)


def test_steps_equal_the_scan(x64):
    inputs = make_inputs(9)
    y, state = ssm.selective_scan(**inputs)
    h, outputs = inputs["initial_state"], []
    for t in range(9):
        u, delta, B, C, z = (inputs[k][:, t] for k in ("u", "delta", "B", "C", "z"))
        y_t, h = ssm.selective_step(h, u, delta, inputs["A"], B, C, inputs["D"], z)
        outputs.append(y_t)
    assert_close((jnp.stack(outputs, 1), h), (y, state))


@pytest.mark.parametrize("split", [0, 1, 50, 99])
def test_a_scan_split_anywhere_and_carried_on_is_the_whole_scan(x64, split):
    inputs = make_inputs(100)
    positions = make_positions(100)
    # The pieces must not cut a segment boundary off: the first position of a call goes on from the state.
    positions["segment_ids"] = positions["segment_ids"].at[:, split].set(positions["segment_ids"][:, split - 1])
    whole = ssm.selective_scan(**inputs, **positions)
    inputs |= positions
    by_position = ("u", "delta", "B", "C", "z", "mask", "segment_ids")
    first = {k: v[:, :split] if k in by_position else v for k, v in inputs.items()}
    second = {k: v[:, split:] if k in by_position else v for k, v in inputs.items()}
    y_first, state = ssm.selective_scan(**first)
    y_second, state = ssm.selective_scan(**(second | {"initial_state": state}))
    if split > 0:
        assert_close((jnp.concatenate([y_first, y_second], 1), state), whole)


def test_packed_documents_never_see_each_other(x64):
    inputs = make_inputs(30)
    segment_ids = jnp.repeat(jnp.array([[4, 4, 9], [1, 0, 1]]), 10, axis=1)
    packed, _ = ssm.selective_scan(**inputs, segment_ids=segment_ids)
    for row, bounds in ((0, (0, 20, 30)), (1, (0, 10, 20, 30))):
        for start, stop in itertools.pairwise(bounds):
            alone = {k: v[row : row + 1, start:stop] for k, v in inputs.items() if v.ndim == 3 and k != "initial_state"}
            state = inputs["initial_state"][row : row + 1] * (start == 0)
            y, _ = ssm.selective_scan(**alone, A=inputs["A"], D=inputs["D"], initial_state=state)
            assert_close(packed[row : row + 1, start:stop], y)


def test_no_gradient_crosses_a_segment_boundary():
    inputs = make_inputs(20)
    segment_ids = jnp.repeat(jnp.array([[0, 1], [0, 1]]), 10, axis=1)
    later = jax.grad(lambda u: ssm.selective_scan(**(inputs | {"u": u}), segment_ids=segment_ids)[0][:, 10:].sum())
    gradient = later(inputs["u"])
    assert not np.any(gradient[:, :10])
    assert np.all(gradient[:, 10:])


def test_masked_positions_are_absent(x64):
    inputs = make_inputs(40)
    mask = jnp.asarray(np.random.default_rng(0).random(40) > 0.3)
    y, state = ssm.selective_scan(**inputs, mask=jnp.stack([mask, mask]))
    kept = {k: v[:, mask] if v.ndim == 3 and k != "initial_state" else v for k, v in inputs.items()}
    expected, expected_state = ssm.selective_scan(**kept)
    assert_close((y[:, mask], state), (expected, expected_state))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_causal(implementation):
    inputs = make_inputs(12, b=1)
    inputs.pop("z")
    jacobian = jax.jacrev(lambda u: ssm.selective_scan(**(inputs | {"u": u}), implementation=implementation)[0])
    through_time = jnp.abs(jacobian(inputs["u"])).sum((0, 2, 3, 5))
    assert not np.any(np.triu(through_time, 1))
    assert np.all(np.diag(through_time))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_steps_stay_finite(implementation):
    inputs = make_inputs(70)
    inputs["delta"] = inputs["delta"].at[:, ::3].set(1e4).at[:, 1::3].set(0)
    (y, state), gradients = value_and_gradients(
        functools.partial(ssm.selective_scan, implementation=implementation), inputs, {}
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((y, state, gradients)))


def test_works_under_vmap():
    inputs = make_inputs(10)
    y, state = ssm.selective_scan(**inputs)
    in_axes = {k: None if k in ("A", "D") else 0 for k in inputs}

    def one_row(row):
        row = {k: v if k in ("A", "D") else v[None] for k, v in row.items()}
        y, state = ssm.selective_scan(**row)
        return y[0], state[0]

    assert_close(jax.vmap(one_row, in_axes=(in_axes,))(inputs), (y, state))


def test_an_empty_sequence_returns_its_state():
    inputs = make_inputs(0)
    y, state = ssm.selective_scan(**inputs)
    assert y.shape == (2, 0, 3)
    assert_close(state, inputs["initial_state"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_memory_grows_with_b_l_e_and_one_state_a_chunk(implementation):
    b, e, n, chunk_size = 1, 64, 16, 64

    def temporary_bytes(length):
        inputs = make_inputs(length, b=b, e=e, n=n)

        def loss(inputs):
            y, _ = ssm.selective_scan(**inputs, implementation=implementation, chunk_size=chunk_size)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(loss)).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    growth = (temporary_bytes(8192) - temporary_bytes(4096)) / 4096  # bytes a position
    full_state, wide_arrays = 4 * e * n, 4 * (e + n)
    # Measured: about 8 arrays of width e + n. The b l e n array alone would cost 4 e n = 12.8 of them.
    assert growth < full_state / chunk_size + 10 * wide_arrays
    assert growth < full_state


def test_the_platform_of_the_program_chooses_and_not_that_of_the_process():
    def program(platform, **options):
        scan = jax.jit(jax.grad(lambda inputs: ssm.selective_scan(**inputs, **options)[0].sum()))
        return scan.trace(make_inputs(100)).lower(lowering_platforms=(platform,)).as_text()

    def loops(platform, **options):
        return program(platform, **options).count("stablehlo.while")

    assert loops("cpu") == loops("tpu", implementation="sequential")
    assert loops("cuda") == loops("cpu", implementation="associative") < loops("cpu")
    assert program("tpu").count("tpu_custom_call") == 2  # what the forward pass returns has no part in the gradient
    assert "while" not in program("tpu")


def test_the_form_for_other_platforms_agrees_with_the_reference(x64, monkeypatch):
    inputs, positions = make_inputs(100), make_positions(100)
    expected = value_and_gradients(reference.selective_scan, inputs, positions)
    monkeypatch.setattr("ssm.scan.by_platform", lambda cpu, elsewhere, *operands, tpu: elsewhere(*operands))
    out, gradients = value_and_gradients(ssm.selective_scan, inputs, positions)
    assert_close(out, expected[0])
    assert_close(gradients, expected[1], gradient=True)


def test_flops_double_with_the_length():
    def flops(length):
        # XLA counts the body of a loop once, so take the whole row as one chunk.
        scan = functools.partial(ssm.selective_scan, chunk_size=length, implementation="associative")
        return jax.jit(scan).lower(**make_inputs(length, e=32, n=16)).compile().cost_analysis()["flops"]

    assert flops(512) < 2.25 * flops(256)  # 2.19 measured; a quadratic operation has 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": jnp.zeros((2, 5, 9))}, r"B has shape \(2, 5, 9\), expected \(b, l, n\) with b=2, l=5, n=4"),
        ({"delta": jnp.zeros((2, 4, 3))}, r"delta has shape \(2, 4, 3\), expected \(b, l, e\) with b=2, l=5, e=3"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"initial_state has shape"),
        ({"chunk_size": 0}, r"chunk_size=0, expected at least 1"),
        ({"chunk_size": 8, "implementation": "pallas"}, r"chunk_size=8, expected None with implementation='pallas'"),
        ({"implementation": "cuda"}, r"implementation='cuda', expected None or one of"),
    ],
)
def test_errors_name_the_argument(change, message):
    unchecked = inspect.unwrap(ssm.selective_scan)  # as users have it, without the tests' shape checker
    with pytest.raises(ValueError, match=message):
        unchecked(**(make_inputs(5) | change))
