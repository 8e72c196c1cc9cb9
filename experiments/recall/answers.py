"""Answers of a model: the loss that trains them, their logits in rows of any length, and how many are right."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

import zoo
from experiments.loop.cross_entropy import counted, cross_entropy
from experiments.loop.mesh import gathered
from experiments.loop.train import Batch, Loss, with_auxiliary


def answer_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """Cross-entropy of the answers, summed over those that count. The head sees no other position."""
    hidden, auxiliary = model.run(batch["tokens"], rngs=rngs)
    asked = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    logits = model.head(counted(asked, batch["weights"]))
    nats = cross_entropy(logits, batch["targets"], batch["weights"], model.config.vocab_size)
    loss = Loss(jnp.sum(nats), jnp.sum(batch["weights"]))
    return with_auxiliary(loss, model, auxiliary)


def answer_logits(model: zoo.CausalLM, batch: Batch, *, chunk_size: int) -> Float[np.ndarray, "b a v"]:
    """Logits at the positions that are asked for, read a chunk at a time: a row's length costs no memory.

    Args:
      model: any; where attention takes part, its cache grows with the length all the same.
      batch: a task's.
      chunk_size: tokens of a row that are read at once; rows are filled up to a multiple of it.
    """
    graphdef, variables = nnx.split(model)
    tokens, positions = batch["tokens"], batch["positions"]
    rows, length = tokens.shape
    chunks = -(-length // chunk_size)
    tokens = np.pad(tokens, ((0, 0), (0, chunks * chunk_size - length)))
    state = model.init_state(rows, chunks * chunk_size)
    hidden = np.zeros((*positions.shape, model.config.d_model), _hidden_dtype(model))
    for c in range(chunks):
        chunk = tokens[:, c * chunk_size : (c + 1) * chunk_size]
        hidden, state = _read_chunk(graphdef, variables, chunk, state, positions - c * chunk_size, hidden)
    return gathered(_head(graphdef, variables, hidden))


def _hidden_dtype(model: zoo.CausalLM) -> jnp.dtype:
    return jax.eval_shape(lambda: model.hidden(jnp.zeros((1, 1), jnp.int32))).dtype


@functools.partial(jax.jit, static_argnums=0)
def _read_chunk(graphdef, variables, tokens, state, positions, hidden):
    """Goes on by a chunk, and fills in the hidden vectors whose positions (counted from its start) lie in it."""
    model = nnx.merge(graphdef, variables)
    chunk, state = model.backbone.extend(model.embed(tokens), state)
    inside = (positions >= 0) & (positions < tokens.shape[1])
    found = jnp.take_along_axis(chunk, jnp.where(inside, positions, 0)[..., None], axis=1)
    return jnp.where(inside[..., None], found, hidden), state


_head = jax.jit(lambda graphdef, variables, hidden: nnx.merge(graphdef, variables).head(hidden), static_argnums=0)
_cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)


class Score(NamedTuple):
    """How a model does on held-out rows."""

    loss: float
    """Cross-entropy of an answer, in nats."""
    accuracy: float
    """Share of answers that are right."""
    sequence_accuracy: float
    """Share of rows whose answers are all right."""
    sequences: int
    """Rows."""


def score(model: zoo.CausalLM, batches: Iterable[Batch], *, chunk_size: int = 1024) -> Score:
    """Loss and accuracy over all batches together."""
    nats = answers = right = rows = whole = 0.0
    for batch in batches:
        logits = answer_logits(model, batch, chunk_size=chunk_size)
        counts = batch["weights"] > 0
        hits = (np.argmax(logits, axis=-1) == batch["targets"]) | ~counts
        losses = np.asarray(_cross_entropy(logits, batch["targets"]), np.float64)
        nats += losses[counts].sum()
        answers += counts.sum()
        right += (hits & counts).sum()
        rows += len(hits)
        whole += hits.all(axis=1).sum()
    return Score(float(nats / answers), float(right / answers), float(whole / rows), int(rows))
