"""The exponential-trapezoidal recurrence against its reference, and against the state-space dual."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
from ssm import TrapezoidState, reference
from tests.numerics import assert_close, make_positions, normal


def make_inputs(length, rank=1, *, b=2, h=3, p=4, n=6):
    """Arguments whose decays cover nearly 0 to nearly 1, and whose steps weigh both ends."""
    keys = jax.random.split(jax.random.key(0), 10)
    return {
        "v": normal(keys[0], b, length, rank, h, p),
        "k": normal(keys[1], b, length, rank, h, n),
        "q": normal(keys[2], b, length, rank, h, n),
        "dt": jax.nn.softplus(normal(keys[3], b, length, h) - 1),
        "A": -jnp.exp(normal(keys[4], b, length, h)),
        "lam": jax.nn.sigmoid(normal(keys[5], b, length, h)),
        "D": normal(keys[6], h),
        "initial_state": TrapezoidState(
            normal(keys[7], b, h, p, n), normal(keys[8], b, rank, h, n), normal(keys[9], b, rank, h, p)
        ),
    }


def every_kind_of_row(length):
    """Four rows: plain, with holes, packed, and packed with holes."""
    positions = make_positions(length, b=4)
    mask = positions["mask"].at[jnp.array([0, 2])].set(True)
    return {"mask": mask, "segment_ids": positions["segment_ids"].at[:2].set(0)}


def value_and_gradients(op, inputs, positions):
    """(y, final state) and the gradient of both, weighted at random, in every input; y is 0 where nothing is there."""
    keys = jax.random.split(jax.random.key(8), 4)
    weights = [normal(key, *a.shape) for key, a in zip(keys, [inputs["v"], *inputs["initial_state"]], strict=True)]

    def total(inputs):
        y, state = op(**inputs, **positions)
        if "mask" in positions:
            y = jnp.where(positions["mask"][..., None, None, None], y, 0)
        out = [y, *state]
        return sum(jnp.sum(a * w) for a, w in zip(out, weights, strict=True)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
    return out, gradients


# Chunks hold 64 positions at rank 1, 21 at rank 3.
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3), (63, 3), (64, 1))]


@pytest.mark.parametrize(("length", "rank"), [(1, 1), (65, 1), (100, 3), *SLOW])
def test_equals_the_recurrence_in_value_and_every_gradient_in_float64(x64, length, rank):
    inputs, positions = make_inputs(length, rank, b=4), every_kind_of_row(length)
    out, gradients = value_and_gradients(ssm.trapezoid, inputs, positions)
    expected, expected_gradients = value_and_gradients(reference.trapezoid, inputs, positions)
    for name, one, other in zip(("y", "h", "k", "v"), out, expected, strict=True):
        assert_close(one, other, name=name)
    for name in inputs:
        assert_close(gradients[name], expected_gradients[name], gradient=True, name=name)


def test_agrees_with_the_recurrence_in_float32_and_bfloat16():
    inputs = make_inputs(100)
    expected, expected_gradients = value_and_gradients(reference.trapezoid, inputs, {})
    out, gradients = value_and_gradients(ssm.trapezoid, inputs, {})
    assert_close(out, expected)
    assert_close(gradients, expected_gradients, gradient=True)

    low = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("v", "k", "q")}
    out, gradients = value_and_gradients(ssm.trapezoid, low, {})
    assert [a.dtype for a in out] == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert_close(out, expected, tolerance=2e-2)  # products of bfloat16 operands, of bfloat16 inputs
    for name in inputs:
        assert [g.dtype for g in jax.tree.leaves(gradients[name])] == [a.dtype for a in jax.tree.leaves(low[name])]
        assert_close(gradients[name], expected_gradients[name], tolerance=2e-2, name=name)  # likewise


def test_with_the_right_end_alone_it_is_the_state_space_dual(x64):
    inputs = make_inputs(20)
    inputs |= {"lam": jnp.ones_like(inputs["lam"]), "A": jnp.broadcast_to(inputs["A"][:1, :1], inputs["A"].shape)}
    y, state = jax.jit(functools.partial(ssm.trapezoid, chunk_size=8))(**inputs)
    v, k, q = (inputs[name][:, :, 0] for name in "vkq")
    dual = jax.jit(functools.partial(ssm.ssd, chunk_size=8))
    expected, h = dual(v, inputs["dt"], inputs["A"][0, 0], k, q, inputs["D"], initial_state=inputs["initial_state"].h)
    assert_close((y[:, :, 0], state.h), (expected, h))
    assert_close((state.k[:, 0], state.v[:, 0]), (k[:, -1], v[:, -1]))


def test_steps_equal_the_whole(x64):
    inputs, step = make_inputs(7, 3), jax.jit(ssm.trapezoid_step)
    state, mask = inputs.pop("initial_state"), jnp.arange(7) != jnp.array([[4], [7]])
    whole, final = jax.jit(ssm.trapezoid)(**inputs, initial_state=state, mask=mask)
    for t in range(7):
        at_once = {name: a if name == "D" else a[:, t] for name, a in inputs.items()}
        y, state = step(state, **at_once, mask=mask[:, t])
        assert_close(y[mask[:, t]], whole[:, t][mask[:, t]], name=f"y at {t}")
    assert_close(state, final)


def test_chunk_size_changes_nothing(x64):
    inputs, positions = make_inputs(40, 2, b=4), every_kind_of_row(40)
    expected, expected_state = jax.jit(reference.trapezoid)(**inputs, **positions)
    for chunk_size in (1, 7):
        y, state = jax.jit(functools.partial(ssm.trapezoid, chunk_size=chunk_size))(**inputs, **positions)
        assert_close(y[positions["mask"]], expected[positions["mask"]])
        assert_close(state, TrapezoidState(*expected_state))


def test_no_gradient_crosses_a_segment_boundary(x64):
    inputs = make_inputs(20)
    segment_ids = jnp.repeat(jnp.array([[0, 1], [0, 1]]), 10, axis=1)

    @jax.jit
    @jax.grad
    def later(changed):
        return ssm.trapezoid(**(inputs | changed), segment_ids=segment_ids, chunk_size=8)[0][:, 10:].sum()

    names = ("v", "k", "q", "dt", "A", "lam", "initial_state")
    gradients = later({name: inputs[name] for name in names})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients.pop("initial_state")))
    for name, gradient in gradients.items():
        # The gradient of a decay sums what the positions behind it gave: up to rounding, that is 0 across a boundary.
        assert np.abs(gradient[:, :10]).max() <= (1e-14 if name in ("dt", "A") else 0), name
        assert np.all(gradient[:, 11:]), name


def test_an_empty_sequence_returns_its_state():
    inputs = make_inputs(0)
    y, state = ssm.trapezoid(**inputs)
    assert y.shape == (2, 0, 1, 3, 4)
    assert_close(state, inputs["initial_state"])


def test_flops_double_with_the_length():
    def flops(length):
        # XLA counts the body of a loop once, so take the program where all chunks are one group.
        program = jax.jit(ssm.trapezoid).trace(**make_inputs(length, b=1, p=8, n=8))
        return program.lower(lowering_platforms=("tpu",)).cost_analysis()["flops"]

    assert flops(1024) < 2.2 * flops(512)  # 2.10 measured: the next position that is there is found in log l turns


@pytest.mark.parametrize("rank", [1, 4])
def test_a_step_costs_what_the_recurrence_needs(rank):
    b, h, p, n = 2, 8, 16, 32
    inputs = make_inputs(1, rank, b=b, h=h, p=p, n=n)
    state = inputs.pop("initial_state")
    at_once = {name: a if name == "D" else a[:, 0] for name, a in inputs.items()}
    flops = jax.jit(ssm.trapezoid_step).lower(state, **at_once).compile().cost_analysis()["flops"]
    # Decay; an outer product and its sum for both ends and each rank; product with q and its sum for each rank.
    needed = b * h * p * n * (1 + 2 * 2 * rank + 2 * rank)
    # Beside the state, weights of values and the skip: 4 r p for every n (1 + 6 r) p.
    assert flops <= 1.05 * needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 5, 2, 3, 6))}, r"k has shape \(2, 5, 2, 3, 6\), expected \(b, l, r, h, n\) with"),
        ({"q": jnp.zeros((2, 5, 1, 3, 5))}, r"q has shape .* with b=2, l=5, r=1, h=3, n=6"),
        ({"lam": jnp.zeros((2, 5, 2))}, r"lam has shape \(2, 5, 2\), expected \(b, l, h\) with b=2, l=5, h=3"),
        ({"mask": jnp.ones((2, 4), bool)}, r"mask has shape \(2, 4\), expected \(b, l\) with b=2, l=5"),
        (
            {
                "initial_state": TrapezoidState(
                    jnp.zeros((2, 3, 6, 4)), jnp.zeros((2, 1, 3, 6)), jnp.zeros((2, 1, 3, 4))
                )
            },
            r"h has shape \(2, 3, 6, 4\), expected \(b, h, p, n\)",
        ),
        (
            {"initial_state": TrapezoidState(jnp.zeros((2, 3, 4, 6)), jnp.zeros((2, 1, 3, 6)), jnp.zeros((2, 3, 4)))},
            r"v_in has shape \(2, 3, 4\), expected \(b, r, h, p\)",
        ),
        ({"chunk_size": 0}, "chunk_size=0, expected at least 1"),
    ],
)
def test_errors_name_the_argument(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(ssm.trapezoid)(**(make_inputs(5) | change))
