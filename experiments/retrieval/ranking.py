"""Search and its measures: exact nearest documents by blocks, BM25, nDCG@10 and its like, TREC's run files.

    vectors -> search -> a run {query: {document: score}} -> measure

Measures are trec_eval's, through `pytrec_eval`: of equal scores the greater document id comes first.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.loop.distributed import by_first

Qrels = Mapping[str, Mapping[str, int]]
"""How relevant documents are to queries: {query: {document: grade}}. Above 0 is relevant."""
Run = dict[str, dict[str, float]]
"""What a search has found: {query: {document: score}}."""

# Documents that a run keeps for each query: what recall@100 needs.
DEPTH = 100
# The runs of letters and digits, from two on, so that `snake_case` is two words.
_WORD = r"(?u)[^\W_]{2,}"


class Found(NamedTuple):
    """The nearest documents of each query, the nearest first."""

    scores: np.ndarray
    """(n, k) float32."""
    indices: np.ndarray
    """(n, k) int64."""


def search(
    queries: Float[np.ndarray, "n d"],
    documents: Float[np.ndarray, "m d"],
    k: int,
    *,
    query_block: int = 1024,
    document_block: int = 65536,
) -> Found:
    """The k documents with the largest dot product with each query; of equal ones those that come first.

    Args:
      queries, documents: vectors; of length 1 for a search by cosine.
      k: how many, at most. There are fewer where there are fewer documents.
      query_block, document_block: how many are scored at once.
    """
    scores = np.zeros((len(queries), 0), np.float32)
    indices = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(documents), document_block):
        block = jnp.asarray(documents[start : start + document_block])
        parts = [
            jax.device_get(_best(jnp.asarray(queries[i : i + query_block]), block, min(k, len(block))))
            for i in range(0, len(queries), query_block)
        ]
        if not parts:
            break
        new_scores, new_indices = (np.concatenate(part) for part in zip(*parts, strict=True))
        scores = np.concatenate([scores, new_scores], axis=1)
        indices = np.concatenate([indices, new_indices + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, indices = np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)
    return Found(scores, indices)


@jax.jit(static_argnums=2)
def _best(queries, documents, k):
    scores = jnp.einsum("nd,md->nm", queries, documents, precision="highest", preferred_element_type=jnp.float32)
    return jax.lax.top_k(scores, k)


def as_run(found: Found, query_ids: Sequence[str], document_ids: Sequence[str]) -> Run:
    """What was found, by the ids of queries and documents."""
    return {
        name: {document_ids[i]: float(score) for score, i in zip(scores, indices, strict=True)}
        for name, scores, indices in zip(query_ids, found.scores, found.indices, strict=True)
    }


def bm25(documents: Sequence[str], queries: Sequence[str], k: int = DEPTH) -> Found:
    """The k best documents of each query by BM25 (k1 1.5, b 0.75, English stop words, no stemming).

    Documents that share no word with the query have score 0; they fill the places that are left, in order.

    Source: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework"; Lucene's form of it, in `bm25s`.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index at DEBUG, and shows that

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), token_pattern=_WORD, stopwords="en", return_ids=False, show_progress=False)

    k = min(k, len(documents))
    known = words(documents)
    if not any(known):
        return Found(np.zeros((len(queries), k), np.float32), np.tile(np.arange(k), (len(queries), 1)))
    index = bm25s.BM25()
    index.index(known, show_progress=False)
    vocabulary = set(index.vocab_dict)
    scores, indices = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
    for i, query in enumerate(words(queries)):
        asked = [word for word in query if word in vocabulary]
        all_scores = index.get_scores(asked) if asked else np.zeros(len(documents), np.float32)
        indices[i] = np.argsort(-all_scores, kind="stable")[:k]
        scores[i] = all_scores[indices[i]]
    return Found(scores, indices)


def measure(qrels: Qrels, run: Run) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall at 1, 10 and 100, averaged over all queries of `qrels`; 0 for what was not searched.

        DCG@k = sum_i grade_i / log2(i + 1)     nDCG@k = DCG@k over that of the best order      MRR = mean of 1 / rank

    Args:
      qrels: each query has a relevant document.
      run: at least 100 documents a query, or all there are.

    Raises:
      ValueError: no queries, or one without a relevant document.

    Source: Järvelin & Kekäläinen 2002 with trec_eval's linear gains.
    """
    return {name: float(np.mean(values)) for name, values in measure_each(qrels, run).items()}


def measure_each(qrels: Qrels, run: Run) -> dict[str, list[float]]:
    """`measure` before the mean: the values of each query, in the order of `qrels`."""
    import pytrec_eval

    if not qrels:
        raise ValueError("qrels has no queries")
    for name, grades in qrels.items():
        if not any(grade > 0 for grade in grades.values()):
            raise ValueError(f"qrels: query {name!r} has no relevant document")
    plain = {name: dict(grades) for name, grades in qrels.items()}
    mine = {name: found for name, found in run.items() if name in plain and found}
    whole = pytrec_eval.RelevanceEvaluator(plain, {"ndcg_cut.10", "recall.1,10,100"}).evaluate(mine)
    # trec_eval's reciprocal rank looks at the whole run.
    head = pytrec_eval.RelevanceEvaluator(plain, {"recip_rank"}).evaluate(
        {name: dict(in_order(found)[:10]) for name, found in mine.items()}
    )
    return {
        "ndcg@10": [whole[name]["ndcg_cut_10"] if name in whole else 0.0 for name in plain],
        "mrr@10": [head[name]["recip_rank"] if name in head else 0.0 for name in plain],
        **{
            f"recall@{k}": [whole[name][f"recall_{k}"] if name in whole else 0.0 for name in plain]
            for k in (1, 10, 100)
        },
    }


def mean_over(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over collections."""
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def in_order(found: Mapping[str, float]) -> list[tuple[str, float]]:
    """A query's documents as trec_eval ranks them: by score, which it keeps in float32, then by id, both downwards."""
    return sorted(found.items(), key=lambda item: (np.float32(item[1]), item[0].encode()), reverse=True)


@by_first
def save_run(run: Run, path: Path, tag: str = "retrieve") -> None:
    """Writes a run as TREC has it, `query Q0 document rank score tag`, in one step. White space in ids becomes "_"."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for name, found in run.items():
            for rank, (document, score) in enumerate(in_order(found), start=1):
                file.write(f"{_word(name)} Q0 {_word(document)} {rank} {score:.6f} {tag}\n")
    os.replace(partial, path)


def _word(name: str) -> str:
    return "_".join(name.split())
