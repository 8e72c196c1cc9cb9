"""Needles in haystacks: passages, in documents of filler that answers nothing, and how well a model finds them.

A document is filler, passages of other documents end to end, with one relevant passage, the needle, somewhere inside.
Its query is what asks for the needle. Filler comes from documents that are nobody's needle, and at all depths a needle
lies in the same filler.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import zoo
from experiments.data.packing import Batch
from experiments.data.special_tokens import SpecialTokens
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.encoder_inputs import Encoded, Texts, encode
from experiments.retrieval.beir import Collection, side_of
from experiments.retrieval.ranking import as_run, measure
from experiments.retrieval.searches import nearest
from experiments.retrieval.start import BiEncoderConfig


class Needles(NamedTuple):
    """Passages to find, and what hides them."""

    queries: list[Encoded]
    passages: list[np.ndarray]
    """(n,) int32 tokens each, without [CLS] and [SEP]."""
    answers: list[list[int]]
    """The passages that answer each query; at least one."""
    filler: list[np.ndarray]


def find_needles(
    collections: Sequence[Collection],
    split: str,
    tokenizer: Tokenizer,
    *,
    needle_len: int,
    max_query_len: int,
    filler_share: float,
    n_queries: int | None = None,
) -> Needles:
    """The needles and the filler of a split. A query with an answer in the filler is left out.

    Args:
      n_queries: at most so many queries, always the same ones.

    Raises:
      ValueError: there are not enough documents for both.
    """
    texts: dict[tuple[int, str], str] = {}  # every answer of the split
    asked: list[tuple[str, list[tuple[int, str]]]] = []
    for number, one in enumerate(collections):
        for query, grades in one.qrels.get(split, {}).items():
            names = [(number, name) for name, grade in grades.items() if grade > 0]
            texts |= {name: one.documents[name[1]] for name in names}
            asked.append((one.queries[query], names))
    shares = {"filler": filler_share, "needle": 1 - filler_share}
    hidden = {name for name in texts if side_of(f"filler {name[1]}", shares) == "filler"}
    asked = [(query, names) for query, names in asked if not hidden & set(names)]
    if n_queries is not None and len(asked) > n_queries:
        asked = [asked[i] for i in sorted(np.random.default_rng(0).permutation(len(asked))[:n_queries])]
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, names in asked for name in names))}

    def tokens(names):
        return [ids[:needle_len] for ids in tokenizer.encode_batch([texts[name] for name in names])]

    filler = [piece for piece in tokens(sorted(hidden)) if len(piece)]
    if len(rows) < 2 or not filler:
        raise ValueError(f"{len(rows)} needles and {len(filler)} fillers in the {split} split; expected more documents")
    return Needles(
        encode(tokenizer, [query for query, _ in asked], max_len=max_query_len),
        tokens(rows),
        [[rows[name] for name in names] for _, names in asked],
        filler,
    )


def haystack(
    needle: np.ndarray,
    filler: Sequence[np.ndarray],
    special: SpecialTokens,
    *,
    length: int,
    depth: float,
    random: np.random.Generator,
) -> Encoded:
    """A document of `length` tokens with a needle in it, [CLS] filler needle filler [SEP].

    Args:
      needle: its tokens.
      filler: passages, drawn with replacement until the document is full.
      special: what to put around it.
      length: of the whole.
      depth: the share of the filler that stands before the needle.
      random: draws the filler, the same whatever the depth is.
    """
    room = length - special.around - len(needle)
    pieces, n = [], 0
    while n < room:
        pieces.append(filler[int(random.integers(len(filler)))])
        n += len(pieces[-1])
    hay = np.concatenate([np.zeros(0, np.int32), *pieces])[:room]
    before = round(depth * room)
    return Encoded(special.row(hay[:before], needle, hay[before:]), np.zeros(length, np.int32))


def needle_batch(
    needles: Needles, queries: Texts, rows: np.ndarray, random: np.random.Generator, *, length: int, n_negatives: int
) -> tuple[Batch, list[Encoded | None]]:
    """The batch of some queries, as `retrieval.bi_encoder` takes it, but for the documents, b k of them in order.

    Args:
      needles: of the training split.
      queries: theirs, in rows.
      rows: which queries; -1 is an empty row.
      random: draws documents, their filler, and where the needle is in it.
      length: of the documents.
      n_negatives: documents for each query whose needle does not answer it.
    """
    d_ids = np.full((len(rows), 1 + n_negatives), -1, np.int32)
    answers = np.full((len(rows), max(map(len, needles.answers))), -1, np.int32)
    for i in np.flatnonzero(rows >= 0):
        known = needles.answers[rows[i]]
        answers[i, : len(known)] = known
        others = np.setdiff1d(np.arange(len(needles.passages)), known) if n_negatives else np.zeros(0, int)
        chosen = [known[random.integers(len(known))], *random.permutation(others)[:n_negatives]]
        d_ids[i, : len(chosen)] = chosen
    documents = [
        haystack(
            needles.passages[document],
            needles.filler,
            queries.special,
            length=length,
            depth=random.random(),
            random=random,
        )
        if document >= 0
        else None
        for document in d_ids.reshape(-1)
    ]
    q = queries(rows)
    return {"q_tokens": q["tokens"], "q_mask": q["mask"], "d_ids": d_ids, "answers": answers}, documents


def hunt(
    model: zoo.SequenceClassifier,
    needles: Needles,
    special: SpecialTokens,
    config: BiEncoderConfig,
    *,
    length: int,
    depth: float | None,
) -> dict[str, float]:
    """How well a model finds needles at one depth (None: at random ones) in documents of one length."""
    documents = []
    for row, passage in enumerate(needles.passages):
        random = np.random.default_rng((row, length))
        where = np.random.default_rng((row, length, 1)).random() if depth is None else depth
        documents.append(haystack(passage, needles.filler, special, length=length, depth=where, random=random))
    found = nearest(model, needles.queries, documents, special, config, max_doc_len=length)
    names = [str(i) for i in range(max(len(needles.queries), len(documents)))]
    qrels = {names[i]: {names[j]: 1 for j in known} for i, known in enumerate(needles.answers)}
    return measure(qrels, as_run(found, names[: len(needles.queries)], names))
