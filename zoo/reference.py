"""The slow, obvious twins: they say what is true, in value and in every gradient (plain autodiff here)."""

import jax
import jax.numpy as jnp


def grouped_matmul(x, w, group):
    """`zoo.grouped_matmul` with each block's own copy of its matrix."""
    return jnp.stack([block @ w[g] for block, g in zip(x, group, strict=True)])


def expert_weights(logits, top_k, weights):
    """How much every expert counts at every position, 0 where it was not chosen: (b l e) from the router's logits."""
    ranks = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
    chosen = ranks < top_k
    if weights == "unit":
        return jnp.where(chosen, 1.0, 0.0)
    probabilities = jnp.where(chosen, jax.nn.softmax(logits, axis=-1), 0)
    return probabilities / probabilities.sum(axis=-1, keepdims=True) if weights == "renormalised" else probabilities


def mixture(x, counts, experts):
    """`zoo.MoE` with every expert at every position: the sum of counts (b l e) times expert(x), experts a list."""
    return sum(counts[..., e, None] * expert(x) for e, expert in enumerate(experts))
