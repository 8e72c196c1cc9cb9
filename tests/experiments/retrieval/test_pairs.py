"""Which documents stand beside a query in a batch, and what a teacher says of them."""

import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.retrieval import pairs as pairs_module
from experiments.retrieval.beir import Collection, read_beir
from experiments.retrieval.bi_encoder import Objective
from experiments.retrieval.embed import embed_texts
from experiments.retrieval.embedder import Embedder, as_embedder
from experiments.retrieval.pairs import Pairs, Teaching, offsets, prepare, read_triples
from experiments.retrieval.ranking import bm25
from experiments.retrieval.sentence_modules import SentenceModules
from tests.experiments.retrieval.test_beir import write_beir
from tests.numerics import assert_close, with_random_parameters

TOKENIZER = ByteTokenizer()
MODEL = zoo.EncoderConfig(d_model=16, n_layers=1, pattern="attn/mlp", vocab_size=260, max_len=None)
LENGTHS = {"max_query_len": 24, "max_doc_len": 256}


def make_pairs(*collections, objective=Objective(), model=MODEL, teaching=Teaching()):
    prepared = [prepare(one, TOKENIZER, **LENGTHS) for one in collections]
    return Pairs(prepared, special_tokens(TOKENIZER), model, objective, teaching=teaching, **LENGTHS)


@pytest.fixture
def collection(tmp_path):
    return read_beir(write_beir(tmp_path))


def small(name, n, answers):
    """Documents and queries of a name and a number; `answers` says which documents answer query i."""
    texts = {f"{name}{i}": f"{name} text {i}" for i in range(n)}
    qrels = {f"{name}{i}": {f"{name}{j}": 1 for j in answers(i)} for i in range(n)}
    return Collection(name, texts, {key: f"which {text}" for key, text in texts.items()}, {"train": qrels})


def test_a_batch_holds_each_query_its_answer_and_all_that_is_known_to_answer_it():
    pairs = make_pairs(small("a", 6, lambda i: [i]), small("b", 4, lambda i: [i, (i + 1) % 4]))
    assert len(pairs) == 6 + 8
    batch = pairs(np.array([0, 7, -1]), np.random.default_rng(0))
    assert batch["d_ids"].tolist() == [[0], [6 + 1], [-1]]
    assert batch["answers"].tolist() == [[0, -1], [6, 7], [-1, -1]]
    assert batch["q_mask"].any(1).tolist() == batch["d_mask"].any((1, 2)).tolist() == [True, True, False]
    for name, text in (("q_tokens", "which b text 0"), ("d_tokens", "b text 1")):
        row = batch[name].reshape(3, -1)[1]
        assert TOKENIZER.decode(row) == text
    assert all(len(values) == 3 for values in batch.values())


@pytest.mark.parametrize("mine", ["random", "bm25"])
def test_negatives_answer_nothing_and_come_from_training_documents_of_the_same_collection(mine, collection):
    other = small("o", 30, lambda i: [i, (i + 1) % 30])
    pairs = make_pairs(other, collection, objective=Objective(negatives=4, mine=mine))
    trained = {30 + i for i in range(0, 60, 3)}
    seen = set()
    for row in range(len(pairs)):
        query, answer = pairs.pairs[row]
        batch = pairs(np.array([row]), np.random.default_rng(row))
        ids = [i for i in batch["d_ids"][0].tolist() if i >= 0]
        assert ids[0] == answer
        assert len(set(ids)) == len(ids)
        assert not set(ids[1:]) & set(pairs.answers[query])
        assert set(ids) <= (trained if answer >= 30 else set(range(30)))
        if mine == "random":
            assert {pairs.documents.bucket[i] for i in ids} == {pairs.documents.bucket[answer]}
        seen |= set(ids[1:])
    assert len(seen) > 40


def test_mined_negatives_are_those_that_bm25_ranks_highest(collection):
    pairs = make_pairs(collection, objective=Objective(negatives=2, mine="bm25"))
    queries, documents = list(collection.queries.values()), list(collection.documents.values())
    trained = list(range(0, 60, 3))
    for query, mined in pairs.mined.items():
        found = bm25([documents[i] for i in trained], [queries[query]], 20)
        best = [trained[i] for i, score in zip(found.indices[0], found.scores[0], strict=True) if score > 0]
        assert mined.tolist() == [i for i in best if i not in pairs.answers[query]]


