"""Runs that start from another model: a run's, a published one's, and what may be said beside it."""

import json
import shutil

import jax
import numpy as np
import pytest

import zoo
from experiments import causal_lm, convert, sample
from experiments.causal.load import load_causal
from experiments.encoders.load import load_encoder
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from zoo.published.run_folder import read_model_config

pytestmark = pytest.mark.usefixtures("empty_folder")

SHAPE = ["--model.d-model", 16, "--model.n-layers", 1, "--model.mamba.d-state", 4]
LOOP = ["--data.seq-len", 32, "--train.batch-size", 4, "--train.save-every", 2, "--train.log-every", 2]
LOOP += ["--eval-batches", 2, "--prompt=", "--train.no-tensorboard"]
# So little that parameters stay what they were at the start.
STILL = ["--optim.learning-rate", 1e-12, "--optim.weight-decay", 0]


@pytest.fixture
def texts(tmp_path):
    """Two files of counting sentences, and a run on the first that reads bytes."""
    for name, verb in (("one.txt", "says"), ("two.txt", "sings")):
        (tmp_path / name).write_text("".join(f"line {i} {verb} {i * i % 97}, and so on.\n" for i in range(1000)))
    return tmp_path


@pytest.fixture
def trained(texts, run_command):
    status, _, err = run_command(
        causal_lm, "tiny", "--data.path", "one.txt", *SHAPE, *LOOP, "--steps", 2, "--run-dir", "source"
    )
    assert status == 0, err
    return texts / "source"


def parameters(folder, step="latest"):
    return split_model(causal_lm.load_run(folder, step=step)[0])[1]


def assert_near(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), actual, expected)


def test_a_run_starts_from_the_weights_of_another_and_resumes_without_it(trained, tmp_path, run_command):
    start = ("tiny", "--init", "source", "--data.path", "two.txt", *LOOP)
    status, out, err = run_command(causal_lm, *start, *STILL, "--steps", 2, "--run-dir", "still")
    assert status == 0, err
    assert "resumed" not in out
    assert_near(parameters("still"), parameters("source"))
    record = json.loads((tmp_path / "still/checkpoints/2/record.json").read_text())
    assert any(name.startswith("opt_state.") for name in record["arrays"])
    # With another learning rate it learns, and from the start as a new run does: its steps and its warm-up are its own.
    arguments = (*start, "--optim.learning-rate", 0.01, "--steps", 4, "--run-dir", "learned")
    assert run_command(causal_lm, *arguments)[0] == 0
    records = [r for r in read_metrics(tmp_path / "learned") if r["split"] == "train"]
    assert [r["step"] for r in records] == [2, 4]
    # Cut back to its first checkpoint, with what it began with gone, it ends bit for bit where it had.
    whole = parameters("learned")
    shutil.rmtree("source")
    shutil.rmtree("learned/checkpoints/4")
    status, out, err = run_command(causal_lm, *arguments)
    assert (status, "resumed from step 2 in learned" in out) == (0, True), err
    assert jax.tree.all(jax.tree.map(np.array_equal, parameters("learned"), whole))
    # Without any checkpoint it has to begin again, and says what is missing.
    shutil.rmtree("learned/checkpoints")
    status, _, err = run_command(causal_lm, *arguments)
    assert (status, err) == (1, "error: source is neither a folder nor a name on the hub (owner/name)\n")
    assert run_command(sample, "still", "--max-new-tokens", 3)[0] == 0


