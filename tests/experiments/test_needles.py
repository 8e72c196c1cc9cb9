"""Needles are where they should be, in filler that answers nothing; and the experiment as a user runs it."""

import functools
import itertools
import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import needles
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.load import load_encoder
from experiments.loop.train import split_model
from experiments.needles import find_needles, haystack, needle_batch
from experiments.retrieval.beir import read_beir
from experiments.retrieval.embed import make_rows
from tests.experiments.retrieval.test_beir import write_beir
from tests.numerics import with_random_parameters

TOKENIZER = ByteTokenizer()
SPECIAL = special_tokens(TOKENIZER)
OPTIONS = {"needle_len": 12, "max_query_len": 24, "filler_share": 0.4}
MODEL = zoo.EncoderConfig(d_model=16, n_layers=1, pattern="attn/mlp", vocab_size=260, max_len=None)
SMALL = shlex.split(
    "tiny --data.path beir --model.d-model 16 --model.n-layers 1 --model.pattern attn/mlp --model.attn.head-dim 8 "
    "--model.mlp.d-ff 32 --train.no-tensorboard --tokenizer bytes --max-query-len 24 --needle-len 12 --lengths 24 40 "
    "--train-lengths 24 --depths 0 1 --train.batch-size 4 --steps 4 --train.save-every 2 --train.eval-every 4 "
    "--eval-queries 6"
)


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def collection(tmp_path):
    return read_beir(write_beir(tmp_path / "beir"))


@pytest.fixture
def command(run_command):
    """Runs `python -m experiments.needles ...` in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, needles)


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
    config = needles.Config(lengths=(40,), needle_len=12, max_query_len=24)

    # Vectors are counts of bytes: of a query, and of what stands first in a document.
    def count(model, encoded, special, **_):
        out = np.zeros((len(encoded), 256), np.float32)
        for row, text in enumerate(encoded):
            digits = [t for t in text.tokens[1:16] if t < 256 and (chr(t).isdigit() or chr(t) == "w")]
            np.add.at(out[row], digits, 1)
        return out

    monkeypatch.setattr(needles, "embed_encoded", count)
    points = [needles.hunt(None, found, SPECIAL, config, length=40, depth=depth) for depth in (0.0, 1.0)]
    assert points[0]["ndcg@10"] > points[1]["ndcg@10"] + 0.2


def test_trains_draws_and_goes_on_bit_for_bit(collection, command):
    status, out, err = command(
        *SMALL, "--run-dir", "run", "--train.keep-last", 9, "--loss", "orthogonal", "--negatives", 1
    )
    assert status == 0, err
    assert Path("run/needles.png").stat().st_size > 0
    said = json.loads(Path("run/needles.json").read_text())
    assert [(p["length"], p["depth"]) for p in said["curves"]] == [(24, 0), (24, 1), (40, 0), (40, 1)]
    assert all(0 <= p["ndcg@10"] <= 1 for p in said["curves"])
    assert f"{said['curves'][3]['mrr@10']:.3f}" in out
    assert isinstance(load_encoder("run").model, zoo.SequenceClassifier)

    shutil.copytree("run", "stopped")
    shutil.rmtree("stopped/checkpoints/4")
    status, out, err = command(
        *SMALL, "--run-dir", "stopped", "--loss", "orthogonal", "--negatives", 1, "--beside", "run"
    )
    assert status == 0, err
    assert "resumed from step 2" in out
    whole, stopped = (jax.tree.leaves(split_model(load_encoder(name).model)[1]) for name in ("run", "stopped"))
    assert all(np.array_equal(a, b) for a, b in zip(whole, stopped, strict=True))
    assert json.loads(Path("stopped/needles.json").read_text()) == said


def test_a_model_that_takes_padding_for_text_gets_full_rows(collection):
    config = zoo.SequenceClassifierConfig(
        **{"d_model": 8, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": 260, "max_len": 48, "n_labels": 0},
        norm_eps=1e-6,
        mask_padding=False,
    )
    found = find_needles([collection], "train", TOKENIZER, **OPTIONS)
    model = with_random_parameters(lambda: zoo.SequenceClassifier(config, rngs=nnx.Rngs(0)))
    options = needles.Config(lengths=(24,), needle_len=12, max_query_len=24)
    task = needles.make_task(options, found, found, SPECIAL, config, model)
    batch = next(task.batches)
    assert batch["d_tokens"].shape[-1] == batch["q_tokens"].shape[-1] == 48
    assert set(batch["d_mask"].sum(-1).reshape(-1).tolist()) <= {24, 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lengths 10", "a document of 10 tokens, expected room for needle_len=12"),
        ("--depths 2", "depths=(2.0,), expected numbers from 0 to 1"),
        ("--filler-share 1", "filler_share=1.0, expected 0 < filler_share < 1"),
        ("--filler-share 0.999", "needles and 20 fillers in the train split; expected more documents"),
        ("--loss prototype --teacher x", "expected neither --teacher nor --mine"),
        ("--beside nowhere", "nowhere has no needles.json"),
        ("--train.batch-size 1", "--train.batch-size 1 with --loss in-batch and no --negatives"),
        ("--model.max-len 30", "--lengths 40 with --model.max-len 30"),
        ("--data.path nowhere/x", "nowhere/x is no folder"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, collection, command, tmp_path):
    status, _, err = command(*SMALL, "--run-dir", "run", *shlex.split(arguments))
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
