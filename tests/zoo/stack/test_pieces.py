"""Blocks run on some positions, or channels, of a row at a time give what they give on whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from m2 import channel_groups, mixer
from tests.numerics import assert_close, with_random_parameters

OPTIONS = {
    "mamba": ssm.MambaConfig(d_state=3),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=8),
    "mamba3": ssm.Mamba3Config(d_state=8, head_dim=8),
    "linear_attn": ssm.LinearAttentionConfig(head_dim=8),
    "m2": m2.M2Config(l_max=40, filter=m2.HyenaFilterConfig(order=8), residual_long_conv=True),
}
LONG = m2.M2Config(l_max=1 << 14, filter=m2.HyenaFilterConfig(order=8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "mamba2/mlp",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("m2/monarch", "mamba attn", "mamba3", "linear_attn/moe", "m2+mamba/mlp")
        ),
    ],
)
def test_remat_of_some_positions_at_a_time_changes_neither_values_nor_gradients(x64, monkeypatch, pattern):
    monkeypatch.setattr(channel_groups, "LEAST", 4)
    monkeypatch.setattr(mixer, "POSITIONS", 16)
    wide = {"dtype": "float64", "param_dtype": "float64"}
    config = zoo.CausalLMConfig(d_model=16, n_layers=2, pattern=pattern, vocab_size=16, **wide, **OPTIONS)
    params = nnx.split(with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0))))[1]
    r = np.random.default_rng(0)
    ids, weights = jnp.asarray(r.integers(0, 16, (2, 37)), jnp.int32), jnp.asarray(r.standard_normal((2, 37, 16)))
    segments = jnp.asarray(np.sort(r.integers(0, 4, (2, 37)), axis=1), jnp.int32).at[1].set(jnp.arange(37) // 8 % 2)
    mask = jnp.arange(37) < jnp.asarray([28, 37])[:, None]

    def run(config):
        graphdef = nnx.split(nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0))))[0]

        def scalar(params):
            return jnp.sum(jnp.where(mask[..., None], nnx.merge(graphdef, params)(ids, mask, segments) * weights, 0))

        return jax.jit(jax.value_and_grad(scalar))(params)

    assert_close(run(dataclasses.replace(config, remat=True, remat_positions=8)), run(config), gradient=True)


@pytest.mark.parametrize(("pattern", "d_model", "share"), [("mamba2/mlp", 16, 4), ("m2/mlp", 64, 2)])
def test_a_long_row_takes_little_more_than_its_residual_stream(pattern, d_model, share):
    def memory(**switches):
        shape = {"d_model": d_model, "n_layers": 1, "pattern": pattern, "vocab_size": 16}
        config = zoo.CausalLMConfig(**shape, **switches, **OPTIONS | {"m2": LONG})
        graphdef, params = nnx.split(zoo.CausalLM(config, rngs=nnx.Rngs(0)))
        ids = jnp.zeros((1, 4096), jnp.int32)
        scalar = lambda params: jnp.sum(nnx.merge(graphdef, params).hidden(ids) ** 2)  # noqa: E731
        return jax.jit(jax.grad(scalar)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(remat=True, remat_positions=128) < memory(remat=True) / share


def test_remat_positions_needs_remat(unchecked):
    with pytest.raises(ValueError, match="remat_positions=8, expected None, or at least 1 with remat=True"):
        zoo.CausalLMConfig(d_model=16, n_layers=1, pattern="mamba", vocab_size=16, remat_positions=8)
