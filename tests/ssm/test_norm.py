"""Root-mean-square norms of groups of channels, and their gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.norm import GatedRMSNorm, rms_norm
from tests.numerics import assert_close, normal


def by_hand(x, group_size, eps):
    out = np.zeros_like(x)
    for start in range(0, x.shape[-1], group_size):
        group = x[..., start : start + group_size]
        out[..., start : start + group_size] = group / np.sqrt((group**2).mean(-1, keepdims=True) + eps)
    return out


@pytest.mark.parametrize("group_size", [None, 2, 6])
def test_rms_norm_takes_each_group_alone(x64, group_size):
    x = normal(jax.random.key(0), 2, 3, 6)
    assert_close(rms_norm(x, group_size=group_size, eps=0.1), by_hand(np.asarray(x), group_size or 6, 0.1))


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gate_comes_after_or_before_the_norm(x64, norm_before_gate):
    norm = GatedRMSNorm(6, group_size=3, norm_before_gate=norm_before_gate, eps=0.1, param_dtype=jnp.float64)
    norm.scale[...] = normal(jax.random.key(2), 6)
    y, z = (np.asarray(normal(jax.random.key(i), 2, 5, 6)) for i in range(2))
    gate, scale = z / (1 + np.exp(-z)), np.asarray(norm.scale[...])
    expected = by_hand(y, 3, 0.1) * scale * gate if norm_before_gate else by_hand(y * gate, 3, 0.1) * scale
    assert_close(norm(jnp.asarray(y), jnp.asarray(z)), expected)
    assert_close(norm(jnp.asarray(y)), by_hand(y, 3, 0.1) * scale)


def test_computes_in_float32_and_returns_the_input_dtype():
    norm = GatedRMSNorm(64, param_dtype=jnp.bfloat16)
    assert norm.scale.dtype == jnp.float32
    y = normal(jax.random.key(0), 3, 64, dtype=jnp.bfloat16)
    assert rms_norm(y, eps=1e-5).dtype == jnp.float32
    out = norm(y, y)
    assert out.dtype == jnp.bfloat16
    wide = y.astype(jnp.float32)
    assert_close(out, norm(wide, wide).astype(jnp.bfloat16), tolerance=1e-6)  # one rounding, at the end


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_rows_and_no_positions_are_none_normalised(shape):
    assert rms_norm(jnp.zeros(shape), group_size=2, eps=1e-5).shape == shape
