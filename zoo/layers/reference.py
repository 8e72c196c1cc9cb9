"""The slow, obvious twins: they say what is true, in value and in every gradient (plain autodiff here)."""

import jax
import jax.numpy as jnp


def grouped_matmul(x, w, group):
    """`zoo.layers.grouped_matmul` with each block's own copy of its matrix."""
    return jnp.stack([block @ w[g] for block, g in zip(x, group, strict=True)])


def _largest(x, n):
    """Where the n largest of the last axis are."""
    return jnp.argsort(jnp.argsort(-x, axis=-1), axis=-1) < n


def expert_weights(logits, top_k, weights, correction=0.0, n_groups=1, top_groups=1):
    """How much every expert counts at every position, 0 where it was not chosen: (b l e) from the router's logits."""
    shares = jax.nn.sigmoid(logits) if weights.startswith("sigmoid") else jax.nn.softmax(logits, axis=-1)
    scores = shares + correction
    size = logits.shape[-1] // n_groups
    in_groups = jnp.sort(scores.reshape(*scores.shape[:-1], n_groups, size), axis=-1)
    kept = jnp.repeat(_largest(in_groups[..., -2:].sum(axis=-1), top_groups), size, axis=-1)
    chosen = _largest(jnp.where(kept, scores, -jnp.inf), top_k)
    if weights == "unit":
        return jnp.where(chosen, 1.0, 0.0)
    shares = jnp.where(chosen, shares, 0)
    return shares / shares.sum(axis=-1, keepdims=True) if weights.endswith("renormalised") else shares


def mixture(x, counts, experts):
    """`zoo.MoE` with every expert at every position: the sum of counts (b l e) times expert(x), experts a list."""
    return sum(counts[..., e, None] * expert(x) for e, expert in enumerate(experts))


def softmax_attention(q, k, v, q_at=None, k_at=None, *, causal, window=None, slopes=None, scale=None):
    """`zoo.layers.softmax_attention` pair by pair: numbers (b l) of each query and key say which are seen."""
    (b, length, heads, p), n_keys = q.shape, k.shape[1]

    def numbers(at, n):
        index = jnp.broadcast_to(jnp.arange(n) if at is None else at.indices, (b, n))
        return index, jnp.zeros((b, n)) if at is None or at.segments is None else at.segments

    (q_index, q_segment), (k_index, k_segment) = numbers(q_at, length), numbers(k_at, n_keys)
    rows = []
    for row in range(b):
        distance = q_index[row][:, None] - k_index[row]
        seen = (k_index[row] >= 0) & (q_segment[row][:, None] == k_segment[row])
        forward = distance >= 0
        if q_at is not None and q_at.ahead is not None:  # 1 looks ahead, at what is 2
            forward |= (q_at.ahead[row] == 1)[:, None] & (k_at.ahead[row] == 2)
        seen &= forward | (not causal)
        seen &= True if window is None else jnp.abs(distance) < window
        outputs = []
        for head in range(heads):
            keys, values = (x[row, :, head // (heads // k.shape[2])] for x in (k, v))
            scores = q[row, :, head] @ keys.T * (p**-0.5 if scale is None else scale)
            scores -= 0 if slopes is None else slopes[head] * jnp.abs(distance)
            weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0)), 0)
            total = weights.sum(axis=1, keepdims=True)
            outputs.append(weights @ values / jnp.where(total > 0, total, 1))
        rows.append(jnp.stack(outputs, axis=1))
    return jnp.stack(rows)
