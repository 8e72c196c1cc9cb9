"""Linear attention with a decay: a loop over positions, a matrix, causal attention; and how its mixer starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from ssm import reference
from tests.numerics import assert_close, make_positions, normal, with_random_parameters
from tests.ssm.test_mixers import flat

# What is left is causal attention without softmax: nothing beside it.
BARE = ssm.LinearAttentionConfig(n_heads=4, n_kv_heads=2, activation="identity", norm=False, gate=False, chunk_size=3)


def make_inputs(length, *, b=2, h=4, k=2, p=3, n=5):
    """Arguments whose decays cover nearly 0 to nearly 1, with two heads to a key."""
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "q": normal(keys[0], b, length, h, n),
        "k": normal(keys[1], b, length, k, n),
        "v": normal(keys[2], b, length, k, p),
        "log_decay": -jax.nn.softplus(normal(keys[3], b, length, h)) * jnp.exp(normal(keys[3], h)),
        "initial_state": normal(keys[4], b, h, p, n),
    }


@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 63, 64, 100)), 65])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_loop_over_positions_in_value_and_every_gradient(x64, length, packed):
    inputs, positions = make_inputs(length), make_positions(length) if packed else {}
    weights = normal(jax.random.key(8), 2, length, 4, 3), normal(jax.random.key(9), 2, 4, 3, 5)

    def total(op, inputs):
        out = op(**inputs, **positions)
        return sum(jnp.sum(a * w) for a, w in zip(out, weights, strict=True)), out

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(total, op), has_aux=True))(inputs)
        for op in (ssm.linear_attention, reference.linear_attention)
    )
    assert_close(found[0][1], expected[0][1])
    for name in inputs:
        assert_close(found[1][name], expected[1][name], gradient=True, name=name)


def test_is_its_matrix_times_the_values(x64):
    inputs = make_inputs(20) | {"initial_state": None}
    y, _ = jax.jit(functools.partial(ssm.linear_attention, chunk_size=8))(**inputs)
    until = jnp.cumsum(inputs["log_decay"], axis=1)
    k, v = (jnp.repeat(inputs[name], 2, axis=2) for name in ("k", "v"))
    decay = jnp.exp(until[:, :, None] - until[:, None])  # b q s h
    matrix = jnp.where(jnp.tri(20, dtype=bool)[None, :, :, None], decay, 0) * jnp.einsum(
        "bqhn,bshn->bqsh", inputs["q"], k
    )
    assert_close(y, jnp.einsum("bqsh,bshp->bqhp", matrix, v))


def test_a_step_is_a_sequence_of_one(x64):
    inputs = make_inputs(1)
    y, after = jax.jit(ssm.linear_attention)(**inputs)
    state = inputs.pop("initial_state")
    step = jax.jit(ssm.linear_attention_step)(state, **{name: x[:, 0] for name, x in inputs.items()})
    assert_close(step, (y[:, 0], after))


def test_heads_that_do_not_divide_are_named(unchecked):
    inputs = make_inputs(2, k=3) | {"initial_state": None}
    with pytest.raises(ValueError, match="k and v have 3 heads, expected a number that divides the 4 of q"):
        ssm.linear_attention(**inputs)


def make_mixer(config, d_model=8, **kwargs):
    build = lambda: ssm.LinearAttention(d_model, config, param_dtype=jnp.float64, **kwargs, rngs=nnx.Rngs(0))  # noqa: E731
    return with_random_parameters(build)


def let_through(mixer):
    """Makes the decay 1 and the convolution the identity."""
    mixer.A_log[...] = jnp.full_like(mixer.A_log[...], -jnp.inf)
    mixer.conv1d.kernel[...] = jnp.zeros_like(mixer.conv1d.kernel[...]).at[:, -1].set(1)
    mixer.conv1d.bias[...] = jnp.zeros_like(mixer.conv1d.bias[...])
    return mixer


def causal_attention_without_softmax(x, p, heads, groups):
    """Plain products: sum_{s <= t} (q_t . k_s) v_s in each head, keys and values repeated."""
    length = x.shape[1]
    q = (x @ p["q_proj/kernel"]).reshape(*x.shape[:2], heads, -1)
    k, v = ((x @ p[f"{name}/kernel"]).reshape(*x.shape[:2], groups, -1) for name in ("k_proj", "v_proj"))
    k, v = (np.repeat(m, heads // groups, axis=2) for m in (k, v))
    scores = np.einsum("bqhp,bshp->bhqs", q, k) * np.tri(length)
    return np.einsum("bhqs,bshp->bqhp", scores, v).reshape(*x.shape[:2], -1) @ p["o_proj/kernel"]


@pytest.mark.parametrize("open_gate", [False, True])
def test_without_decay_convolution_norm_and_gate_it_is_causal_attention_without_softmax(x64, open_gate):
    config = dataclasses.replace(BARE, gate=open_gate, gate_bias=open_gate)
    mixer = let_through(make_mixer(config))
    if open_gate:  # as it starts, but for its kernel
        mixer.gate_proj.kernel[...] = jnp.zeros_like(mixer.gate_proj.kernel[...])
        mixer.gate_proj.bias[...] = ssm.LinearAttention(8, config, rngs=nnx.Rngs(0)).gate_proj.bias[...].astype(float)
    x = normal(jax.random.key(1), 2, 9, 8)
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}
    expected = causal_attention_without_softmax(np.asarray(x), p, 4, 2)
    assert_close(jax.jit(mixer.__call__)(x), expected, tolerance=1e-7 if open_gate else None)  # the bias is a float32


def silu(x):
    return x / (1 + np.exp(-x))


def test_output_is_the_formula(x64):
    """Position by position and head by head, in numpy."""
    config = ssm.LinearAttentionConfig(n_heads=4, n_kv_heads=2, d_conv=3, norm_eps=0.1, gate_bias=True, bias=True)
    mixer = make_mixer(config, 12)
    x = np.asarray(normal(jax.random.key(1), 1, 7, 12))[0]
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}

    def linear(name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)

    vkq = np.concatenate([linear("v_proj"), linear("k_proj"), linear("q_proj")], axis=1)
    padded = np.concatenate([np.zeros((2, vkq.shape[1])), vkq])
    taps = sum(padded[j : j + 7] * p["conv1d/kernel"][:, j] for j in range(3))
    v, k, q = np.split(silu(taps + p["conv1d/bias"]), (6, 12), axis=1)
    dt = np.log1p(np.exp(linear("dt_proj") + p["dt_bias"]))
    y = np.zeros((7, 12))
    for head in range(4):
        own, shared = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        state = np.zeros((3, 3))
        for t in range(7):
            # The step size sets the decay alone: it does not scale the input.
            state = np.exp(-np.exp(p["A_log"][head]) * dt[t, head]) * state + np.outer(v[t, shared], k[t, shared])
            out = state @ q[t, own]
            y[t, own] = out / np.sqrt(np.mean(out**2) + 0.1) * p["norm/scale"]
    expected = (y * silu(linear("gate_proj"))) @ p["o_proj/kernel"] + p["o_proj/bias"]
    assert_close(jax.jit(mixer.__call__)(x[None])[0], expected)


def test_starts_as_mamba2_or_to_mimic_attention():
    def start(init):
        config = ssm.LinearAttentionConfig(n_heads=32, head_dim=4, init=init, gate_bias=True)
        return {
            path: np.asarray(param[...])
            for path, param in flat(ssm.LinearAttention(64, config, rngs=nnx.Rngs(0))).items()
        }

    plain, mimic = start("mamba2"), start("mimic")
    for p in (plain, mimic):
        dt = np.log1p(np.exp(p["dt_bias"]))
        assert 0.001 * (1 - 1e-3) <= dt.min() < 0.003 < 0.03 < dt.max() <= 0.1 * (1 + 1e-3)
        assert np.allclose(silu(p["gate_proj/bias"]), 1)
    assert 1 <= np.exp(plain["A_log"]).min() < 4 < 12 < np.exp(plain["A_log"]).max() <= 16
    assert np.any(plain["dt_proj/kernel"])
    assert np.abs(plain["conv1d/kernel"]).max() <= 2**-0.5
    decay = np.exp(-np.exp(mimic["A_log"]) * np.log1p(np.exp(mimic["dt_bias"])))
    assert 0.761 < decay.min() < 0.85 < 0.98 < decay.max() < 0.998
    assert not np.any(mimic["dt_proj/kernel"])
    assert np.array_equal(mimic["conv1d/kernel"], np.tile([0.0, 1.0], (3 * 128, 1)))
    assert not np.any(mimic["conv1d/bias"])
    bound = 2**-2.5 * (6 / (64 + 128)) ** 0.5
    assert 0.95 * bound < np.abs(mimic["gate_proj/kernel"]).max() <= bound * (1 + 1e-6)
