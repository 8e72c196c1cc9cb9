"""What a bi-encoder learns from a batch of queries and documents, in the memory of a mini-batch.

Queries and documents go through one encoder. A batch is a dict of q_tokens, q_mask (b, l); d_tokens, d_mask (b, k, l),
each query's answer first and then documents that do not answer it; d_ids (b, k), -1 for no document; answers (b, j),
every document that is known to answer the query, filled up with -1; and what a teacher says, t_queries (b, t) and
t_documents (b, k, t), or t_scores (b, k).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import zoo
from experiments.loop.cross_entropy import counted
from experiments.loop.flags import alias
from experiments.loop.train import Loss, TrainConfig, with_auxiliary
from experiments.retrieval import losses


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a query's vector should say about its documents."""

    loss: Annotated[Literal["in-batch", "orthogonal", "prototype", "margin-mse"], alias("--loss")] = "in-batch"
    """in-batch: the answer, among all documents of the batch. orthogonal: cosine 1 with the answer and 0 with others,
    pair by pair, for batches as small as 1. prototype: a teacher's vectors. margin-mse: a teacher's scores."""
    score: Annotated[losses.Score, alias("--score")] = "cosine"
    """Of a query and a document, in training and in search: cosine or dot product."""
    scale: float | None = None
    """Of the scores in the cross-entropy of in-batch. None: 20 for cosines, 1 for dot products."""
    symmetric: bool = False
    """in-batch: whether answers must find their queries, too."""
    negatives: Annotated[int | None, alias("--negatives")] = None
    """Documents a query that do not answer it, besides those of other queries. None: 8 for orthogonal (the M2-BERT
    models were tuned with 32), 1 for margin-mse, otherwise 0."""
    mine: Annotated[Literal["random", "bm25"], alias("--mine")] = "random"
    """Where these come from: training documents of similar length at random, or the best by BM25."""
    teacher: Annotated[str | None, alias("--teacher")] = None
    """prototype, margin-mse: a run, a published folder or a hub name; it reads the first tokens of a document. For
    margin-mse also a table of scores, without a head and with tabs: score of the answer, of the other document, query,
    answer, other document."""
    mini_batch: Annotated[int | None, alias("--mini-batch")] = None
    """Texts that are encoded at once. The batch's loss and gradient stay the same; memory is that of a mini-batch, time
    a third more. None: the whole batch."""

    def __post_init__(self):
        teaches = self.loss in ("prototype", "margin-mse")
        if teaches != (self.teacher is not None):
            wanted = "expected a model to learn from" if teaches else "expected none"
            raise ValueError(f"--teacher {self.teacher} with --loss {self.loss}, {wanted}")
        if self.loss == "orthogonal" and self.score != "cosine":
            raise ValueError(f"--score {self.score} with --loss orthogonal, which is about cosines")
        if self.negatives is not None and self.negatives < (self.loss == "margin-mse"):
            raise ValueError(f"--negatives {self.negatives} with --loss {self.loss}, expected more")
        if self.mini_batch is not None and self.mini_batch < 1:
            raise ValueError(f"--mini-batch {self.mini_batch}, expected at least 1")

    @property
    def n_negatives(self) -> int:
        defaults = {"orthogonal": 8, "margin-mse": 1}
        return defaults.get(self.loss, 0) if self.negatives is None else self.negatives

    @property
    def temperature(self) -> float:
        """The scale that is meant."""
        return self.scale or {"cosine": 20.0, "dot": 1.0}[self.score]


def check_batches(objective: Objective, train: TrainConfig) -> None:
    """Raises a ValueError where queries compete for a batch, and training cuts it up or leaves one alone in it."""
    if objective.loss != "in-batch":
        return
    if train.accumulate > 1:
        raise ValueError(
            f"--train.accumulate {train.accumulate} with --loss in-batch, whose queries compete for the whole "
            "batch; --mini-batch saves memory without changing the loss"
        )
    if train.batch_size < 2 and not objective.n_negatives:
        raise ValueError(
            f"--train.batch-size {train.batch_size} with --loss in-batch and no --negatives: nothing to tell apart"
        )


