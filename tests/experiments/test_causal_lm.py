"""The experiment as a user runs it: by its command line, on files, with mistakes."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import zoo
from experiments import causal_lm, convert, sample
from experiments.loop import flags
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from tests.places import ROOT
from zoo.stack.mixers import MIXERS

SMALL = [
    "--model.d-model",
    "16",
    "--model.n-layers",
    "2",
    "--model.mamba.d-state",
    "4",
    "--data.seq-len",
    "32",
    "--train.batch-size",
    "4",
    "--steps",
    "6",
    "--train.save-every",
    "2",
    "--train.eval-every",
    "4",
    "--train.log-every",
    "2",
    "--eval-batches",
    "2",
    "--prompt=",
    "--train.no-tensorboard",
]


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def text(tmp_path):
    """A text file of counting sentences."""
    path = tmp_path / "my.txt"
    path.write_text("".join(f"line {i} says {i * i % 97}, and goes on.\n" for i in range(2000)))
    return path


@pytest.fixture
def command(run_command):
    """Runs a command in this process: (exit status, stdout, stderr)."""
    return run_command


def test_trains_resumes_and_samples(text, tmp_path, command):
    arguments = ("tiny", "--data.path", text, "--run-dir", "run", *SMALL)
    status, out, err = command(causal_lm, *arguments)
    assert status == 0, err
    assert "bits/byte" in out
    assert "resumes from step 6" in out
    assert Checkpoints(tmp_path / "run").latest() == 6
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0

    status, out, _ = command(causal_lm, *arguments, "--steps", 8)
    assert status == 0
    assert "resumed from step 6" in out
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["split"] == "train"] == [2, 4, 6, 8]

    greedy = ("run", "--prompt", "line ", "--max-new-tokens", 12, "--temperature", 0)
    status, out, _ = command(sample, *greedy)
    assert status == 0
    assert out.startswith("line ")
    assert command(sample, *greedy)[1] == out


@pytest.mark.slow
def test_carries_its_state_through_a_stop_and_any_micro_batches(text, tmp_path, command):
    small = ("tiny", "--data.path", text, *SMALL, "--train.carry-state")
    runs = {"whole": [], "cut": ["--train.accumulate", 2]}
    for name, options in runs.items():
        status, _, err = command(causal_lm, *small, "--run-dir", name, *options)
        assert status == 0, err
    shutil.copytree("whole", "stopped")
    for step in Checkpoints(tmp_path / "stopped").steps()[1:]:
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
    status, out, err = command(causal_lm, *small, "--run-dir", "stopped")
    assert status == 0, err
    assert "resumed from step 4" in out

    def losses(name):
        return [record["loss"] for record in read_metrics(tmp_path / name) if record["step"] == 6]

    assert losses("stopped") == losses("whole")
    assert np.allclose(losses("cut"), losses("whole"), rtol=1e-4)
    status, _, err = command(causal_lm, *small, "--run-dir", "no", "--model.pattern", "mamba attn")
    assert (status, err.count("\n")) == (1, 1)
    assert "--train.carry-state with --model.pattern 'mamba attn': attention's state grows" in err
    status, _, err = command(causal_lm, *small, "--run-dir", "no", "--model.pattern", "m2/monarch")
    assert (status, err.count("\n")) == (1, 1)
    assert "--model.pattern 'm2/monarch': a long convolution's state grows" in err
    status, _, err = command(causal_lm, *small, "--run-dir", "no", "--model.pattern", "mamba/moe")
    assert (status, err.count("\n")) == (1, 1)
    assert "--model.pattern 'mamba/moe': the balance of experts is not trained" in err


@pytest.mark.slow
def test_monarch_mixer_by_one_flag(text, command):
    arguments = ("tiny", "--data.path", text, "--run-dir", "run", *SMALL, "--model.pattern", "m2/monarch")
    status, _, err = command(causal_lm, *arguments)
    assert status == 0, err
    assert isinstance(causal_lm.load_run("run")[0].backbone.layers[0].mixer, m2.M2Mixer)
    status, _, err = command(causal_lm, *arguments, "--model.m2.l-max", 4, "--run-dir", "no")
    assert (status, err.count("\n")) == (1, 1)
    assert "with --model.m2.l-max 4: filters are at most l-max long" in err


@pytest.mark.slow
def test_converts_a_run_to_both_layouts_and_samples_from_them(text, tmp_path, command):
    assert command(causal_lm, "tiny", "--data.path", text, "--run-dir", "run", *SMALL)[0] == 0
    for source, target, layout in (("run", "theirs", "transformers"), ("theirs", "back", "official")):
        status, out, err = command(convert, source, target, "--layout", layout)
        assert status == 0, err
        assert f"{source} -> {target}: " in out
        assert f"in the {layout} layout, read back and equal" in out
    assert json.loads((tmp_path / "theirs/config.json").read_text())["eos_token_id"] == 256
    ids = jnp.arange(20)[None]
    run, back = causal_lm.load_run(tmp_path / "run")[0], zoo.from_pretrained(tmp_path / "back")
    assert np.array_equal(run(ids), back(ids))
    greedy = ("--prompt", "line ", "--max-new-tokens", 5, "--temperature", 0)
    status, out, err = command(sample, "--model", "back", *greedy)
    assert status == 0, err
    assert out.startswith("line ")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (sample, [], "expected either the folder of a run or --model"),
        (sample, ["run", "--model", "x"], "expected either the folder of a run or --model"),
        (sample, ["run", "--tokenizer", "bytes"], "--tokenizer belongs to --model"),
        (sample, ["--model", "nowhere"], "nowhere is neither a folder nor a name on the hub (owner/name)"),
        (convert, ["nowhere", "out"], "nowhere is neither a folder nor a name on the hub (owner/name)"),
        (convert, ["nowhere", "."], "is not empty; choose another folder"),
        (convert, ["nowhere", "out", "--layout", "hf"], "invalid choice 'hf'"),
    ],
)
def test_mistakes_with_published_models_are_one_clear_line(text, module, arguments, message, command):
    status, _, err = command(module, *arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1


def test_the_run_folder_depends_on_what_the_run_is(text):
    _, tiny = causal_lm.PRESETS["tiny"]
    assert causal_lm.default_run_dir(tiny) == Path("runs/causal_lm/tiny")
    longer = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=9999, log_every=1))
    assert causal_lm.default_run_dir(longer) == Path("runs/causal_lm/tiny")
    other = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, pattern="attn/mlp"))
    assert causal_lm.default_run_dir(other).name.startswith("tiny-")


def test_a_config_comes_back_from_json(tmp_path):
    for _, config in causal_lm.PRESETS.values():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(causal_lm.Config, tmp_path / "config.json") == config


@pytest.mark.slow
def test_bpe_by_a_flag(text, tmp_path, command):
    bpe = ("--data.tokenizer", "bpe", "--data.bpe-vocab-size", 300)
    status, _, err = command(causal_lm, "tiny", "--data.path", text, *bpe, "--run-dir", "run", *SMALL)
    assert status == 0, err
    model, tokenizer, _ = causal_lm.load_run(tmp_path / "run")
    assert model.config.vocab_size == tokenizer.vocab_size <= 300
    assert command(sample, "run", "--prompt", "line", "--max-new-tokens", 5)[0] == 0


def binary_junk(folder):
    (folder / "junk.txt").write_bytes(bytes(range(256)) * 50)
    return ["--data.path", folder / "junk.txt"]


def empty_file(folder):
    (folder / "empty.txt").touch()
    return ["--data.path", folder / "empty.txt"]


def short_documents(folder):
    rows = "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(100))
    (folder / "short.jsonl").write_text(rows)
    return ["--data.path", folder / "short.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "missing.txt"], "missing.txt"),
        (empty_file, "empty"),
        (binary_junk, "junk.txt"),
        (["--model.pattern", "manba"], "unknown mixer 'manba', did you mean 'mamba'?"),
        (["--model.pattern", "attn/mlp*9"], "more than n_layers=2"),
        (["--seq-len", "1000000"], "--data.seq-len 1000000 exceeds all text"),
        (short_documents, "--data.seq-len 32 is longer than the longest document"),
        (["--model.vocab-size", "100"], "--model.vocab-size 100 is smaller than the vocabulary"),
        (["--model.n-layers", "0"], "n_layers=0, expected at least 1"),
        (["--data.tokenizer", "no/such/tokenizer.json"], "no/such/tokenizer.json"),
        (["--train.batch-size", "0"], "batch_size=0, expected at least 1"),
        (["--optim.learning-rate", "-1"], "learning_rate=-1.0, expected more than 0"),
        (["--run-dir", "."], "--run-dir . is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, text, tmp_path, command):
    arguments = arguments(tmp_path) if callable(arguments) else arguments
    base = ["tiny", "--data.path", text, "--run-dir", "run", *SMALL]
    status, _, err = command(causal_lm, *base, *arguments)
    assert status != 0
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--model.patern", "mamba"], "did you mean --model.pattern?"),
        (["tinny"], "unknown preset 'tinny', did you mean 'tiny'?"),
        (["tiny", "--steps", "x"], "--steps"),
        ([], "expected one of"),
    ],
)
def test_a_wrong_flag_is_answered_with_the_right_one(arguments, message, command):
    status, _, err = command(causal_lm, *arguments)
    assert status in (1, 2)
    assert message.lower() in err.lower()
    assert len(err.splitlines()) == 1


def test_another_run_in_the_folder_is_named_by_its_flag(text, command):
    arguments = ("tiny", "--data.path", text, "--run-dir", "run", *SMALL)
    assert command(causal_lm, *arguments)[0] == 0
    status, _, err = command(causal_lm, *arguments, "--model.d-model", 32)
    assert status == 1
    assert "run holds a run with --model.d-model 16, not 32" in err


def test_a_checkpoint_of_another_model_is_refused_and_kept(text, tmp_path, command):
    arguments = ("tiny", "--data.path", text, "--run-dir", "run", *SMALL)
    assert command(causal_lm, *arguments)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["d_model"] = 24
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "model.json").unlink()  # as runs of earlier versions are
    for module, line, message in (
        (causal_lm, [*arguments, "--model.d-model", 24, "--steps", 9], "is of another model"),
        (sample, ["run"], "the tensors do not fit the config. 22 of another shape"),
    ):
        status, _, err = command(module, *line)
        assert status == 1
        assert err.count("error: ") == 1
        assert message in err
        assert "Traceback" not in err
    assert Checkpoints(tmp_path / "run").latest() == 6


@pytest.mark.parametrize("arguments", [["nowhere"], ["."]])
def test_sampling_from_what_is_no_run_is_one_clear_line(arguments, command):
    status, _, err = command(sample, *arguments)
    assert status == 1
    assert "holds no run" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_published_presets_take_their_own_text(text, command):
    smaller = ("--model.d-model", 16, "--model.n-layers", 1, "--data.seq-len", 64, "--train.batch-size", 2)
    arguments = ("mamba-130m", "--data.path", text, *smaller, "--steps", 1, "--eval-batches", 1, "--prompt=")
    status, out, err = command(causal_lm, *arguments, "--train.no-tensorboard")
    assert status == 0, err
    assert int(out.split()[1].replace(",", "")) > 50_280 * 16


def test_a_registered_mixer_is_one_flag_away(monkeypatch):
    monkeypatch.setitem(MIXERS, "mine", MIXERS["mamba2"])
    monkeypatch.setattr(sys, "argv", ["causal_lm", "tiny", "--model.pattern", "mine[d_state=8]/mlp"])
    config = flags.parse(causal_lm.PRESETS, prog="causal_lm", description="")
    model = nnx.eval_shape(lambda: zoo.CausalLM(dataclasses.replace(config.model, vocab_size=9), rngs=nnx.Rngs(0)))
    assert model.backbone.layers[0].mixer.config.d_state == 8


def start(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.causal_lm", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def final_parameters(folder):
    model, _, _ = causal_lm.load_run(folder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.tree.map(np.asarray, split_model(model)[1]))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_exit_status_says_so(number, text, tmp_path):
    process = start("tiny", "--data.path", text, "--run-dir", tmp_path / "run", *SMALL, "--steps", 100_000)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number
    assert "the same command resumes" in out
    assert "Traceback" not in out
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert f"stopped at step {checkpoints.latest()} of 100000" in out


@pytest.mark.slow
def test_killed_ten_times_at_random_a_run_ends_bitwise_where_it_would_have(text, tmp_path):
    arguments = ("tiny", "--data.path", text, *SMALL, "--steps", 300, "--train.save-every", 1, "--train.eval-every", 50)
    whole = start(*arguments, "--run-dir", tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    rng, kills, reached = random.Random(0), 0, 0
    while True:
        process = start(*arguments, "--run-dir", tmp_path / "killed")
        out = []
        for line in process.stdout:
            out.append(line)
            # Once it trains, let it go on for a moment that ends anywhere: in a step, a save, a deletion.
            if kills < 10 and line.startswith(("step ", "held out")):
                time.sleep(rng.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, "".join(out)
        with Checkpoints(tmp_path / "killed") as checkpoints:
            reached, before = checkpoints.latest() or 0, reached
        assert reached >= before
    assert kills == 10
    expected, actual = final_parameters(tmp_path / "whole"), final_parameters(tmp_path / "killed")
    assert all(np.array_equal(a, e) for a, e in zip(actual, expected, strict=True))
    shutil.rmtree(tmp_path / "killed")


@pytest.mark.slow
def test_the_first_command_reaches_its_promised_result(tmp_path, command):
    status, _, err = command(causal_lm, "tiny", "--run-dir", tmp_path / "run")
    assert status == 0, err
    promised = float(causal_lm.__doc__.split(" bits/byte")[0].split()[-1])
    held_out = [r["bits_per_byte"] for r in read_metrics(tmp_path / "run") if r["split"] == "validation"]
    assert held_out[-1] == pytest.approx(promised, rel=0.03)
