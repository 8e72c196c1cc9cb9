"""The loss of a masked language model: its guesses at the tokens that `masking` hides."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.loop.cross_entropy import counted, cross_entropy
from experiments.loop.train import Loss, with_auxiliary


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
    hidden, auxiliary = model.run(batch["tokens"], batch["mask"], batch.get("segment_ids"), rngs=rngs)
    hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)  # b k d
    weights, vocab_size = batch["weights"], model.config.vocab_size
    logits = model.head(counted(hidden, weights))
    nats = cross_entropy(logits, batch["targets"], weights, vocab_size)
    hits = jnp.argmax(logits[..., :vocab_size], axis=-1) == batch["targets"]
    return MaskedSums(jnp.sum(nats), jnp.sum(weights), jnp.sum(hits * weights), auxiliary)


def masked_loss(model: zoo.MaskedLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """`masked_sums` as the loop takes it."""
    sums = masked_sums(model, batch, rngs)
    return with_auxiliary(Loss(sums.total, sums.weight), model, sums.auxiliary)
