"""The loss of a causal language model: its guess at each next token, of rows by themselves or that go on."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.loop.train import Loss, with_auxiliary
from experiments.loop.vocabulary_loss import vocabulary_loss


def next_token_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """Cross-entropy of the targets, summed over the tokens that count."""
    hidden, auxiliary = model.run(batch["tokens"], segment_ids=batch["segment_ids"], rngs=rngs)
    sums = vocabulary_loss(model.head, hidden, batch["targets"], batch["weights"], model.config.vocab_size)
    return with_auxiliary(Loss(sums.total, jnp.sum(batch["weights"])), model, auxiliary)


def continued_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None, state: tuple):
    """`next_token_loss` from the state that the batch before left, in the rows whose document goes on."""

    def keep(carried, fresh):
        return jnp.where(batch["continues"].reshape(-1, *(1,) * (fresh.ndim - 1)), carried, fresh)

    state = jax.tree.map(keep, state, model.init_state(len(batch["continues"])))
    vectors = model.embed(batch["tokens"])
    hidden, state = model.backbone.extend(vectors, state, segment_ids=batch["segment_ids"], rngs=rngs)
    sums = vocabulary_loss(model.head, hidden, batch["targets"], batch["weights"], model.config.vocab_size)
    return Loss(sums.total, jnp.sum(batch["weights"])), state


def describe(loss: float, bits_per_nat: float) -> dict[str, float]:
    """A loss in the units people compare: perplexity a token, and bits per byte of text, whatever the tokenizer."""
    return {"perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss * bits_per_nat}
