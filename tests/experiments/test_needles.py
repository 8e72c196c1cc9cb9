"""The hunt for needles as a user runs it: by its command line, stopped and resumed, with mistakes."""

import functools
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
from experiments.retrieval.beir import read_beir
from experiments.retrieval.haystacks import find_needles
from tests.experiments.retrieval.test_beir import write_beir
from tests.numerics import with_random_parameters

TOKENIZER = ByteTokenizer()
SPECIAL = special_tokens(TOKENIZER)
OPTIONS = {"needle_len": 12, "max_query_len": 24, "filler_share": 0.4}
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


@pytest.mark.slow
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
