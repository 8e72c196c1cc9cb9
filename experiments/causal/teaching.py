"""A language model that learns what another one says: forward KL divergence from a teacher's guess at each next token.

    python -m experiments.reuse prune LARGE small --d-ff 512
    python -m experiments.causal_lm tiny --init small --teacher LARGE

The teacher reads each batch before the step, and its logits go with the batch: one number for each token of the
vocabulary at each position, which is for vocabularies or batches that are not large.

Source: Hinton et al. 2015, arXiv:1503.02531; Muralidharan et al. 2024, arXiv:2407.14679, section 3 (logits alone, at
temperature 1, to win back what pruning lost).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.causal.load import load_causal
from experiments.causal.pair import kl_of
from experiments.data.tokenizers import Tokenizer, reads_alike
from experiments.loop.train import BatchIterator, Loss, with_auxiliary


def load_teacher(source: str | Path, tokenizer: Tokenizer, vocab_size: int) -> zoo.CausalLM:
    """A language model that reads the same tokens.

    Raises:
      ValueError: other tokens, or another number of them.
    """
    loaded = load_causal(source, dtype="float32", flag="--data.tokenizer")
    if not reads_alike(loaded.tokenizer, tokenizer):
        raise ValueError(f"--teacher {source} has another tokenizer than the run")
    if loaded.model.config.vocab_size != vocab_size:
        raise ValueError(
            f"--teacher {source} has {loaded.model.config.vocab_size} tokens, the model that it teaches {vocab_size}"
        )
    return loaded.model


class TaughtBatches:
    """Batches, with what a teacher says of each: "taught", its logits."""

    def __init__(self, batches: BatchIterator, teacher: zoo.CausalLM):
        self._batches = batches
        graphdef, self._state = nnx.split(teacher)
        self._n = teacher.config.vocab_size
        self._read = jax.jit(lambda state, ids, segments: nnx.merge(graphdef, state)(ids, segment_ids=segments))

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        logits = self._read(self._state, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"]))
        return batch | {"taught": np.asarray(logits[..., : self._n])}

    def __iter__(self):
        return self

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any], /) -> None:
        self._batches.set_state(state)


def taught_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """KL divergence of the model's next token from the teacher's, in nats, summed over the tokens that count."""
    hidden, auxiliary = model.run(batch["tokens"], segment_ids=batch["segment_ids"], rngs=rngs)
    taught = jnp.asarray(batch["taught"])
    logits = model.head(hidden)[..., : taught.shape[-1]]
    total = kl_of(taught, logits, batch["weights"])
    return with_auxiliary(Loss(total, jnp.sum(batch["weights"])), model, auxiliary)
