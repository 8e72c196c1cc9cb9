"""A language model that learns what another one says: forward KL divergence from a teacher's guess at each next token.

    python -m experiments.reuse prune LARGE small --d-ff 512
    python -m experiments.causal_lm tiny --init small --teacher LARGE

The teacher reads each batch before the step, and its logits go with the batch: one number for each token of the
vocabulary at each position, which is for vocabularies or batches that are not large. With --directions what its mixers
write goes with it, too, see `directions`.

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
from experiments.causal.directions import Projected, project, unlike
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
    """Batches, with what a teacher says of each: "taught", its logits.

    Args:
      batches: what it reads.
      teacher: reads them.
      directions: whether what its mixers write goes with them, too: "projected".
    """

    def __init__(self, batches: BatchIterator, teacher: zoo.CausalLM, *, directions: bool = False):
        self._batches = batches
        graphdef, self._state = nnx.split(teacher)
        n = teacher.config.vocab_size

        def read(state: Any, ids: jax.Array, segments: jax.Array) -> dict[str, Any]:
            model = nnx.merge(graphdef, state)
            if not directions:
                return {"taught": model(ids, segment_ids=segments)[..., :n]}
            hidden, _, projected = project(model, ids, segments, None)
            return {"taught": model.head(hidden)[..., :n], "projected": projected._asdict()}

        self._read = jax.jit(read)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        read = self._read(self._state, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"]))
        return batch | jax.tree.map(np.asarray, read)

    def __iter__(self):
        return self

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any], /) -> None:
        self._batches.set_state(state)


def taught_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
    """KL divergence of the model's next token from the teacher's, in nats, summed over the tokens that count."""
    hidden, auxiliary = model.run(batch["tokens"], segment_ids=batch["segment_ids"], rngs=rngs)
    return _divergence(model, batch, hidden, auxiliary)


def _divergence(model: zoo.CausalLM, batch: Mapping[str, Any], hidden: jax.Array, auxiliary: jax.Array) -> Loss:
    """`taught_loss` of a model that has been run."""
    taught = jnp.asarray(batch["taught"])
    logits = model.head(hidden)[..., : taught.shape[-1]]
    total = kl_of(taught, logits, batch["weights"])
    return with_auxiliary(Loss(total, jnp.sum(batch["weights"])), model, auxiliary)


def directed_loss(model: zoo.CausalLM, batch: Mapping[str, Any], rngs: nnx.Rngs | None, *, factor: float) -> Loss:
    """`taught_loss`, and beside it `factor` times how far what the mixers write is from what the teacher's do."""
    hidden, auxiliary, projected = project(model, batch["tokens"], batch["segment_ids"], rngs)
    loss = _divergence(model, batch, hidden, auxiliary)
    apart = unlike(projected, Projected(**batch["projected"]), batch["segment_ids"], batch["weights"])
    added = factor * apart / jnp.where(loss.weight == 0, 1, loss.weight)
    return loss._replace(auxiliary=added if loss.auxiliary is None else loss.auxiliary + added)