def test_where_there_are_no_more_documents_there_are_none():
    pairs = make_pairs(small("a", 3, lambda i: [i]), objective=Objective(negatives=5))
    ids = pairs(np.array([1]), np.random.default_rng(0))["d_ids"][0]
    assert sorted(ids.tolist()) == [-1, -1, -1, 0, 1, 2]


def test_a_batch_depends_on_rows_and_generator_alone(collection):
    first, second = (make_pairs(collection, objective=Objective(negatives=3)) for _ in range(2))
    second(np.array([3, 4]), np.random.default_rng(9))
    batches = [pairs(np.array([1, 5]), np.random.default_rng(0)) for pairs in (first, second)]
    assert all(np.array_equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_rows_are_full_for_a_model_that_takes_padding_for_text(collection):
    model = zoo.EncoderConfig(d_model=16, n_layers=1, vocab_size=260, max_len=300, mask_padding=False)
    batch = make_pairs(collection, model=model)(np.array([0]), np.random.default_rng(0))
    assert batch["q_tokens"].shape[-1] == batch["d_tokens"].shape[-1] == 300


def test_a_teacher_reads_every_training_text_once(collection, monkeypatch):
    config = zoo.MaskedLMConfig(d_model=8, n_layers=1, pattern="attn/mlp", vocab_size=260, max_len=40, norm_eps=1e-6)
    model = with_random_parameters(lambda: zoo.MaskedLM(config, rngs=nnx.Rngs(0)))
    embedder = Embedder(as_embedder(model), TOKENIZER, SentenceModules())
    monkeypatch.setattr(pairs_module, "load_embedder", lambda source: embedder)
    prepared = [prepare(one, TOKENIZER, **LENGTHS) for one in (small("o", 5, lambda i: [i]), collection)]
    teaching = pairs_module.ask_teacher("teacher", prepared, **LENGTHS)
    assert teaching.queries.shape == teaching.documents.shape == (65, 8)
    texts = [one.collection.documents for one in prepared]
    flat = [text for part in texts for text in part.values()]
    rows = [0, 4, 5, 5 + 57]
    expected = embed_texts(as_embedder(model), TOKENIZER, [flat[i] for i in rows], max_len=40)
    assert_close(teaching.documents[rows], expected)
    assert not teaching.documents[5 + 1].any()  # a document of the dev split
    batch = make_pairs(small("o", 5, lambda i: [i]), collection, teaching=teaching)(
        np.array([5]), np.random.default_rng(0)
    )
    assert np.array_equal(batch["t_documents"][0, 0], teaching.documents[5])
    assert np.array_equal(batch["t_queries"][0], teaching.queries[5])


def test_triples_bring_their_documents_and_scores(collection, tmp_path):
    path = tmp_path / "triples.tsv"
    path.write_text("3.5\t-1\tq3\td3\td6\n9\t8\tq1\td1\td4\n0.5\t0.25\tq0\td0\td9\n")  # q1 is of the dev split
    prepared = [prepare(one, TOKENIZER, **LENGTHS) for one in (small("o", 5, lambda i: [i]), collection)]
    assert [(q, d) for _, q, d in offsets(prepared)] == [(0, 0), (5, 5)]
    teaching = read_triples(path, prepared)
    assert teaching.triples.tolist() == [[8, 8, 11], [5, 5, 14]]
    objective = Objective(loss="margin-mse", teacher=str(path))
    pairs = Pairs(prepared, special_tokens(TOKENIZER), MODEL, objective, teaching=teaching, **LENGTHS)
    batch = pairs(np.array([1, 0]), np.random.default_rng(0))
    assert batch["d_ids"].tolist() == [[5, 14], [8, 11]]
    assert batch["t_scores"].tolist() == [[0.5, 0.25], [3.5, -1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\tq0\td0", "line 1 is .*, expected two scores, query, answer and other document"),
        ("a\t2\tq0\td0\td3", "expected two scores"),
        ("nan\t2\tq0\td0\td3", "expected two scores"),
        ("1\t2\tq999\td0\td3", "line 1: there is no query 'q999'"),
        ("1\t2\tq0\td0\td999", "line 1: there is no document 'd999'"),
        ("1\t2\tq1\td0\td3", "has no scores for queries of the training split"),
    ],
)
def test_a_wrong_table_of_scores_is_one_line(line, message, collection, tmp_path):
    (tmp_path / "triples.tsv").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_triples(tmp_path / "triples.tsv", [prepare(collection, TOKENIZER, **LENGTHS)])
