"""Positions that are not there: nothing that lies at them has a part in a value or a gradient."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from ssm.absent import blank, check_no_gaps
from tests.numerics import normal, with_random_parameters

B, L, H, N = 2, 6, 2, 4
MASK = jnp.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
SHAPES = {
    "selective_scan": {"u": (4,), "delta": (4,), "B": (N,), "C": (N,), "z": (4,)},
    "ssd": {"x": (H, 3), "dt": (H,), "B": (1, N), "C": (1, N)},
    "linear_attention": {"q": (H, N), "k": (1, N), "v": (1, 3), "log_decay": (H,)},
    "trapezoid": {"v": (1, H, 3), "k": (1, H, N), "q": (1, H, N), "dt": (H,), "A": (H,), "lam": (H,)},
    "causal_conv1d": {"x": (3,)},
}
CONSTANT = {
    "selective_scan": {"A": -jnp.ones((4, N)), "D": jnp.ones(4)},
    "ssd": {"A": -jnp.ones(H), "D": jnp.ones(H)},
    "trapezoid": {"D": jnp.ones(H)},
    "causal_conv1d": {"weight": jnp.ones((3, 3)) / 2, "bias": jnp.ones(3)},
}


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_operations_take_no_notice_of_what_is_not_there(name, junk):
    op = getattr(ssm, name)
    inputs = {n: normal(jax.random.key(i), B, L, *shape) for i, (n, shape) in enumerate(SHAPES[name].items())}
    for positive in {"delta", "dt", "lam"} & inputs.keys():
        inputs[positive] = jax.nn.sigmoid(inputs[positive])
    for negative in {"A", "log_decay"} & inputs.keys():
        inputs[negative] = -jax.nn.sigmoid(inputs[negative])

    @jax.jit
    def run(inputs, constant):
        def total(inputs, constant):
            y, state = op(**inputs, **constant, mask=MASK)
            return jnp.sum(blank(MASK, y) ** 2) + sum(jnp.sum(s) for s in jax.tree.leaves(state)), (y, state)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(inputs, constant)

    constant = CONSTANT.get(name, {})
    (_, (y, state)), gradients = run({n: blank(MASK, x) for n, x in inputs.items()}, constant)
    filled = {n: jnp.where(blank(MASK, jnp.ones_like(x)) == 1, x, junk) for n, x in inputs.items()}
    (_, (y_junk, state_junk)), gradients_junk = run(filled, constant)
    for a, b in zip(*map(jax.tree.leaves, ((y, state, gradients), (y_junk, state_junk, gradients_junk))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    assert "mask" in inspect.signature(op).parameters


def test_a_step_takes_no_notice_either():
    state = ssm.TrapezoidState(jnp.ones((B, H, 3, N)), jnp.ones((B, 1, H, N)), jnp.ones((B, 1, H, 3)))
    inputs = {n: normal(jax.random.key(i), B, *shape) for i, (n, shape) in enumerate(SHAPES["trapezoid"].items())}
    here = jnp.array([True, False])

    def total(inputs):
        y, after = ssm.trapezoid_step(state, **inputs, mask=here)
        return jnp.sum(jnp.where(here[:, None, None, None], y, 0)) + sum(jnp.sum(x) for x in after)

    run = jax.jit(jax.value_and_grad(total))
    value, gradients = run({n: x.at[1].set(0) for n, x in inputs.items()})
    filled, of_filled = run({n: x.at[1].set(jnp.nan) for n, x in inputs.items()})
    np.testing.assert_array_equal(value, filled)
    jax.tree.map(np.testing.assert_array_equal, gradients, of_filled)


MIXERS = {
    "mamba": lambda: ssm.Mamba(8, ssm.MambaConfig(d_state=4, dt_rank=2), rngs=nnx.Rngs(0)),
    "vim": lambda: ssm.Vim(8, ssm.MambaConfig(d_state=4, dt_rank=2), rngs=nnx.Rngs(0)),
    "mamba3": lambda: ssm.Mamba3(8, ssm.Mamba3Config(d_state=4, head_dim=4), rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_by_themselves_take_no_notice(name):
    graphdef, params = nnx.split(with_random_parameters(MIXERS[name]))
    x = normal(jax.random.key(1), B, L, 8, dtype=jnp.float32)

    @jax.jit
    def run(params, x):
        def total(params, x):
            return jnp.sum(blank(MASK, nnx.merge(graphdef, params)(x, mask=MASK)) ** 2)

        return jax.value_and_grad(total, argnums=(0, 1))(params, x)

    expected, actual = (run(params, jnp.where(MASK[..., None], x, junk)) for junk in (0, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))


GAP = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]], bool)


@pytest.mark.slow
def test_a_gap_is_refused_where_a_convolution_would_see_it(unchecked):
    x = jnp.zeros((2, 6, 8))
    message = r"mask\[1, 3\] is False between positions that are there, expected padding at the ends alone"
    mamba = MIXERS["mamba"]()
    two = ssm.Bidirectional(mamba, MIXERS["mamba"]())
    calls = [mamba, MIXERS["vim"](), two, lambda x, mask: mamba.extend(x, mamba.init_state(2), mask=mask)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(x, mask=jnp.asarray(GAP))
    MIXERS["mamba3"]()(x, mask=jnp.asarray(GAP))  # has none
    one_tap = ssm.Mamba(8, ssm.MambaConfig(d_state=4, d_conv=1), rngs=nnx.Rngs(0))
    one_tap(x, mask=jnp.asarray(GAP))
    jax.eval_shape(lambda x, mask: mamba(x, mask=mask), x, GAP)  # not known


def test_padding_and_empty_rows_are_no_gaps():
    check_no_gaps(None)
    check_no_gaps(MASK)
    check_no_gaps(np.zeros((2, 3), bool))
    check_no_gaps(np.ones((2, 0), bool))
