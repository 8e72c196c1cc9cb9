"""Small models of every family, for what is done to trained ones."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import with_random_parameters

OPTIONS = {
    "d_model": 8,
    "vocab_size": 11,
    "mamba": ssm.MambaConfig(d_state=4, dt_rank=2),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=4),
    "mamba3": ssm.Mamba3Config(d_state=4, head_dim=4),
    "attn": zoo.AttentionConfig(n_heads=2),
    "linear_attn": ssm.LinearAttentionConfig(n_heads=2),
    "m2": m2.M2Config(l_max=16, filter=m2.HyenaFilterConfig(order=4)),
    "zamba2": zoo.Zamba2Config(n_heads=2, adapter_rank=2),
    "mlp": zoo.MLPConfig(d_ff=8),
    "monarch": m2.MonarchMLPConfig(d_ff=8),
    "moe": zoo.MoEConfig(n_experts=3, d_ff=4, n_shared=1),
}
FAMILIES = ("mamba", "mamba2/mlp", "mamba3", "linear_attn/moe", "attn/mlp", "m2/monarch", "zamba2 zamba2")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))


@functools.cache
def encoder(pattern: str) -> zoo.MaskedLM:
    """A masked language model that looks both ways, of random parameters."""
    fields = {field.name for field in dataclasses.fields(zoo.MaskedLMConfig)}
    options = {name: value for name, value in OPTIONS.items() if name in fields}
    config = zoo.MaskedLMConfig(pattern=pattern, n_layers=1, causal=False, max_len=16, norm="layer", **options)
    return with_random_parameters(lambda: zoo.MaskedLM(config, rngs=nnx.Rngs(0)))


@functools.cache
def causal(pattern: str = " ".join(FAMILIES), *, scan_layers: bool = False) -> zoo.CausalLM:
    """A causal model whose parameters are random, those too that start at 0 or 1."""
    n_layers = len(pattern.split()) * (2 if scan_layers else 1)
    config = zoo.CausalLMConfig(pattern=pattern, n_layers=n_layers, scan_layers=scan_layers, **OPTIONS)
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
