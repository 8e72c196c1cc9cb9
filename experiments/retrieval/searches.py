"""The searches of a split: what is asked, what is searched, and what a model or BM25 finds."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import zoo
from experiments.data.special_tokens import SpecialTokens
from experiments.encoders.encoder_inputs import Encoded
from experiments.retrieval.embed import embed_encoded
from experiments.retrieval.pairs import Prepared
from experiments.retrieval.ranking import DEPTH, Found, Qrels, Run, as_run, bm25, search
from experiments.retrieval.sentence_modules import normalized
from experiments.retrieval.start import BiEncoderConfig


def nearest(
    model: zoo.SequenceClassifier,
    queries: Sequence[Encoded],
    documents: Sequence[Encoded],
    special: SpecialTokens,
    config: BiEncoderConfig,
    *,
    max_doc_len: int,
) -> Found:
    """The documents that a model puts nearest to each query, by the score that it was trained with."""
    embed = functools.partial(embed_encoded, model, special=special, batch_tokens=config.eval_tokens, progress=True)
    q, d = embed(queries, max_len=config.max_query_len), embed(documents, max_len=max_doc_len)
    if config.objective.score == "cosine":
        q, d = normalized(q), normalized(d)
    return search(q, d, DEPTH)


class Search(NamedTuple):
    """Queries of a collection and the documents that are searched for their answers."""

    prepared: Prepared
    qrels: Qrels
    documents: list[str]
    """Their ids."""

    def run(
        self, model: zoo.SequenceClassifier, special: SpecialTokens, config: BiEncoderConfig, *, max_doc_len: int
    ) -> Run:
        """What a model finds."""
        one = self.prepared
        queries = [one.queries[one.query_rows[name]] for name in self.qrels]
        documents = [one.documents[one.document_rows[name]] for name in self.documents]
        found = nearest(model, queries, documents, special, config, max_doc_len=max_doc_len)
        return as_run(found, list(self.qrels), self.documents)

    def bm25(self) -> Run:
        """What BM25 finds."""
        collection = self.prepared.collection
        texts = [collection.documents[name] for name in self.documents]
        found = bm25(texts, [collection.queries[name] for name in self.qrels])
        run = as_run(found, list(self.qrels), self.documents)
        return {query: {name: score for name, score in found.items() if score > 0} for query, found in run.items()}


def searches(
    prepared: Sequence[Prepared], split: str, *, n_queries: int | None = None, n_documents: int | None = None
) -> list[Search]:
    """The searches of a split, one for each collection that has it.

    Args:
      n_queries, n_documents: at most so many of each collection, always the same ones; judged documents are all there.
    """
    out = []
    for one in prepared:
        qrels = one.collection.qrels.get(split, {})
        if not qrels:
            continue
        random = np.random.default_rng(0)
        if n_queries is not None and len(qrels) > n_queries:
            names = list(qrels)
            qrels = {names[i]: qrels[names[i]] for i in sorted(random.permutation(len(names))[:n_queries])}
        documents = list(one.collection.documents)
        if n_documents is not None and len(documents) > n_documents:
            judged = dict.fromkeys(name for grades in qrels.values() for name in grades)
            others = [documents[i] for i in random.permutation(len(documents)) if documents[i] not in judged]
            documents = [*judged, *others[: max(0, n_documents - len(judged))]]
        out.append(Search(one, qrels, documents))
    return out