@pytest.mark.slow
def test_a_published_model_is_trained_on_with_its_tokenizer(texts, run_command):
    bpe = ("--data.tokenizer", "bpe", "--data.bpe-vocab-size", 300)
    arguments = ("tiny", "--data.path", "one.txt", *SHAPE, *LOOP, *bpe, "--steps", 2, "--run-dir", "source")
    assert run_command(causal_lm, *arguments)[0] == 0
    assert run_command(convert, "source", "published")[0] == 0
    low = zoo.from_pretrained("published", dtype="bfloat16")
    zoo.save_pretrained(low, "published", "transformers")  # training goes on in float32 all the same
    start = ("tiny", "--init", "published", "--data.path", "two.txt", *LOOP, *STILL, "--steps", 2)
    status, _, err = run_command(causal_lm, *start, "--run-dir", "more")
    assert status == 0, err
    model, tokenizer, config = causal_lm.load_run("more")
    assert tokenizer.to_json() == causal_lm.load_run("source")[1].to_json()
    assert (config.model.d_model, config.model.param_dtype, model.config) == (16, "float32", config.model)
    assert_near(parameters("more"), split_model(zoo.from_pretrained("published", dtype="float32"))[1])


@pytest.mark.slow
def test_one_without_a_tokenizer_is_given_it_by_the_flag(trained, run_command):
    assert run_command(convert, "source", "published")[0] == 0
    (trained.parent / "published/tokenizer.json").unlink()
    start = ("tiny", "--init", "published", "--data.path", "two.txt", *LOOP, "--steps", 1, "--run-dir", "more")
    status, _, err = run_command(causal_lm, *start)
    assert (status, err) == (1, "error: published has no tokenizer.json; name one with --data.tokenizer\n")
    status, _, err = run_command(causal_lm, *start, "--data.tokenizer", "bytes")
    assert status == 0, err


@pytest.mark.slow
def test_how_a_model_is_trained_may_be_said_beside_its_weights(trained, run_command):
    options = ("--model.dropout", 0.1, "--model.dtype", "bfloat16", "--model.remat", "--model.d-model", 16)
    start = ("tiny", "--init", "source", "--data.path", "two.txt", *LOOP, *STILL, "--steps", 1)
    status, _, err = run_command(causal_lm, *start, *options, "--run-dir", "more")
    assert status == 0, err
    config = read_model_config(trained.parent / "more")
    assert (config.dropout, config.dtype, config.param_dtype, config.remat) == (0.1, "bfloat16", "float32", True)
    assert_near(parameters("more"), parameters("source"))


# All in one test: what they start from takes longer than they do.
MISTAKES = [
    (["--model.d-model", 32], "--model.d-model 32, but --init source has 16; leave the flag out"),
    (["--model.pattern=attn/mlp"], "--model.pattern attn/mlp, but --init source has mamba; leave the flag out"),
    (["--model.mamba.d-state", 8], "--model.mamba.d-state 8, but --init source has 4; leave the flag out"),
    (
        ["--data.tokenizer", "wordpiece"],
        "--data.tokenizer wordpiece, but source has a tokenizer of its own (bytes",
    ),
    (["--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
    (["--init", "other"], "other holds a MaskedLM, expected a causal language model"),
]


def test_what_contradicts_the_start_is_named_and_leaves_nothing(trained, tmp_path, run_command):
    (tmp_path / "other").mkdir()
    runs.save_model_config(zoo.MaskedLMConfig(causal=False), tmp_path / "other")
    shutil.copy(trained / "tokenizer.json", tmp_path / "other")
    (tmp_path / "other/config.json").write_text("{}")
    start = ("tiny", "--init", "source", "--data.path", "two.txt", *LOOP, "--steps", 1, "--run-dir", "more")
    for arguments, message in MISTAKES:
        status, _, err = run_command(causal_lm, *start, *arguments)
        assert (status, err.count("\n")) == (1, 1)
        assert message in err
        assert not (tmp_path / "more").exists()


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_a_start_too(trained, run_command):
    (trained / "model.json").unlink()  # config.json said which model it was
    before = load_causal("source").model.config
    status, _, err = run_command(
        causal_lm, "tiny", "--init", "source", "--data.path", "two.txt", *LOOP, "--steps", 1, "--run-dir", "more"
    )
    assert status == 0, err
    assert causal_lm.load_run("more")[0].config == before


def test_a_run_of_a_language_model_is_no_encoder(trained):
    with pytest.raises(ValueError, match="source holds a CausalLM, expected an encoder"):
        load_encoder("source")
    assert Checkpoints(trained).latest() == 2
