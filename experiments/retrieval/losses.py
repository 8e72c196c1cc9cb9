"""Losses of a bi-encoder, as functions of vectors: one number a query, before any mean.

    in_batch       which of the batch's documents answers the query
    orthogonal     cosine 1 with an answer, 0 with any other document; pair by pair
    prototype      the vectors of a teacher
    margin_mse     the differences between a teacher's scores

`k` counts a query's own documents, the first of which answers it; `j` the answers that are known.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Score = Literal["cosine", "dot"]


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1, in at least float32; one of length 0 stays."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The floor is below any length that matters; a root of 0 has no gradient.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def as_scored(x: Float[Array, "*b d"], score: Score) -> Float[Array, "*b d"]:
    """Vectors whose dot products are scores: for cosines of length 1; in at least float32."""
    return unit(x) if score == "cosine" else x.astype(jnp.promote_types(x.dtype, jnp.float32))


def own_scores(
    queries: Float[Array, "b d"], documents: Float[Array, "b k d"], *, score: Score = "cosine"
) -> Float[Array, "b k"]:
    """The score of each query with its own documents."""
    return jnp.einsum("bd,bkd->bk", as_scored(queries, score), as_scored(documents, score), precision="highest")


def in_batch(
    queries: Float[Array, "b d"],
    documents: Float[Array, "b k d"],
    document_ids: Int[Array, "b k"],
    answer_ids: Int[Array, "b j"],
    *,
    score: Score = "cosine",
    scale: float = 20.0,
    symmetric: bool = False,
) -> Float[Array, "b"]:
    """Multiple negatives ranking: cross-entropy of each query's answer among all documents of the batch.

        L_i = -log( exp(scale s(q_i, d_i)) / sum_c exp(scale s(q_i, d_c)) )

    c runs over the answer d_i and over every document of the batch that is not known to answer q_i. `symmetric` takes
    the mean of this and the same with queries and answers exchanged.

    Args:
      queries: a vector each.
      documents: those of each query; the first answers it.
      document_ids: which documents they are; -1 for none, which is left out.
      answer_ids: the documents that are known to answer each query, filled up with -1.
      score: what s is.
      scale: inverse temperature. 20 suits cosines, 1 dot products.
      symmetric: whether the right query must be found from its answer too.

    Returns:
      the loss of each query, in at least float32. That of one without documents has no meaning.

    Source: Henderson et al. 2017, arXiv:1705.00652; scale and cosine as in sentence-transformers'
      MultipleNegativesRankingLoss, its symmetric form as in MultipleNegativesSymmetricRankingLoss.
    """
    b, k = document_ids.shape
    q = as_scored(queries, score)
    d = as_scored(documents, score).reshape(b * k, -1)
    scores = scale * jnp.einsum("bd,cd->bc", q, d, precision="highest")  # b, b k
    ids = document_ids.reshape(-1)
    answers = jnp.any(answer_ids[:, :, None] == ids, axis=1)
    own = jnp.arange(b * k) == jnp.arange(b)[:, None] * k
    loss = _cross_entropy(scores, own, (answers | (ids < 0)) & ~own)
    if not symmetric:
        return loss
    # From the answers' side: queries that a document answers as well are no mistakes, and empty rows ask nothing.
    empty = document_ids[:, 0] < 0
    own = jnp.eye(b, dtype=bool)
    back = _cross_entropy(scores[:, ::k].T, own, (answers[:, ::k].T | empty) & ~own)
    return (loss + back) / 2


def _cross_entropy(scores: Float[Array, "b c"], right: Bool[Array, "b c"], left_out: Bool[Array, "b c"]):
    scores = jnp.where(left_out, -jnp.inf, scores)
    return jax.nn.logsumexp(scores, axis=1) - jnp.sum(jnp.where(right, scores, 0), axis=1)


def orthogonal(queries: Float[Array, "b d"], documents: Float[Array, "b k d"]) -> Float[Array, "b k"]:
    """Orthogonal projection loss: each pair alone, so that any batch size gives the same gradient.

        L = (cos(q, d) - y)^2        y = 1 for the answer, 0 for other documents

    Args:
      queries: a vector each.
      documents: those of each query; the first answers it, the others do not.

    Returns:
      the loss of each pair, in at least float32.

    Source: Saad-Falcon et al. 2024, arXiv:2402.07440; Ranasinghe et al. 2021, arXiv:2103.14021.
    """
    cosines = own_scores(queries, documents)
    return jnp.square(cosines - (jnp.arange(cosines.shape[1]) == 0))


def prototype(vectors: Float[Array, "*b d"], teacher: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """Pulls vectors towards a teacher's: 1 - cos(v, t), half the squared distance of the vectors of length 1.

    Source: after Saad-Falcon et al. 2024, arXiv:2402.07440, whose teacher reads the beginnings of documents.
    """
    return 1 - jnp.sum(unit(vectors) * unit(teacher), axis=-1)


def margin_mse(scores: Float[Array, "b k"], teacher_scores: Float[Array, "b k"]) -> Float[Array, "b n"]:
    """Squared error of the margins between the answer and each of the other n = k - 1 documents.

        L = ((s_+ - s_-) - (t_+ - t_-))^2

    Adding a constant to all s, or to all t, changes nothing: a teacher may score on a scale of another origin.

    Args:
      scores: of the student, the answer's first.
      teacher_scores: of the teacher for the same pairs.

    Source: Hofstätter et al. 2020, arXiv:2010.02666.
    """
    margins = scores[:, :1] - scores[:, 1:]
    return jnp.square(margins - (teacher_scores[:, :1] - teacher_scores[:, 1:]))
