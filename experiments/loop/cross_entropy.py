"""Cross-entropy of targets of which some do not count: what lies there has no part in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped


def counted(x: Shaped[Array, "..."], weights: Shaped[Any, "..."]) -> Shaped[Array, "..."]:
    """x, 0 where it has no weight: before the loss, as 0 times NaN is NaN. Axes of weights are the first ones of x."""
    weights = jnp.asarray(weights)
    return jnp.where((weights != 0).reshape(*weights.shape, *(1,) * (x.ndim - weights.ndim)), x, 0)


def check_targets(targets: Int[Any, "*b"], weights: Float[Any, "*b"], n_targets: int) -> None:
    """Raises a ValueError for a target that counts and is none of n_targets, where values are known."""
    if not any(isinstance(x, jax.core.Tracer) for x in (targets, weights)):
        looked_at = np.asarray(targets)[np.asarray(weights) != 0]
        if looked_at.size and (looked_at.min() < 0 or looked_at.max() >= n_targets):
            raise ValueError(f"targets hold {looked_at.min()} to {looked_at.max()}, expected 0 to {n_targets - 1}")


def cross_entropy(
    logits: Float[Array, "*b v"], targets: Int[Any, "*b"], weights: Float[Any, "*b"], n_targets: int
) -> Float[Array, "*b"]:
    """Nats of each target times its weight.

    Args:
      logits: at least as many as there are targets; more of them pad a vocabulary.
      targets: what was right, 0 to n_targets - 1 where it counts.
      weights: what each counts; 0 is not looked at.
      n_targets: how many there are.

    Raises:
      ValueError: a target that counts and is none, where values are known. In a function that is traced its nats are
        NaN, which ends training.
    """
    check_targets(targets, weights, n_targets)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    right = (targets >= 0) & (targets < n_targets)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(right, targets, 0))
    return jnp.where(weights == 0, 0, jnp.where(right, nats, jnp.nan) * weights)
