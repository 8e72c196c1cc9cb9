"""The Mamba-3 mixer: the formula in plain numpy, how it starts, and its angles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from ssm.mamba3 import accumulate_turns, rotate
from tests.numerics import assert_close, normal, with_random_parameters
from tests.ssm.test_mixers import flat

SISO = ssm.Mamba3Config(d_state=8, head_dim=4)
CONFIGS = {
    "siso": SISO,
    "siso with options": dataclasses.replace(
        SISO,
        n_groups=2,
        is_outproj_norm=True,
        A_activation="softplus",
        A_floor=0.5,
        norm_eps=0.1,
        rope_fraction=0.8,  # 6 of 8 channels
    ),
    "mimo": dataclasses.replace(SISO, is_mimo=True, mimo_rank=2),
    "mimo with options": dataclasses.replace(
        SISO, is_mimo=True, mimo_rank=3, n_groups=2, is_outproj_norm=True, rope_fraction=1.0, A_floor=0.7, norm_eps=0.1
    ),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def formula(x, p, config, d_inner):
    """The mixer in numpy, position by position, head by head, rank by rank. x: l d."""
    length, n, width, groups = len(x), config.d_state, config.head_dim, config.n_groups
    heads, rank = d_inner // width, config.mimo_rank if config.is_mimo else 1
    angles = int(n * config.rope_fraction) // 2
    maps = rank * groups * n
    columns = np.cumsum([d_inner, d_inner, maps, maps, heads, heads, heads, angles])
    z, x, B, C, dt, A, trap, angle, rest = np.split(x @ p["in_proj/kernel"], columns, axis=-1)
    assert rest.shape[1] == 0
    B, C = (m.reshape(length, rank, groups, n) for m in (B, C))
    dt, lam = np.log1p(np.exp(dt + p["dt_bias"])), sigmoid(trap)
    rates = {"softplus": np.log1p(np.exp(A)), "heavy_tail": np.where(A > 0, 1 + A, 1 / (1 + np.abs(A)))}
    rate = np.maximum(rates[config.A_activation], config.A_floor)

    def rms(v):
        return v / np.sqrt(np.mean(v**2) + config.norm_eps)

    def prepared(m, name, t, r, head, theta):
        """One key or query: normalised, biased, its pairs turned as complex numbers."""
        m = rms(m[t, r, head // (heads // groups)]) * p[f"{name}_norm/scale"] + p[f"{name}_bias"][head, r]
        for s in range(angles):
            i, j = (s, s + n // 2) if config.is_mimo else (2 * s, 2 * s + 1)
            turned = (m[i] + 1j * m[j]) * np.exp(1j * theta[s])
            m[i], m[j] = turned.real, turned.imag
        return m

    one = np.ones((heads, 1, width))
    mimo_x, mimo_z, mimo_o = (p.get(f"mimo_{name}", one) for name in "xzo")
    out = np.zeros((length, d_inner))
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        h, theta = np.zeros((width, n)), np.zeros(angles)
        last_v, last_k = np.zeros((rank, width)), np.zeros((rank, n))
        for t in range(length):
            step, weight = dt[t, head], lam[t, head]
            theta = theta + np.pi * np.tanh(angle[t]) * step
            k, q = ([prepared(m, name, t, r, head, theta) for r in range(rank)] for m, name in ((B, "B"), (C, "C")))
            v = [x[t, channels] * mimo_x[head, r] for r in range(rank)]
            decay = np.exp(-rate[t, head] * step)
            h = decay * h
            for r in range(rank):
                h = h + (1 - weight) * step * decay * np.outer(last_v[r], last_k[r])
                h = h + weight * step * np.outer(v[r], k[r])
            for r in range(rank):
                y = h @ q[r] + p["D"][head] * v[r]
                if config.is_outproj_norm:
                    y = rms(y) * p["norm/scale"][channels]
                gate = z[t, channels] * mimo_z[head, r]
                out[t, channels] += mimo_o[head, r] * y * gate * sigmoid(gate)
            last_v, last_k = v, k
    return out @ p["out_proj/kernel"]


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_the_formula(x64, name):
    config = CONFIGS[name]
    mixer = with_random_parameters(lambda: ssm.Mamba3(8, config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = normal(jax.random.key(1), 1, 7, 8)
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}
    assert_close(jax.jit(mixer.__call__)(x)[0], formula(np.asarray(x[0]), p, config, 16))


def test_sizes_are_those_of_the_official_module():
    def shapes(d_model, config):
        abstract = nnx.eval_shape(lambda: ssm.Mamba3(d_model, config, rngs=nnx.Rngs(0)))
        return {path: param.shape for path, param in flat(abstract).items()}

    siso = {
        "in_proj/kernel": (768, 2 * 1536 + 2 * 128 + 3 * 24 + 32),
        "dt_bias": (24,),
        "B_bias": (24, 1, 128),
        "C_bias": (24, 1, 128),
        "B_norm/scale": (128,),
        "C_norm/scale": (128,),
        "D": (24,),
        "out_proj/kernel": (1536, 768),
    }
    assert shapes(768, ssm.Mamba3Config()) == siso
    mimo = ssm.Mamba3Config(is_mimo=True, n_groups=2, rope_fraction=1.0, is_outproj_norm=True)
    assert shapes(768, mimo) == siso | {
        "in_proj/kernel": (768, 2 * 1536 + 2 * 4 * 2 * 128 + 3 * 24 + 64),
        "norm/scale": (1536,),
        **{f"{name}_bias": (24, 4, 128) for name in "BC"},
        **{f"mimo_{name}": (24, 4, 64) for name in "xzo"},
    }


def test_starts_as_the_official_module_does():
    config = ssm.Mamba3Config(d_state=4, head_dim=1, is_mimo=True, is_outproj_norm=True)
    mixer = ssm.Mamba3(64, config, rngs=nnx.Rngs(0))
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}
    dt = np.log1p(np.exp(p["dt_bias"]))
    assert 0.001 * (1 - 1e-3) <= dt.min() <= dt.max() <= 0.1 * (1 + 1e-3)
    assert 0.3 < np.mean(dt < 0.01) < 0.7  # log-uniform
    ones = ("B_bias", "C_bias", "D", "B_norm/scale", "C_norm/scale", "norm/scale", "mimo_z")
    assert {path for path in p if np.all(p[path] == 1)} == set(ones)
    assert np.all(p["mimo_x"] == 1 / 4)
    assert np.all(p["mimo_o"] == 1 / 4)


def test_rotations_pair_neighbours_or_halves(x64):
    theta = jnp.asarray([np.pi / 2])
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    assert_close(rotate(x, theta, neighbours=True), jnp.asarray([-2.0, 1.0, 3.0, 4.0]))
    assert_close(rotate(x, theta, neighbours=False), jnp.asarray([-3.0, 2.0, 1.0, 4.0]))


# In turns. Additions round, at random: a plain sum in float32 is off by 1e-4 and more of a thousand turns.
@pytest.mark.parametrize(("low", "high", "allowed"), [(-0.05, 0.15, 5e-6), (-1e-7, 0, 1e-9)])
def test_angles_stay_exact_over_20_000_positions(low, high, allowed):
    turns = np.random.default_rng(0).uniform(low, high, (1, 20_000, 1, 2)).astype(np.float32)
    sums = np.asarray(jax.jit(accumulate_turns)(turns), np.float64)
    exact = np.cumsum(turns.astype(np.float64), axis=1)
    error = sums - exact
    assert np.abs(sums).max() <= 0.5
    assert np.abs(error - np.round(error)).max() < allowed


def test_turns_go_on_from_before_and_start_again_with_a_segment(x64):
    turns = normal(jax.random.key(0), 2, 6, 1, 2)
    before = normal(jax.random.key(1), 2, 1, 2)
    ids = np.array([[0, 0, 0, 1, 1, 0], [2, 3, 3, 3, 3, 3]])
    expected, total = [], np.array(before)
    for t in range(6):
        if t:
            total = np.where((ids[:, t] != ids[:, t - 1])[:, None, None], 0, total)
        total = total + np.asarray(turns[:, t])
        expected.append(total)
    error = accumulate_turns(turns, before, jnp.asarray(ids)) - np.stack(expected, axis=1)
    assert np.abs(error - np.round(error)).max() < 1e-12
