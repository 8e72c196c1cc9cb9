"""Which experts a position goes through and what each counts, and the losses that teach a router to spread them.

Axis letters: `e` experts · `s` the experts chosen at a position.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank

Weights = Literal["renormalised", "softmax", "unit", "sigmoid", "sigmoid_renormalised"]


def choose(
    logits: Float[Array, "*b e"],
    top_k: int,
    weights: Weights = "renormalised",
    *,
    correction: Float[Array, "e"] | None = None,
    n_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Int[Array, "*b s"], Float[Array, "*b s"]]:
    """The experts of each position, the likeliest first, and what each counts.

        renormalised          softmax over the chosen = softmax over all, the chosen divided by their sum
        softmax               softmax over all
        unit                  1
        sigmoid               sigmoid
        sigmoid_renormalised  sigmoid, divided by the sum of the chosen

    Args:
      logits: of the router, at least float32.
      top_k: how many are chosen. Of equal ones the first is.
      weights: one of these.
      correction: what is added to the softmax or sigmoid of each expert, to choose by alone. None: nothing.
      n_groups: groups of neighbouring experts, of which a position keeps `top_groups`.
      top_groups: those whose best two experts have, so corrected, the largest sums.

    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1 (renormalised); Fedus et al. 2021, arXiv:2101.03961,
      eq. 1-2 (softmax); DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2 (sigmoid, correction, groups).
    """
    sigmoid = weights.startswith("sigmoid")
    scores = logits
    if correction is not None or n_groups > 1:
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
        scores = scores if correction is None else scores + correction
    if n_groups > 1:
        grouped = scores.reshape(*scores.shape[:-1], n_groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(axis=-1)
        kept = jnp.any(jax.lax.top_k(best, top_groups)[1][..., None] == jnp.arange(n_groups), axis=-2)
        scores = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
    experts = jax.lax.top_k(scores, top_k)[1]
    chosen = jnp.take_along_axis(logits, experts, axis=-1)
    if weights == "unit":
        return experts, jnp.ones_like(chosen)
    if weights == "renormalised":
        return experts, jax.nn.softmax(chosen, axis=-1)
    if weights == "softmax":
        return experts, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    counts = jax.nn.sigmoid(chosen)
    return experts, counts / counts.sum(axis=-1, keepdims=True) if weights == "sigmoid_renormalised" else counts


def balance_loss(
    logits: Float[Array, "*b e"], experts: Int[Array, "*b s"], mask: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """How unevenly positions are spread over the experts: top_k where each has as many, up to n_experts.

        E sum_e f_e P_e

    f_e is how often a position chose e, P_e the mean of its softmax over all; the gradient is that of P alone.

    Args:
      logits: of the router.
      experts: the chosen ones, whether or not there was room for them.
      mask: False where a position does not count.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4-6; with top_k > 1 as `load_balancing_loss_func` in Mixtral's
      modeling file of transformers counts.
    """
    n_experts, logits = logits.shape[-1], blank(mask, logits)
    frequency = _frequency(experts, n_experts, mask, logits.dtype)
    return n_experts * jnp.sum(frequency * _mean(jax.nn.softmax(logits, axis=-1), mask))


def correction_loss(
    correction: Float[Array, "e"], experts: Int[Array, "*b s"], mask: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """Nothing, 0, whose gradient for each expert's bias is how much more often than its share a position chose it.

    So whatever trains the model moves these biases along. Adam moves each by about its learning rate a step, whatever
    the excess, which is the source's rule, b -= u sign(excess), with u the learning rate (0.001 there).

    Args:
      correction: the biases.
      experts: the chosen experts, whether or not there was room for them.
      mask: False where a position does not count.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    frequency = _frequency(experts, len(correction), mask, correction.dtype)
    return jnp.sum((frequency - jnp.mean(frequency)) * (correction - jax.lax.stop_gradient(correction)))


def _frequency(experts, n_experts, mask, dtype):
    """How often a position chose each expert, on average: (e)."""
    counts = jnp.sum(experts[..., None] == jnp.arange(n_experts), axis=-2)  # *b e
    return _mean(counts.astype(dtype), mask)


def z_loss(logits: Float[Array, "*b e"], mask: Bool[Array, "*b"] | None = None) -> Float[Array, ""]:
    """The mean squared logsumexp of the router's logits.

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    return _mean(jnp.square(jax.nn.logsumexp(blank(mask, logits), axis=-1))[..., None], mask)[0]


def _mean(x, mask):
    """The mean over positions, (e), of those that are there."""
    positions = tuple(range(x.ndim - 1))
    if mask is None:
        return x.mean(axis=positions)
    return jnp.sum(blank(mask, x), axis=positions) / jnp.maximum(jnp.sum(mask), 1)
