"""Training pairs of a query and its answer, in batches of similar length, with documents that do not answer it.

A batch is a function of its rows and a random generator; see `experiments.retrieval.bi_encoder` for what is in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import zoo
from experiments.data.packing import Batch
from experiments.data.special_tokens import SpecialTokens
from experiments.data.text_files import lines_of, read_text
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.encoder_inputs import Encoded, encode
from experiments.encoders.lengths import longest
from experiments.retrieval.beir import Collection
from experiments.retrieval.bi_encoder import Objective
from experiments.retrieval.embed import embed_texts, make_rows
from experiments.retrieval.embedder import load_embedder
from experiments.retrieval.ranking import bm25

# Of how many best documents by BM25 the mined negatives of a query are drawn.
MINED = 30


class Prepared(NamedTuple):
    """A collection in tokens."""

    collection: Collection
    queries: list[Encoded]
    documents: list[Encoded]
    query_rows: dict[str, int]
    """Where each query is in the list."""
    document_rows: dict[str, int]


def prepare(collection: Collection, tokenizer: Tokenizer, *, max_query_len: int, max_doc_len: int) -> Prepared:
    """Tokenises a collection, cut to these lengths."""
    return Prepared(
        collection,
        encode(tokenizer, list(collection.queries.values()), max_len=max_query_len),
        encode(tokenizer, list(collection.documents.values()), max_len=max_doc_len),
        {name: row for row, name in enumerate(collection.queries)},
        {name: row for row, name in enumerate(collection.documents)},
    )


def offsets(prepared: Sequence[Prepared]) -> list[tuple[Prepared, int, int]]:
    """Each collection with the rows of its first query and first document, counted through all of them."""
    out, query, document = [], 0, 0
    for one in prepared:
        out.append((one, query, document))
        query, document = query + len(one.queries), document + len(one.documents)
    return out


class Teaching(NamedTuple):
    """What a teacher says of the training texts; None where it does not."""

    queries: np.ndarray | None = None
    """(n, t) float32: its vector of every query."""
    documents: np.ndarray | None = None
    """(m, t) float32: its vector of every document."""
    triples: np.ndarray | None = None
    """(n, 3) int: rows of a query, its answer and another document."""
    scores: np.ndarray | None = None
    """(n, 2) float32: of both documents of each triple."""


class Pairs:
    """Training queries with their answers.

    `bucket` says for each pair how long its answer is: batches are drawn from one bucket each. Negatives at random come
    from that bucket too, so that length tells nothing, and like those by BM25 only from documents that answer a
    training query of the same collection: nothing is learned of documents that only test queries ask for.

    Args:
      prepared: the collections; rows of queries and documents are counted through all of them.
      special: of the tokenizer.
      model: how it reads rows.
      objective: how many negatives, and which.
      max_query_len, max_doc_len: the longest rows.
      teaching: a teacher's vectors, or its scores, whose triples then are the pairs.
    """

    def __init__(
        self,
        prepared: Sequence[Prepared],
        special: SpecialTokens,
        model: zoo.EncoderConfig,
        objective: Objective,
        *,
        max_query_len: int,
        max_doc_len: int,
        teaching: Teaching = Teaching(),
    ):
        self.teaching, self.triples = teaching, teaching.triples
        self.n_negatives = objective.n_negatives if self.triples is None else 1
        queries = [text for one in prepared for text in one.queries]
        documents = [text for one in prepared for text in one.documents]
        self.queries = make_rows(queries, special, model, max_query_len)
        self.documents = make_rows(documents, special, model, max_doc_len)
        self.answers: dict[int, list[int]] = {}
        self.collection = np.repeat(np.arange(len(prepared)), [len(one.documents) for one in prepared])
        for one, q, d in offsets(prepared):
            for name, grades in one.collection.qrels.get("train", {}).items():
                mine = [d + one.document_rows[document] for document, grade in grades.items() if grade > 0]
                self.answers[q + one.query_rows[name]] = mine
        self.n_answers = max(map(len, self.answers.values()), default=1)
        pairs = [(query, answer) for query, mine in self.answers.items() for answer in mine]
        self.pairs = np.array(pairs, int).reshape(-1, 2) if self.triples is None else self.triples[:, :2]
        self.bucket = self.documents.bucket[self.pairs[:, 1]]
        trained = np.unique(np.array([answer for mine in self.answers.values() for answer in mine], int))
        self.similar: dict[tuple[int, int], list[int]] = {}
        for document in trained.tolist():
            self.similar.setdefault(self._key(document), []).append(document)
        mines = objective.mine == "bm25" and self.n_negatives and self.triples is None
        self.mined = self._mine(prepared, trained) if mines else {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __call__(self, rows: np.ndarray, random: np.random.Generator) -> Batch:
        """The batch of some pairs of one bucket; -1 is an empty row."""
        n, k = len(rows), 1 + self.n_negatives
        there = rows >= 0
        queries = np.where(there, self.pairs[rows, 0], -1)
        d_ids = np.full((n, k), -1, np.int32)
        answers = np.full((n, self.n_answers), -1, np.int32)
        for i in np.flatnonzero(there):
            query, answer = map(int, self.pairs[rows[i]])
            known = self.answers[query]
            answers[i, : len(known)] = known
            others = self.draw(query, answer, random) if self.triples is None else self.triples[rows[i], 2:]
            d_ids[i] = [answer, *others]
        q, d = self.queries(queries), self.documents(d_ids.reshape(-1))
        batch = {
            "q_tokens": q["tokens"],
            "q_mask": q["mask"],
            "d_tokens": d["tokens"].reshape(n, k, -1),
            "d_mask": d["mask"].reshape(n, k, -1),
            "d_ids": d_ids,
            "answers": answers,
        }
        if self.teaching.queries is not None and self.teaching.documents is not None:
            batch |= {"t_queries": self.teaching.queries[queries], "t_documents": self.teaching.documents[d_ids]}
        if self.teaching.scores is not None:
            batch["t_scores"] = self.teaching.scores[rows]
        return batch

    def draw(self, query: int, answer: int, random: np.random.Generator) -> list[int]:
        """Different documents that do not answer a query: mined ones as far as there are, then of the answer's bucket.
        -1 stands where there are no more."""
        chosen: list[int] = []
        for candidates in (self.mined.get(query, ()), self.similar[self._key(answer)]):
            for _ in range(20 * self.n_negatives if len(candidates) else 0):
                if len(chosen) == self.n_negatives:
                    break
                document = int(candidates[random.integers(len(candidates))])
                if document not in chosen and document not in self.answers[query]:
                    chosen.append(document)
        return chosen + [-1] * (self.n_negatives - len(chosen))

    def n_tokens(self) -> int:
        """Positions of the rows of an epoch, padding and negatives included."""
        documents = np.array(self.documents.lengths)[self.bucket].sum() * (1 + self.n_negatives)
        return int(documents + np.array(self.queries.lengths)[self.queries.bucket[self.pairs[:, 0]]].sum())

    def _key(self, document: int) -> tuple[int, int]:
        return int(self.collection[document]), int(self.documents.bucket[document])

    def _mine(self, prepared: Sequence[Prepared], trained: np.ndarray) -> dict[int, np.ndarray]:
        """For every training query the best documents by BM25 that do not answer it."""
        mined = {}
        for number, (one, q, d) in enumerate(offsets(prepared)):
            rows = trained[self.collection[trained] == number]
            asked = [row for row in self.answers if q <= row < q + len(one.queries)]
            if not asked:
                continue
            texts, questions = list(one.collection.documents.values()), list(one.collection.queries.values())
            depth = MINED + self.n_answers
            found = bm25([texts[row - d] for row in rows], [questions[row - q] for row in asked], depth)
            for row, scores, indices in zip(asked, found.scores, found.indices, strict=True):
                best = rows[indices[scores > 0]]
                mined[row] = best[~np.isin(best, self.answers[row])][:MINED]
        return mined


def learn_from(objective: Objective, prepared: Sequence[Prepared], *, max_query_len: int, max_doc_len: int) -> Teaching:
    """Asks the teacher, where there is one: a model, or a table of scores."""
    teacher = objective.teacher
    if teacher is None:
        return Teaching()
    if objective.loss == "margin-mse" and Path(teacher).is_file():
        return read_triples(Path(teacher), prepared)
    return ask_teacher(teacher, prepared, max_query_len=max_query_len, max_doc_len=max_doc_len)


def ask_teacher(source: str, prepared: Sequence[Prepared], *, max_query_len: int, max_doc_len: int) -> Teaching:
    """Vectors of a model for every training text; what it cannot read of a long document is cut off.

    Args:
      source: a run, a published folder or a hub name.
    """
    model, tokenizer, modules = load_embedder(source)

    def vectors(texts: list[str], asked: list[bool], max_len: int, kind: str) -> np.ndarray:
        there = np.flatnonzero(asked)
        said = embed_texts(
            model,
            tokenizer,
            [texts[row] for row in there],
            max_len=min(max_len, longest(model.config) or max_len),
            progress=True,
            prompt=modules.prompts.get(kind, ""),
            modules=modules,
        )
        whole = np.zeros((len(texts), said.shape[1]), np.float32)
        whole[there] = said
        return whole

    train = [one.collection.qrels.get("train", {}) for one in prepared]
    judged = [{name for grades in qrels.values() for name in grades} for qrels in train]
    return Teaching(
        vectors(
            [text for one in prepared for text in one.collection.queries.values()],
            [name in mine for one, mine in zip(prepared, train, strict=True) for name in one.query_rows],
            max_query_len,
            "query",
        ),
        vectors(
            [text for one in prepared for text in one.collection.documents.values()],
            [name in mine for one, mine in zip(prepared, judged, strict=True) for name in one.document_rows],
            max_doc_len,
            "document",
        ),
    )


def read_triples(path: Path, prepared: Sequence[Prepared]) -> Teaching:
    """A teacher's scores, a line each, with tabs: the answer's, the other's, query, answer, other document.

    Queries that are not of the training split are left out.

    Raises:
      ValueError: a line of another form, or an unknown id.

    Source: the layout of the scores that were published with Margin-MSE, sebastian-hofstaetter/neural-ranking-kd.
    """
    queries = {name: q + row for one, q, _ in offsets(prepared) for name, row in one.query_rows.items()}
    documents = {name: d + row for one, _, d in offsets(prepared) for name, row in one.document_rows.items()}
    train = {name for one in prepared for name in one.collection.qrels.get("train", {})}
    triples, scores = [], []
    for number, line in enumerate(lines_of(read_text(path, str(path))), start=1):
        where = f"{path} line {number}"
        try:
            right, wrong, query, answer, other = line.split("\t")
            pair = float(right), float(wrong)
            if not np.isfinite(pair).all():
                raise ValueError
        except ValueError:
            expected = "two scores, query, answer and other document, with tabs"
            raise ValueError(f"{where} is {line[:60]!r}, expected {expected}") from None
        for kind, name, known in (
            ("query", query, queries),
            ("document", answer, documents),
            ("document", other, documents),
        ):
            if name not in known:
                raise ValueError(f"{where}: there is no {kind} {name!r}")
        if query in train:
            triples.append((queries[query], documents[answer], documents[other]))
            scores.append(pair)
    if not triples:
        raise ValueError(f"{path} has no scores for queries of the training split")
    return Teaching(triples=np.array(triples), scores=np.array(scores, np.float32))
