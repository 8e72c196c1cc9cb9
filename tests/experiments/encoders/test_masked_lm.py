"""Masked language modelling as a user runs it: by its command line, on files, with mistakes."""

import dataclasses
import functools
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import bert
from experiments.data.special_tokens import special_tokens
from experiments.encoders import masked_lm
from experiments.encoders.lengths import check_lengths
from experiments.encoders.load import load_encoder
from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from zoo.models.build import build

SMALL = shlex.split(
    "pretrain tiny --model.d-model 16 --model.n-layers 1 --model.mlp.d-ff 16 --model.pattern attn/mlp "
    "--model.attn.head-dim 8 --data.tokenizer bytes --data.seq-len 64 --train.batch-size 4 --steps 6 "
    "--train.save-every 2 --train.eval-every 4 --train.log-every 2 --eval-batches 2 --train.no-tensorboard"
)
# The same beside --init: with nothing of the model and its tokenizer.
START = ("pretrain", "tiny", *SMALL[SMALL.index("--data.seq-len") :])


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def text(tmp_path):
    """A text file of counting sentences."""
    path = tmp_path / "my.txt"
    path.write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    return path


@pytest.fixture
def command(run_command):
    """Runs `python -m experiments.bert ...` in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, bert)


def parameters(folder):
    return jax.tree.map(np.asarray, split_model(load_encoder(folder).model)[1])


def test_trains_resumes_and_is_loaded(text, tmp_path, command):
    arguments = (*SMALL, "--data.path", text, "--run-dir", "run")
    status, out, err = command(*arguments)
    assert status == 0, err
    assert "packed rows, 100.0% of them text" in out
    assert "guessed right" in out
    assert "hidden -> guessed" in out
    for name in ("config.json", "model.json", "tokenizer.json", "metrics.jsonl", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    held_out = [record for record in read_metrics(tmp_path / "run") if record["split"] == "validation"]
    assert {"loss", "accuracy", "perplexity"} <= held_out[-1].keys()

    status, out, _ = command(*arguments, "--steps", 8)
    assert status == 0
    assert "resumed from step 6" in out
    model, tokenizer, _ = load_encoder("run")
    assert isinstance(model, zoo.MaskedLM)
    assert model.config.vocab_size == special_tokens(tokenizer).vocab_size == 260


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["packed", "buckets"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(rows, text, tmp_path, command):
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(60):
        (documents / f"{i}.txt").write_text(f"Document {i}. " + "word " * (i % 17))
    small = (*SMALL, "--data.path", documents, "--rows", rows, "--data.allow-short-documents")
    assert command(*small, "--run-dir", "whole")[0] == 0
    shutil.copytree("whole", "stopped")
    for step in Checkpoints(tmp_path / "stopped").steps()[1:]:
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
    status, out, err = command(*small, "--run-dir", "stopped")
    assert status == 0, err
    assert "resumed from step 4" in out
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, parameters("stopped"), parameters("whole"))))
    one, other = (
        [record for record in read_metrics(tmp_path / name) if record["split"] == "validation"]
        for name in ("whole", "stopped")
    )
    assert one[-1] == other[-1]


@pytest.mark.slow
def test_goes_on_from_a_run_with_longer_rows(text, tmp_path, command):
    m2 = ("--model.pattern", "m2/monarch", "--model.m2.l-max", 64, "--model.monarch.d-ff", 16)
    positions = ("--model.max-len", 64)
    assert command(*SMALL, *m2, *positions, "--data.path", text, "--run-dir", "short")[0] == 0
    longer = (*START, "--data.path", text, "--init", "short", "--run-dir", "long", "--data.seq-len", 128, "--steps", 2)
    status, out, err = command(*longer)
    assert status == 0, err
    model = load_encoder("long").model
    assert out.startswith("m2/monarch: ")  # the shape of the run, not that of the flags
    assert (model.config.m2.l_max, model.config.max_len) == (128, 128)


@pytest.mark.slow
def test_a_run_begun_from_another_resumes_without_it_and_its_flags_agree_with_it(text, tmp_path, command):
    assert command(*SMALL, "--data.path", text, "--run-dir", "source", "--steps", 2)[0] == 0
    start = (*START, "--data.path", text, "--init", "source", "--run-dir", "more")
    for flag, message in {
        "--model.d-model=32": "--model.d-model 32, but --init source has 16",
        "--model.pattern=m2/mlp": "--model.pattern m2/mlp, but --init source has attn/mlp",
        "--data.tokenizer=bpe": "--data.tokenizer bpe, but source has a tokenizer of its own (bytes, 257 ids)",
    }.items():
        status, _, err = command(*start, flag)
        assert (status, err.partition("; leave the flag out")[0]) == (1, f"error: {message}")
        assert not (tmp_path / "more").exists()
    status, _, err = command(*start, "--steps", 4)
    assert status == 0, err
    whole = parameters("more")
    shutil.rmtree("source")
    shutil.rmtree("more/checkpoints/4")
    status, out, err = command(*start, "--steps", 4)
    assert (status, "resumed from step 2" in out) == (0, True), err
    assert jax.tree.all(jax.tree.map(np.array_equal, parameters("more"), whole))


@pytest.mark.slow
def test_every_preset_builds_and_its_config_comes_back_from_json(tmp_path):
    for name, (_, config) in masked_lm.PRESETS.items():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(masked_lm.Config, tmp_path / "config.json") == config
        few = min(config.model.n_layers, 3)  # one of each kind
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 512, n_layers=few)
        nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0)))
        check_lengths(model, config.data.seq_len)
        assert name in ("tiny", "small") or config.model.vocab_size == config.data.bpe_vocab_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "missing.txt"], "missing.txt"),
        (["--model.pattern", "m2/monarch", "--model.m2.l-max", 32], "--data.seq-len 64 with --model.m2.l-max 32"),
        (["--model.max-len", 32], "--data.seq-len 64 with --model.max-len 32: there are no more positions"),
        (
            ["--model.vocab-size", 100],
            "--model.vocab-size 100 is smaller than the vocabulary",
        ),
        (["--masking.rate", 0], "rate=0.0, expected 0 < rate < 1"),
        (["--data.seq-len", 2], "seq_len=2, expected at least 3"),
        (["--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (["--model.pattern", "attn[windw=3]"], "windw"),
        (["--rows", "paked"], "paked"),
        (["--run-dir", "."], "--run-dir . is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, text, tmp_path, command):
    status, _, err = command(*SMALL, "--data.path", text, "--run-dir", "run", *arguments)
    assert status != 0
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "unknown command 'pretain', did you mean 'pretrain'?"),
        (["pretrain", "tinny"], "unknown preset 'tinny', did you mean 'tiny'?"),
        (["pretrain", "tiny", "--masking.rat", "0.3"], "or --masking.rate?"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(arguments, message, command):
    status, _, err = command(*arguments)
    assert status in (1, 2)
    assert message in err


def test_help_names_the_commands(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in bert.COMMANDS:
        assert f"bert {name}" in out
    assert command("--help") == command()


def test_an_init_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no sound checkpoint .* in .*other/checkpoints; there are none"):
        load_encoder(tmp_path / "other")
