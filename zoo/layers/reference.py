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
