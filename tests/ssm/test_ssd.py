"""The state-space dual against the selective scan and against masked attention."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
from ssm import reference
from ssm.decayed_attention import decayed_attention
from tests.numerics import assert_close, normal, value_and_gradients
from tests.numerics import make_positions as make_dense_positions

make_positions = functools.partial(make_dense_positions, boundaries=0.05)


def make_inputs(length, *, b=2, h=4, p=3, g=2, n=5, seed=0):
    """Arguments whose decays cover nearly 0 to nearly 1, with two heads a group."""
    keys = jax.random.split(jax.random.key(seed), 7)
    return {
        "x": normal(keys[0], b, length, h, p),
        "dt": jax.nn.softplus(normal(keys[1], b, length, h) - 1),
        "A": -jnp.exp(normal(keys[2], h)),
        "B": normal(keys[3], b, length, g, n),
        "C": normal(keys[4], b, length, g, n),
        "D": normal(keys[5], h),
        "initial_state": normal(keys[6], b, h, p, n),
    }


@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 63, 100)), 64, 65, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_selective_scan_in_value_and_every_gradient_in_float64(x64, length, packed):
    inputs, positions = make_inputs(length), make_positions(length) if packed else {}
    out, gradients = value_and_gradients(ssm.ssd, inputs, positions)
    expected, expected_gradients = value_and_gradients(reference.ssd, inputs, positions)
    assert_close(out, expected)
    for name in inputs:
        assert_close(gradients[name], expected_gradients[name], gradient=True, name=name)


def test_agrees_with_the_reference_in_float32():
    inputs, positions = make_inputs(200), make_positions(200)
    out, gradients = value_and_gradients(ssm.ssd, inputs, positions)
    expected, expected_gradients = value_and_gradients(reference.ssd, inputs, positions)
    assert_close(out, expected)
    assert_close(gradients, expected_gradients, gradient=True)


def test_is_masked_attention(x64):
    inputs = make_inputs(20, g=1)
    inputs["initial_state"] = jnp.zeros_like(inputs["initial_state"])
    y, _ = jax.jit(functools.partial(ssm.ssd, chunk_size=8))(**inputs)
    decay = inputs["dt"] * inputs["A"]
    total = jnp.stack([jnp.stack([decay[:, j + 1 : i + 1].sum(1) for j in range(20)], 1) for i in range(20)], 1)
    scores = jnp.einsum("bqn,bsn->bqs", inputs["C"][:, :, 0], inputs["B"][:, :, 0])
    weights = jnp.where(jnp.tri(20, dtype=bool)[None, :, :, None], scores[..., None] * jnp.exp(total), 0)  # b q s h
    attention = jnp.einsum("bqsh,bsh,bshp->bqhp", weights, inputs["dt"], inputs["x"])
    assert_close(y, attention + inputs["D"][:, None] * inputs["x"])


def test_bfloat16_inputs_keep_their_dtype_and_a_float32_state():
    inputs = make_inputs(100)
    low = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    exact = {name: value.astype(jnp.float32) for name, value in low.items()}
    (y, state), gradients = value_and_gradients(ssm.ssd, low, {})
    (expected, expected_state), expected_gradients = value_and_gradients(reference.ssd, exact, {})
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert_close(y, expected)
    assert_close(state, expected_state, tolerance=2e-2)  # products of bfloat16 operands
    for name, gradient in gradients.items():
        assert gradient.dtype == low[name].dtype
        assert_close(gradient, expected_gradients[name], tolerance=2e-2, name=name)  # likewise


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 1000])
def test_chunk_size_changes_nothing(x64, chunk_size):
    inputs, positions = make_inputs(100), make_positions(100)
    out, gradients = value_and_gradients(functools.partial(ssm.ssd, chunk_size=chunk_size), inputs, positions)
    expected, expected_gradients = value_and_gradients(ssm.ssd, inputs, positions)
    assert_close(out, expected)
    assert_close(gradients, expected_gradients, gradient=True)


def test_steps_equal_the_whole(x64):
    inputs = make_inputs(9)
    inputs["D"] = normal(jax.random.key(3), 4, 3)  # one for each channel of a head
    y, state = jax.jit(ssm.ssd)(**inputs)
    step = jax.jit(ssm.ssd_step)
    h, outputs = inputs["initial_state"], []
    for t in range(9):
        x, dt, B, C = (inputs[name][:, t] for name in ("x", "dt", "B", "C"))
        y_t, h = step(h, x, dt, inputs["A"], B, C, inputs["D"])
        outputs.append(y_t)
    assert_close((jnp.stack(outputs, 1), h), (y, state))


def test_weak_decay_behind_strong_decay_is_exact_in_float32():
    inputs = make_inputs(130)
    # Sums of decays reach 1e5 in a chunk, where float32 has steps of 0.01.
    inputs["dt"] = inputs["dt"].at[:, ::3].set(2000.0).at[:, 1::3].set(0)
    out, gradients = value_and_gradients(ssm.ssd, inputs, {})
    expected, expected_gradients = value_and_gradients(reference.ssd, inputs, {})
    assert_close(out, expected)
    # The gradient in A sums terms that cancel, each times a step of 2000.
    assert_close(gradients.pop("A"), expected_gradients.pop("A"), tolerance=1e-2)
    assert_close(gradients, expected_gradients, gradient=True)


def test_rows_of_one_position_read_what_all_of_them_write(x64):
    b, length, rank, h, p, n = 2, 10, 2, 3, 4, 5
    keys = jax.random.split(jax.random.key(0), 6)
    x, B, C = (normal(key, b, length, rank, h, width) for key, width in zip(keys, (p, n, n), strict=False))
    weight, state = normal(keys[3], b, length, rank, h), normal(keys[4], b, h, p, n)
    decay = -jnp.exp(normal(keys[5], b, length, h))
    rows = [a.reshape(b, length * rank, *a.shape[3:]) for a in (x, weight, B, C)]
    a = jnp.stack([decay, jnp.zeros_like(decay)], axis=2).reshape(b, length * rank, h)  # in the first row alone
    attend = jax.jit(functools.partial(decayed_attention, chunk_size=4, rank=rank))
    y, final = attend(*rows[:2], a, *rows[2:], initial_state=state)

    state, expected = np.asarray(state), np.zeros((b, length, rank, h, p))
    for t in range(length):
        state = np.exp(decay[:, t])[..., None, None] * state
        state = state + np.einsum("brh,brhp,brhn->bhpn", weight[:, t], x[:, t], B[:, t])
        expected[:, t] = np.einsum("bhpn,brhn->brhp", state, C[:, t])
    assert_close((y, final), (expected.reshape(y.shape), state))


def test_no_gradient_crosses_a_segment_boundary():
    inputs = make_inputs(20)
    segment_ids = jnp.repeat(jnp.array([[0, 1], [0, 1]]), 10, axis=1)

    @jax.jit
    @jax.grad
    def later(x):
        return ssm.ssd(**(inputs | {"x": x}), segment_ids=segment_ids, chunk_size=8)[0][:, 10:].sum()

    gradient = later(inputs["x"])
    assert not np.any(gradient[:, :10])
    assert np.all(gradient[:, 10:])


def test_flops_double_with_the_length():
    def flops(length):
        # XLA counts the body of a loop once, so take the program where all chunks are one group.
        program = jax.jit(ssm.ssd).trace(**make_inputs(length, p=16, n=16)).lower(lowering_platforms=("tpu",))
        return program.cost_analysis()["flops"]

    assert flops(1024) == pytest.approx(2 * flops(512), rel=0.02)


@pytest.mark.slow
def test_chunks_go_in_small_groups_on_a_cpu_and_in_large_ones_elsewhere_whatever_the_process_runs_on(monkeypatch):
    monkeypatch.setattr("ssm.decayed_attention.GROUP_BYTES", 1)
    inputs = make_inputs(256)

    def loops(platform):
        program = jax.jit(jax.grad(lambda inputs: ssm.ssd(**inputs, chunk_size=32)[0].sum())).trace(inputs)
        return program.lower(lowering_platforms=(platform,)).as_text().count("dynamic_update_slice")

    # Elsewhere they are one group here: only the scan between chunks writes in turns.
    assert loops("cpu") > 2 >= loops("tpu") == loops("cuda")
    monkeypatch.setattr("ssm.decayed_attention.GROUP_BYTES_ELSEWHERE", 1)
    jax.clear_caches()
    assert loops("tpu") == loops("cuda") == loops("cpu")


@pytest.mark.parametrize("group_bytes", [1, 2**13])
def test_groups_of_chunks_change_nothing(x64, monkeypatch, group_bytes):
    length, rank, h = 24, 2, 4
    inputs = make_inputs(length * rank, h=h)
    inputs |= {"weight": inputs.pop("dt"), "own": normal(jax.random.key(7), 2, length * rank, h)}
    inputs["a"] = jnp.repeat(inputs["weight"][:, ::rank] * inputs.pop("A"), rank, axis=1).at[:, 1::rank].set(0)
    del inputs["D"]
    segment_ids = jnp.repeat(make_positions(length)["segment_ids"], rank, axis=1)
    op = functools.partial(decayed_attention, chunk_size=2, rank=rank)  # 12 chunks
    expected = value_and_gradients(op, inputs, {"segment_ids": segment_ids})
    monkeypatch.setattr("ssm.decayed_attention.GROUP_BYTES", group_bytes)
    out = value_and_gradients(op, inputs, {"segment_ids": segment_ids})
    assert_close(out[0], expected[0])
    assert_close(out[1], expected[1], gradient=True)


def test_the_form_for_other_platforms_agrees_with_the_reference(x64, monkeypatch):
    inputs, positions = make_inputs(150), make_positions(150)  # two chunks there, three on a CPU
    expected = value_and_gradients(reference.ssd, inputs, positions)
    monkeypatch.setattr("ssm.decayed_attention.by_platform", lambda cpu, elsewhere, *operands: elsewhere(*operands))
    out, gradients = value_and_gradients(ssm.ssd, inputs, positions)
    assert_close(out, expected[0])
    assert_close(gradients, expected[1], gradient=True)


def test_a_step_costs_what_the_recurrence_needs():
    b, h, p, n = 2, 8, 16, 32
    inputs = make_inputs(1, b=b, h=h, p=p, g=1, n=n)
    state = inputs.pop("initial_state")
    at_once = {name: value if name in ("A", "D") else value[:, 0] for name, value in inputs.items()}
    flops = jax.jit(ssm.ssd_step).lower(state, **at_once).compile().cost_analysis()["flops"]
    needed = b * h * p * n * 5  # decay, outer product, sum; product with C, sum
    assert flops <= 1.05 * needed


def test_training_memory_is_linear_in_the_length():
    def temporary_bytes(length):
        loss = lambda inputs: jnp.sum(ssm.ssd(**inputs)[0] ** 2)  # noqa: E731
        inputs = make_inputs(length, b=1)
        return jax.jit(jax.grad(loss)).lower(inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.1 * temporary_bytes(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": jnp.zeros((2, 5, 3, 5)), "C": jnp.zeros((2, 5, 3, 5))}, "g=3 groups, expected a number that divides"),
        ({"dt": jnp.zeros((2, 5, 3))}, r"dt has shape \(2, 5, 3\), expected \(b, l, h\) with b=2, l=5, h=4"),
        ({"chunk_size": 0}, "chunk_size=0, expected at least 1"),
    ],
)
def test_errors_name_the_argument(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(ssm.ssd)(**(make_inputs(5) | change))
