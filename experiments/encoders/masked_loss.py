"""The loss of a masked language model: its guesses at the tokens that `masking` hides."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.loop.train import Loss, with_auxiliary
from experiments.loop.vocabulary_loss import vocabulary_loss


class MaskedSums(NamedTuple):
    """Sums over the tokens that were to be guessed."""

    total: jax.Array
    """Cross-entropy, in nats."""
    weight: jax.Array
    """How many there were."""
    correct: jax.Array
    """How many of them had the highest logit."""
    auxiliary: jax.Array
    """What training adds to its loss."""


def masked_sums(model: zoo.MaskedLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> MaskedSums:
    """Loss and hits of the hidden tokens. The head sees their positions alone, gathered from the encoder's output."""
    routed = {"task": batch["task"]} if model.config.moe.n_tasks > 1 and "task" in batch else {}
    hidden, auxiliary = model.run(batch["tokens"], batch["mask"], batch.get("segment_ids"), rngs=rngs, **routed)
    positions, weights = batch["positions"], batch["weights"]
    if model.decoder is not None and rngs is not None:
        rows = jnp.arange(len(positions))[:, None]
        guessed = jnp.zeros(hidden.shape[:2], bool).at[rows, positions].max(weights > 0)
        hidden, more = model.decode(hidden, guessed, batch["mask"], batch.get("segment_ids"), rngs=rngs)
        auxiliary = auxiliary + more
    hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)  # b k d
    sums = vocabulary_loss(model.head, hidden, batch["targets"], weights, model.config.vocab_size)
    return MaskedSums(sums.total, jnp.sum(weights), sums.correct, auxiliary)


def masked_loss(model: zoo.MaskedLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """`masked_sums` as the loop takes it."""
    sums = masked_sums(model, batch, rngs)
    return with_auxiliary(Loss(sums.total, sums.weight), model, sums.auxiliary)
