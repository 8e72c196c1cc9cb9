"""The slow, obvious twins: one position after the other, in the order of the papers' formulas.

They say what is true. Every fast implementation agrees with them in value and in every gradient (plain autodiff here).
"""

import jax
import jax.numpy as jnp
from jax import lax


def selective_scan(u, delta, A, B, C, D=None, z=None, *, initial_state=None, mask=None, segment_ids=None):
    """`ssm.selective_scan` as a loop over positions: same arguments, same results."""
    dtype = jnp.result_type(u, delta, A, B, C, jnp.float32)
    b, length, e = u.shape
    if initial_state is None:
        initial_state = jnp.zeros((b, e, A.shape[1]), dtype)

    def step(h, t):
        fresh = jnp.zeros((b,), bool)
        if segment_ids is not None:
            fresh = (t > 0) & (segment_ids[:, t] != segment_ids[:, t - 1])
        h = jnp.where(fresh[:, None, None], 0, h)
        step_size = delta[:, t, :, None].astype(dtype)
        new = jnp.exp(step_size * A) * h + step_size * B[:, t, None, :] * u[:, t, :, None]
        if mask is not None:
            new = jnp.where(mask[:, t, None, None], new, h)
        return new, jnp.sum(C[:, t, None, :] * new, axis=-1)

    state, y = lax.scan(step, initial_state.astype(dtype), jnp.arange(length))
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state


def causal_conv1d(x, weight, bias=None, *, initial_state=None, segment_ids=None):
    """`ssm.causal_conv1d`, output alone, as a sum over every pair of positions."""
    taps, length = weight.shape[1], x.shape[1]
    history = jnp.zeros_like(x, shape=(x.shape[0], taps - 1, x.shape[2])) if initial_state is None else initial_state
    inputs = jnp.concatenate([history, x], axis=1)
    out = []
    for t in range(length):
        total = jnp.zeros_like(x[:, 0])
        for j in range(taps):
            source = t + j - (taps - 1)
            seen = jnp.ones(x.shape[0], bool)
            if segment_ids is not None:
                between = segment_ids[:, max(source, 0) : t + 1]
                seen = jnp.all(between == between[:, :1], axis=1)
            total = total + jnp.where(seen[:, None], inputs[:, t + j] * weight[:, j], 0)
        out.append(total if bias is None else total + bias)
    return jnp.stack(out, axis=1)
