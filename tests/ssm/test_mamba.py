"""The Mamba mixer: the formula, how it starts, and its two implementations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
from tests.numerics import assert_close, normal, with_random_parameters
from tests.ssm.test_mixers import flat

D_MODEL = 6
CONFIG = ssm.MambaConfig(d_state=4, d_conv=4, dt_rank=2, bias=True)


def make_mixer(config=CONFIG, param_dtype="float64", **kwargs):
    """A mixer in which every parameter, biases included, matters."""
    kwargs = {"dtype": jnp.dtype(param_dtype), "param_dtype": jnp.dtype(param_dtype)} | kwargs
    return with_random_parameters(lambda: ssm.Mamba(D_MODEL, config, **kwargs, rngs=nnx.Rngs(0)))


def make_input(length, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
def test_is_causal(implementation):
    mixer = make_mixer(dataclasses.replace(CONFIG, implementation=implementation, chunk_size=3), "float32")
    jacobian = jax.jit(jax.jacrev(lambda x: mixer(x)[0]))(make_input(8, b=1))
    through_time = jnp.abs(jacobian).sum((1, 2, 4))
    assert not np.any(np.triu(through_time, 1))
    assert np.all(through_time[np.tril_indices(8)])


def test_gradients_are_finite_and_the_same_under_both_implementations(x64):
    x, weight = make_input(20), normal(jax.random.key(2), 2, 20, D_MODEL)

    def gradients(implementation):
        mixer = make_mixer(dataclasses.replace(CONFIG, implementation=implementation, chunk_size=8))
        graphdef, params = nnx.split(mixer)

        def loss(params, x):
            return jnp.sum(nnx.merge(graphdef, params)(x) * weight)

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))

    sequential, associative = gradients("sequential"), gradients("associative")
    assert_close(sequential, associative, gradient=True)
    assert all(np.all(np.isfinite(g)) and np.all(np.any(g)) for g in sequential)


def test_output_is_the_formula_of_figure_3(x64):
    """In matrices, position by position: project, convolve, scan with softplus steps, gate, project."""
    mixer = make_mixer()
    x = np.asarray(make_input(7, b=1))[0]
    p = {name: np.asarray(param[...]) for name, param in flat(mixer).items()}

    def silu(a):
        return a / (1 + np.exp(-a))

    u, z = np.split(x @ p["in_proj/kernel"] + p["in_proj/bias"], 2, axis=-1)
    padded = np.concatenate([np.zeros((3, u.shape[1])), u])
    u = silu(sum(padded[j : j + 7] * p["conv1d/kernel"][:, j] for j in range(4)) + p["conv1d/bias"])
    dt, B, C = np.split(u @ p["x_proj/kernel"], (2, 6), axis=-1)
    delta = np.log1p(np.exp(dt @ p["dt_proj/kernel"] + p["dt_proj/bias"]))
    h, ys = np.zeros((u.shape[1], 4)), []
    for t in range(7):
        decay = np.exp(-np.exp(p["A_log"]) * delta[t, :, None])
        h = decay * h + (delta[t] * u[t])[:, None] * B[t]
        ys.append((h @ C[t] + p["D"] * u[t]) * silu(z[t]))
    assert_close(mixer(jnp.asarray(x[None]))[0], np.stack(ys) @ p["out_proj/kernel"] + p["out_proj/bias"])


@pytest.fixture(scope="module")
def fresh():
    """A mixer as it starts, 12 deep, in the published shape: d_state 16, 4 taps, dt_rank d_model / 16."""
    return ssm.Mamba(40, residual_scale=12**-0.5, rngs=nnx.Rngs(0))


def test_sizes_default_to_the_published_ones(fresh):
    shapes = {name: param.shape for name, param in flat(fresh).items()}
    assert shapes == {
        "in_proj/kernel": (40, 160),
        "conv1d/kernel": (80, 4),
        "conv1d/bias": (80,),
        "x_proj/kernel": (80, 3 + 2 * 16),  # 40 / 16, rounded up
        "dt_proj/kernel": (3, 80),
        "dt_proj/bias": (80,),
        "A_log": (80, 16),
        "D": (80,),
        "out_proj/kernel": (80, 40),
    }


def test_state_space_starts_as_the_paper_says(fresh):
    assert_close(jnp.exp(fresh.A_log[...]), jnp.tile(jnp.arange(1.0, 17), (80, 1)))
    assert np.all(np.asarray(fresh.D[...]) == 1)
    dt = np.asarray(jax.nn.softplus(fresh.dt_proj.bias[...]))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    # Log-uniform: half of them below the geometric mean, where a uniform draw would have a tenth.
    assert 0.3 < np.mean(dt < 0.01) < 0.7


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj/kernel", 40**-0.5),
        ("x_proj/kernel", 80**-0.5),
        ("conv1d/kernel", 4**-0.5),
        ("conv1d/bias", 4**-0.5),
        ("dt_proj/kernel", 3**-0.5),
        ("out_proj/kernel", (80 * 12) ** -0.5),  # residual_scale included
    ],
)
def test_projections_start_uniform_within_one_over_root_fan_in(fresh, name, bound):
    values = np.asarray(flat(fresh)[name][...]) / bound
    assert np.abs(values).max() <= 1 + 1e-6
    assert abs(values.std() * 3**0.5 - 1) < 0.15  # uniform on [-1, 1] has variance 1/3
    assert abs(values.mean()) < 0.15


def test_step_size_options_change_the_start():
    config = ssm.MambaConfig(dt_min=1e-6, dt_max=2.0, dt_floor=0.5, dt_scale=2.0, dt_init="constant", dt_rank=4)
    mixer = ssm.Mamba(40, config, rngs=nnx.Rngs(0))
    dt = np.asarray(jax.nn.softplus(mixer.dt_proj.bias[...]))
    assert np.isclose(dt.min(), 0.5)
    assert 1 < dt.max() < 2
    assert np.all(np.asarray(mixer.dt_proj.kernel[...]) == 2 * 4**-0.5)


def test_biases_can_be_left_out():
    config = ssm.MambaConfig(conv_bias=False, bias=False, d_state=4)
    mixer = make_mixer(config, "float32")
    assert {name for name in flat(mixer) if name.endswith("bias")} == {"dt_proj/bias"}
    assert mixer(make_input(3)).shape == (2, 3, D_MODEL)
