"""Vision Mamba's mixer: its formulas written out, padded and packed rows, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, jitted, normal, with_random_parameters

D_MODEL, LENGTH = 6, 9
CONFIG = ssm.MambaConfig(d_state=3, d_conv=4, dt_rank=2)


def make(config=CONFIG, dtype="float64"):
    return with_random_parameters(lambda: ssm.Vim(D_MODEL, config, param_dtype=dtype, rngs=nnx.Rngs(0)))


def make_input(length=LENGTH):
    return normal(jax.random.key(1), 2, length, D_MODEL)


def silu(x):
    return x / (1 + np.exp(-x))


def one_direction(direction, x, z):
    """Position by position, as the official code's algorithm 1 reads for one row."""
    taps, bias = (np.asarray(p[...]) for p in (direction.conv1d.kernel, direction.conv1d.bias))
    padded = np.concatenate([np.zeros((taps.shape[1] - 1, x.shape[1])), x])
    u = silu(np.stack([(padded[t : t + taps.shape[1]].T * taps).sum(1) for t in range(len(x))]) + bias)
    low_rank, B, C = np.split(u @ np.asarray(direction.x_proj.kernel[...]), [2, 5], axis=1)
    delta = np.log1p(
        np.exp(low_rank @ np.asarray(direction.dt_proj.kernel[...]) + np.asarray(direction.dt_proj.bias[...]))
    )
    A, D = -np.exp(np.asarray(direction.A_log[...])), np.asarray(direction.D[...])
    h, y = np.zeros(A.shape), []
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * A) * h + delta[t][:, None] * B[t] * u[t][:, None]
        y.append((h @ C[t] + D * u[t]) * silu(z[t]))
    return np.stack(y)


def test_equals_its_formulas_written_out(x64):
    mixer, inputs = make(), make_input()
    call, params = jitted(mixer)
    expected = []
    for row in np.asarray(inputs):
        x, z = np.split(row @ np.asarray(mixer.in_proj.kernel[...]), 2, axis=1)
        back = one_direction(mixer.backward, x[::-1], z[::-1])[::-1]
        expected.append((one_direction(mixer.forward, x, z) + back) / 2 @ np.asarray(mixer.out_proj.kernel[...]))
    assert_close(call(params, inputs), jnp.asarray(np.stack(expected)))


def test_is_two_mambas_that_share_their_projections(x64):
    mixer, x = make(), make_input()
    mambas = [ssm.Mamba(D_MODEL, CONFIG, param_dtype="float64", rngs=nnx.Rngs(0)) for _ in range(2)]
    for mamba, direction in zip(mambas, (mixer.forward, mixer.backward), strict=True):
        for part in ("in_proj", "out_proj"):
            nnx.update(getattr(mamba, part), nnx.state(getattr(mixer, part)))
        for name in ("conv1d", "x_proj", "dt_proj"):
            nnx.update(getattr(mamba, name), nnx.state(getattr(direction, name)))
        mamba.A_log[...], mamba.D[...] = direction.A_log[...], direction.D[...]
    both, params = jitted(ssm.Bidirectional(*mambas))
    call, ours = jitted(mixer)
    assert_close(call(ours, x), both(params, x))


def test_padding_and_packing_change_nothing(x64):
    call, params = jitted(make())
    x = make_input(8)
    there = jnp.asarray([[True] * 4 + [False] * 4, [False] * 4 + [True] * 4])
    alone = call(params, x[:, :4]), call(params, x[:, 4:])
    y = call(params, x, mask=there)
    assert_close((y[0, :4], y[1, 4:]), (alone[0][0], alone[1][1]))
    packed = call(params, x, segment_ids=jnp.asarray([[1, 1, 1, 1, 0, 0, 0, 0]] * 2))
    assert_close((packed[:, :4], packed[:, 4:]), alone)


def test_bfloat16_is_near_float32_and_keeps_its_state_in_it():
    x = make_input().astype(jnp.float32)
    call, params = jitted(make(dtype="float32"))
    half = ssm.Vim(D_MODEL, CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, params)
    rounded, _ = jitted(half)
    y = rounded(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), call(params, x), tolerance=4e-2)  # three projections, each rounded to 8 bits


def test_errors():
    with pytest.raises(ValueError, match="causal=True: the mixer reads both ways, expected causal=False"):
        ssm.Vim(D_MODEL, causal=True, rngs=nnx.Rngs(0))
    mixer = make(dtype="float32")
    for act in (lambda: mixer.init_state(1), lambda: mixer.extend(jnp.zeros((1, 2, D_MODEL)), None)):
        with pytest.raises(ValueError, match="a bidirectional mixer has no state"):
            act()