def embed_rows(
    model: zoo.SequenceClassifier,
    tokens: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    rngs: nnx.Rngs | None,
    mini_batch: int | None = None,
) -> tuple[Float[Array, "b d"], Float[Array, ""]]:
    """Vectors of rows, mini_batch of them at a time; on the way back each mini-batch is encoded again.

    So the activations of one mini-batch are all that is ever kept, and a loss that looks at the whole batch has the
    same value and gradient. Each mini-batch has a key of its own for dropout, the same on the way back.

    Returns:
      (vectors, what training adds to its loss as `zoo.Encoder.run` says, the mean of the mini-batches').

    Source: gradient caching (Gao et al. 2021, arXiv:2101.06983), here as `jax.checkpoint` inside `jax.lax.map`.
    """

    def embed(tokens, mask, rngs):
        hidden, auxiliary = model.run(tokens, mask, rngs=rngs)
        return model.vectors(hidden, mask), auxiliary

    n = len(tokens)
    if mini_batch is None or mini_batch >= n:
        return embed(tokens, mask, rngs)
    parts = -(-n // mini_batch)
    keys = None if rngs is None else jax.random.split(rngs.dropout(), parts)

    # Row m * parts + p goes to part p, so that each keeps its share of rows on every device.
    def cut(x):
        x = jnp.pad(x, ((0, parts * mini_batch - n), (0, 0)))
        return jnp.moveaxis(x.reshape(mini_batch, parts, -1), 1, 0)

    def embed_part(part):
        tokens, mask, key = part
        return embed(tokens, mask, None if key is None else nnx.Rngs(dropout=key))

    cuts = cut(tokens), cut(mask), keys
    vectors, auxiliary = jax.lax.map(jax.checkpoint(embed_part, prevent_cse=False), cuts)
    return jnp.moveaxis(vectors, 0, 1).reshape(parts * mini_batch, -1)[:n], jnp.mean(auxiliary)


def retrieval_loss(
    model: zoo.SequenceClassifier, batch: Mapping[str, Any], rngs: nnx.Rngs | None, *, objective: Objective
) -> Loss:
    """The loss of a batch as the module describes it: see `retrieval_losses` for each."""
    b, k = batch["d_ids"].shape
    queries, of_queries = embed_rows(model, batch["q_tokens"], batch["q_mask"], rngs, objective.mini_batch)
    tokens, mask = (batch[name].reshape(b * k, -1) for name in ("d_tokens", "d_mask"))
    documents, of_documents = embed_rows(model, tokens, mask, rngs, objective.mini_batch)
    documents, auxiliary = documents.reshape(b, k, -1), (of_queries + of_documents) / 2
    there = (batch["d_ids"] >= 0).astype(jnp.float32)  # b k
    queries, documents = counted(queries, there[:, 0]), counted(documents, there)
    if objective.loss == "in-batch":
        values = losses.in_batch(
            queries,
            documents,
            batch["d_ids"],
            batch["answers"],
            score=objective.score,
            scale=objective.temperature,
            symmetric=objective.symmetric,
        )
        weights = there[:, 0]
    elif objective.loss == "orthogonal":
        values, weights = losses.orthogonal(queries, documents), there
    elif objective.loss == "prototype":
        if model.classifier is not None:  # the map to the teacher's width; `embed` passes it by
            queries, documents = model.classifier(queries), model.classifier(documents)
        both = losses.prototype(queries, batch["t_queries"])[:, None], losses.prototype(documents, batch["t_documents"])
        values = jnp.concatenate(both, axis=1)
        weights = jnp.concatenate([there[:, :1], there], axis=1)
    else:
        scores = losses.own_scores(queries, documents, score=objective.score)
        if "t_scores" in batch:
            taught = batch["t_scores"]
        else:
            taught = losses.own_scores(batch["t_queries"], batch["t_documents"], score=objective.score)
        values, weights = losses.margin_mse(scores, taught), there[:, 1:]
    return with_auxiliary(Loss(jnp.sum(values * weights), jnp.sum(weights)), model, auxiliary)
