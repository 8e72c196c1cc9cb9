"""Needles are where they should be, in filler that answers nothing, and a model's hunt finds those that it reads."""

import itertools

import numpy as np
import pytest

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.retrieval import searches
from experiments.retrieval.beir import read_beir
from experiments.retrieval.embed import make_rows
from experiments.retrieval.haystacks import find_needles, haystack, hunt, needle_batch
from experiments.retrieval.start import BiEncoderConfig
from tests.experiments.retrieval.test_beir import write_beir

TOKENIZER = ByteTokenizer()
SPECIAL = special_tokens(TOKENIZER)
OPTIONS = {"needle_len": 12, "max_query_len": 24, "filler_share": 0.4}
MODEL = zoo.EncoderConfig(d_model=16, n_layers=1, pattern="attn/mlp", vocab_size=260, max_len=None)


@pytest.fixture
def collection(tmp_path):
    return read_beir(write_beir(tmp_path / "beir"))


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("length", [9, 10, 64, 257])
def test_a_needle_is_at_its_depth_in_filler_that_does_not_depend_on_it(length, depth):
    needle, filler = np.full(7, 200), [np.arange(5), np.arange(10, 13)]
    document = haystack(needle, filler, SPECIAL, length=length, depth=depth, random=np.random.default_rng(3)).tokens
    assert (len(document), document[0], document[-1]) == (length, SPECIAL.cls, SPECIAL.sep)
    places = np.flatnonzero(document == 200)
    assert places.tolist() == list(range(places[0], places[0] + 7))
    assert places[0] - 1 == round(depth * (length - 9))
    first = haystack(needle, filler, SPECIAL, length=length, depth=0, random=np.random.default_rng(3)).tokens
    assert np.array_equal(document[document != 200], first[first != 200])
    assert set(document[document != 200].tolist()) <= {*range(5), 10, 11, 12, SPECIAL.cls, SPECIAL.sep}


def test_filler_answers_no_query_and_splits_share_nothing(collection):
    found = {split: find_needles([collection], split, TOKENIZER, **OPTIONS) for split in ("train", "dev", "test")}
    texts = {split: {TOKENIZER.decode(p) for p in one.passages} for split, one in found.items()}
    for split, one in found.items():
        filler = {TOKENIZER.decode(piece) for piece in one.filler}
        assert filler
        assert not filler & texts[split]
        assert len(one.passages) + len(one.filler) == 20
        for query, (answer,) in zip(one.queries, one.answers, strict=True):
            word = TOKENIZER.decode(query.tokens[1:-1]).split()[-1]
            assert TOKENIZER.decode(one.passages[answer]).split()[0] == word
    assert not texts["train"] & texts["test"]
    fewer = find_needles([collection], "test", TOKENIZER, n_queries=5, **OPTIONS)
    assert len(fewer.queries) == len(fewer.passages) == 5
    assert len(fewer.filler) == len(found["test"].filler)


def test_a_query_with_an_answer_in_the_filler_is_left_out(collection):
    train = collection.qrels["train"]
    names = list(train)
    for name, other in itertools.pairwise(names):
        train[name] = train[name] | {other.replace("q", "d"): 1}
    found = find_needles([collection], "train", TOKENIZER, **OPTIONS)
    filler = {TOKENIZER.decode(piece) for piece in found.filler}
    assert 0 < len(found.queries) < 20
    for query, answers in zip(found.queries, found.answers, strict=True):
        name = f"q{TOKENIZER.decode(query.tokens[1:-1]).split()[-1][1:]}"
        answering = {collection.documents[document][:12] for document in train[name]}
        assert {TOKENIZER.decode(found.passages[answer]) for answer in answers} == answering
        assert not answering & filler


def test_a_batch_hides_each_answer_among_others_at_any_depth(collection):
    found = find_needles([collection], "train", TOKENIZER, **OPTIONS)
    queries = make_rows(found.queries, SPECIAL, MODEL, 24)
    rows, places = np.array([2, 0, -1]), []
    for seed in range(20):
        batch, documents = needle_batch(found, queries, rows, np.random.default_rng(seed), length=60, n_negatives=2)
        assert batch["d_ids"][:2, 0].tolist() == [found.answers[2][0], found.answers[0][0]]
        assert batch["answers"].tolist() == [found.answers[2], found.answers[0], [-1]]
        assert [document is None for document in documents] == [False] * 6 + [True] * 3
        for document, needle in zip(documents[:6], batch["d_ids"].reshape(-1), strict=False):
            text, passage = document.tokens.tolist(), found.passages[needle].tolist()
            starts = [i for i in range(60) if text[i : i + len(passage)] == passage]
            assert len(starts) == 1
            places += starts
        assert all(len(set(ids)) == 3 for ids in batch["d_ids"][:2].tolist())
    assert min(places) < 10
    assert max(places) > 38


def test_the_curve_of_a_model_that_reads_the_beginning_alone_falls_with_depth(collection, monkeypatch):
    found = find_needles([collection], "train", TOKENIZER, **OPTIONS)
    config = BiEncoderConfig(max_query_len=24)

    # Vectors are counts of bytes: of a query, and of what stands first in a document.
    def count(model, encoded, special, **_):
        out = np.zeros((len(encoded), 256), np.float32)
        for row, text in enumerate(encoded):
            digits = [t for t in text.tokens[1:16] if t < 256 and (chr(t).isdigit() or chr(t) == "w")]
            np.add.at(out[row], digits, 1)
        return out

    monkeypatch.setattr(searches, "embed_encoded", count)
    points = [hunt(None, found, SPECIAL, config, length=40, depth=depth) for depth in (0.0, 1.0)]
    assert points[0]["ndcg@10"] > points[1]["ndcg@10"] + 0.2
