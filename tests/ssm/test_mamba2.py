"""The Mamba-2 mixer: the formula in plain numpy, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters
from tests.ssm.test_mixers import flat

CONFIGS = {
    "default": ssm.Mamba2Config(d_state=5, head_dim=4),
    "options": ssm.Mamba2Config(
        d_state=5,
        d_conv=3,
        head_dim=2,
        n_groups=2,
        d_ssm=8,
        norm_before_gate=True,
        norm_eps=0.1,
        D_has_hdim=True,
        dt_limit=(0.5, 1.2),
        conv_bias=False,
        bias=True,
    ),
    "groups normalised after the gate": ssm.Mamba2Config(d_state=5, head_dim=2, n_groups=4, d_ssm=8),
    "no norm": ssm.Mamba2Config(d_state=5, head_dim=4, rmsnorm=False),
}


def silu(x):
    return x / (1 + np.exp(-x))


def formula(x, p, config, d_inner):
    """Figure 6 of the paper in numpy, position by position and head by head. x: l d."""
    length, n, groups, width = len(x), config.d_state, config.n_groups, config.head_dim
    d_ssm = config.d_ssm or d_inner
    heads, gated = d_ssm // width, d_inner - d_ssm
    bias = (lambda name: p[f"{name}/bias"]) if config.bias else (lambda name: 0)
    columns = np.cumsum([gated, gated, d_ssm, d_ssm, groups * n, groups * n])
    z0, x0, z, x, B, C, dt = np.split(x @ p["in_proj/kernel"] + bias("in_proj"), columns, axis=-1)
    xBC = np.concatenate([x, B, C], axis=-1)
    padded = np.concatenate([np.zeros((config.d_conv - 1, xBC.shape[1])), xBC])
    taps = sum(padded[j : j + length] * p["conv1d/kernel"][:, j] for j in range(config.d_conv))
    x, B, C = np.split(silu(taps + p.get("conv1d/bias", 0)), (d_ssm, d_ssm + groups * n), axis=-1)
    dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *config.dt_limit)
    D = p["D"] if config.D_has_hdim else np.repeat(p["D"], width)

    y = np.zeros((length, d_ssm))
    for head in range(heads):
        channels, group = slice(head * width, (head + 1) * width), head // (heads // groups)
        h, maps = np.zeros((width, n)), slice(group * n, (group + 1) * n)
        for t in range(length):
            step = dt[t, head]
            h = np.exp(-np.exp(p["A_log"][head]) * step) * h + step * np.outer(x[t, channels], B[t, maps])
            y[t, channels] = h @ C[t, maps] + D[channels] * x[t, channels]

    def normed(y):
        if not config.rmsnorm:
            return y
        parts = np.split(y, groups, axis=-1)
        over = [part / np.sqrt(np.mean(part**2, -1, keepdims=True) + config.norm_eps) for part in parts]
        return np.concatenate(over, axis=-1) * p["norm/scale"]

    y = normed(y) * silu(z) if config.norm_before_gate else normed(y * silu(z))
    return np.concatenate([silu(z0) * x0, y], axis=-1) @ p["out_proj/kernel"] + bias("out_proj")


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_the_formula(x64, name):
    mixer = with_random_parameters(lambda: ssm.Mamba2(8, CONFIGS[name], param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = normal(jax.random.key(1), 1, 7, 8)
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}
    assert_close(jax.jit(mixer.__call__)(x)[0], formula(np.asarray(x[0]), p, CONFIGS[name], 16))


def test_step_sizes_are_clipped_in_steps_too(x64):
    config = CONFIGS["options"]
    mixer = with_random_parameters(lambda: ssm.Mamba2(8, config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    x = normal(jax.random.key(1), 1, 1, 8)
    p = {path: np.asarray(param[...]) for path, param in flat(mixer).items()}
    y, _ = jax.jit(mixer.extend)(x, mixer.init_state(1))
    assert_close(y[0], formula(np.asarray(x[0]), p, config, 16))


@pytest.fixture(scope="module")
def fresh():
    """A mixer as it starts, with many heads."""
    return ssm.Mamba2(64, ssm.Mamba2Config(d_state=16, head_dim=1, n_groups=2), rngs=nnx.Rngs(0))


def test_sizes_are_those_of_the_published_models():
    def shapes(d_model, config):
        abstract = nnx.eval_shape(lambda: ssm.Mamba2(d_model, config, rngs=nnx.Rngs(0)))
        return {path: param.shape for path, param in flat(abstract).items()}

    assert shapes(768, ssm.Mamba2Config()) == {  # mamba2-130m
        "in_proj/kernel": (768, 3352),
        "conv1d/kernel": (1792, 4),
        "conv1d/bias": (1792,),
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "norm/scale": (1536,),
        "out_proj/kernel": (1536, 768),
    }
    options = shapes(8, CONFIGS["options"])
    assert options == {
        "in_proj/kernel": (8, 16 + 16 + 2 * 2 * 5 + 4),
        "in_proj/bias": (56,),
        "conv1d/kernel": (28, 3),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (8,),
        "norm/scale": (8,),
        "out_proj/kernel": (16, 8),
        "out_proj/bias": (8,),
    }
    assert "norm/scale" not in shapes(8, CONFIGS["no norm"])


def test_starts_as_the_paper_says(fresh):
    p = {path: np.asarray(param[...]) for path, param in flat(fresh).items()}
    rates, dt = np.exp(p["A_log"]), np.log1p(np.exp(p["dt_bias"]))
    assert 1 <= rates.min() < 2 < 15 < rates.max() <= 16
    assert 7.5 < rates.mean() < 9.5  # uniform, of 128 heads
    assert 0.001 * (1 - 1e-3) <= dt.min() <= dt.max() <= 0.1 * (1 + 1e-3)
    assert 0.3 < np.mean(dt < 0.01) < 0.7  # log-uniform
    assert np.all(p["D"] == 1)
    assert np.all(p["norm/scale"] == 1)
    for name in ("conv1d/kernel", "conv1d/bias"):
        assert np.abs(p[name]).max() <= 0.5
        assert abs(p[name].std() * 2 * 3**0.5 - 1) < 0.15


def test_initial_values_take_their_options():
    config = ssm.Mamba2Config(
        d_state=16, head_dim=1, A_min=2.0, A_max=3.0, dt_min=1e-6, dt_max=2.0, dt_floor=0.5, conv_init=0.01, bias=True
    )
    p = {path: np.asarray(param[...]) for path, param in flat(ssm.Mamba2(64, config, rngs=nnx.Rngs(0))).items()}
    rates, dt = np.exp(p["A_log"]), np.log1p(np.exp(p["dt_bias"]))
    assert 2 <= rates.min() < 2.2 < 2.8 < rates.max() <= 3
    assert np.isclose(dt.min(), 0.5)
    assert 1 < dt.max() < 2
    assert 0.009 < np.abs(p["conv1d/kernel"]).max() <= 0.01
    assert np.abs(p["conv1d/bias"]).max() > 0.4
    assert not np.any(p["in_proj/bias"])
    assert not np.any(p["out_proj/bias"])
