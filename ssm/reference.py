"""The slow, obvious twins: one position after the other, in the order of the papers' formulas.

They say what is true. Every fast implementation agrees with them in value and in every gradient (plain autodiff here).
"""

import jax
import jax.numpy as jnp
from jax import lax

from ssm.absent import blank


def selective_scan(u, delta, A, B, C, D=None, z=None, *, initial_state=None, mask=None, segment_ids=None):
    """`ssm.selective_scan` as a loop over positions: same arguments, same results."""
    dtype = jnp.result_type(u, delta, A, B, C, jnp.float32)
    b, length, e = u.shape
    u, delta, B, C = (blank(mask, x) for x in (u, delta, B, C))
    z = None if z is None else blank(mask, z)
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
    """`ssm.causal_conv1d`, output alone, as a dense matrix over every pair of positions."""
    taps, length = weight.shape[1], x.shape[1]
    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(x.shape[0], taps - 1, x.shape[2]))
    inputs = jnp.concatenate([initial_state, x], axis=1)  # b s e: position t is input t + taps - 1
    tap = jnp.arange(inputs.shape[1]) - jnp.arange(length)[:, None]  # l s: which tap position t has on input s
    matrix = jnp.where((tap >= 0) & (tap < taps), weight[:, jnp.clip(tap, 0, taps - 1)], 0)  # e l s
    seen = jnp.ones((x.shape[0], *tap.shape), bool)  # b l s
    if segment_ids is not None:
        segment = jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)
        segment = jnp.pad(segment, ((0, 0), (taps, 0)))  # the initial state belongs to the first position's segment
        seen = segment[:, taps - 1 :, None] == segment[:, None, :]
    y = jnp.einsum("els,bls,bse->ble", matrix, seen.astype(x.dtype), inputs, precision="highest")
    return y if bias is None else y + bias


def depthwise_conv2d(x, weight, bias=None):
    """`ssm.depthwise_conv2d` place by place: same arguments, same results."""
    (_, rows, columns, _), (m, n, _) = x.shape, weight.shape
    top, left = (m - 1) // 2, (n - 1) // 2
    padded = jnp.pad(x, ((0, 0), (top, m), (left, n), (0, 0)))
    places = [[padded[:, r : r + m, c : c + n] for c in range(columns)] for r in range(rows)]
    y = jnp.stack([jnp.stack([jnp.sum(place * weight, axis=(1, 2)) for place in row], 1) for row in places], 1)
    return y if bias is None else y + bias


def ssd(x, dt, A, B, C, D=None, *, initial_state=None, mask=None, segment_ids=None):
    """`ssm.ssd` as a selective scan: each channel of a head has the head's decay in all of its n states."""
    (b, _, h, p), n = x.shape, B.shape[3]
    B, C = (jnp.repeat(m, h // m.shape[2], axis=2) for m in (B, C))  # a map for each head
    D = jnp.zeros((h, p), x.dtype) if D is None else jnp.broadcast_to(D.reshape(h, -1), (h, p))
    initial_state = jnp.zeros((b, h, p, n)) if initial_state is None else initial_state

    def head(x, dt, A, B, C, D, initial_state):
        dt, A = jnp.repeat(dt[..., None], p, axis=2), jnp.broadcast_to(A, (p, n))
        positions = {"mask": mask, "segment_ids": segment_ids}
        return selective_scan(x, dt, A, B, C, D, initial_state=initial_state, **positions)

    return jax.vmap(head, (2, 2, 0, 2, 2, 0, 1), (2, 1))(x, dt, A, B, C, D, initial_state)


def linear_attention(q, k, v, log_decay, *, initial_state=None, mask=None, segment_ids=None):
    """`ssm.linear_attention` as a loop over positions: same arguments, same results."""
    dtype = jnp.result_type(v, log_decay, jnp.float32)
    (b, length, h, n), p = q.shape, v.shape[3]
    q, k, v, log_decay = (blank(mask, m) for m in (q, k, v, log_decay))
    k, v = (jnp.repeat(m, h // m.shape[2], axis=2) for m in (k, v))
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), dtype)

    def step(state, t):
        fresh = jnp.zeros((b,), bool)
        if segment_ids is not None:
            fresh = (t > 0) & (segment_ids[:, t] != segment_ids[:, t - 1])
        state = jnp.where(fresh[:, None, None, None], 0, state)
        new = jnp.exp(log_decay[:, t, :, None, None]) * state + jnp.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
        if mask is not None:
            new = jnp.where(mask[:, t, None, None, None], new, state)
        return new, jnp.einsum("bhpn,bhn->bhp", new, q[:, t])

    state, y = lax.scan(step, initial_state.astype(dtype), jnp.arange(length))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


def trapezoid(v, k, q, dt, A, lam, D=None, *, initial_state=None, mask=None, segment_ids=None):
    """`ssm.trapezoid` as a loop over positions: same arguments, same results."""
    dtype = jnp.result_type(v, dt, jnp.float32)
    (b, length, _, heads, p), n = v.shape, k.shape[-1]
    v, k, q, dt, A, lam = (blank(mask, m) for m in (v, k, q, dt, A, lam))
    if initial_state is None:
        initial_state = jnp.zeros((b, heads, p, n), dtype), jnp.zeros_like(k[:, 0]), jnp.zeros_like(v[:, 0])

    def step(before, t):
        fresh = jnp.zeros((b,), bool)
        if segment_ids is not None:
            fresh = (t > 0) & (segment_ids[:, t] != segment_ids[:, t - 1])
        h, k_last, v_last = before = tuple(jnp.where(fresh[:, None, None, None], 0, x) for x in before)
        alpha, step_size = jnp.exp(dt[:, t] * A[:, t]), dt[:, t]
        beta, gamma = (1 - lam[:, t]) * step_size * alpha, lam[:, t] * step_size
        h = (
            alpha[..., None, None] * h
            + beta[..., None, None] * jnp.einsum("brhp,brhn->bhpn", v_last, k_last)
            + gamma[..., None, None] * jnp.einsum("brhp,brhn->bhpn", v[:, t], k[:, t])
        )
        after = h, k[:, t], v[:, t]
        if mask is not None:
            there = mask[:, t, None, None, None]
            after = tuple(jnp.where(there, new, old) for new, old in zip(after, before, strict=True))
        return after, jnp.einsum("bhpn,brhn->brhp", h, q[:, t])

    state, y = lax.scan(step, tuple(initial_state), jnp.arange(length))
    y = jnp.moveaxis(y, 0, 1)
    return (y if D is None else y + D[:, None] * v), state
