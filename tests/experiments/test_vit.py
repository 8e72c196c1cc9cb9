"""Image classification as a user runs it: by its command line, interrupted, with several seeds, and in a notebook."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import convert, vit
from experiments.data.images import ImagesConfig
from experiments.loop import train
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model
from experiments.vision.load import load_model
from experiments.vision.presets import PRESETS, small_classifier

SMALL = [
    *("--model.d-model", "16", "--model.n-layers", "1", "--model.pattern", "attn/mlp", "--model.patch-size", "2"),
    *("--model.attn.head-dim", "8", "--model.mlp.d-ff", "16", "--train.batch-size", "16", "--train.log-every", "5"),
    *("--train.no-tensorboard", "--threads", "2"),
]

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def command(run_command):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, vit)


def parameters(folder):
    model, _ = load_model(folder)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(split_model(model)[1])}


def test_learns_and_predicts_from_its_folder(squares, tmp_path, command):
    rate = ("--optim.learning-rate", 0.01, "--epochs", 20, "--augment.crop", "none")
    status, out, err = command("tiny", "--data.path", squares, "--run-dir", "run", *SMALL, *rate)
    assert status == 0, err
    assert "2 classes: 32 train, 8 validation, 8 test images of 8 x 8" in out
    rows = [line.split() for line in out.split("after the last step:")[1].splitlines()]
    assert rows[1:4] == [["accuracy"], ["validation", "1.0000"], ["test", "1.0000"]]
    run = tmp_path / "run"
    assert {"confusion.png", "mistakes.png", "curves.png", "results.json"} <= {path.name for path in run.iterdir()}
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(p["split"], p["row"]) for p in predictions] == [(s, i) for s in ("validation", "test") for i in range(8)]
    assert all(p["label"] == p["predicted"] and 0.5 < p["probability"] <= 1 for p in predictions)
    results = json.loads((run / "results.json").read_text())
    assert results["images_per_second"] > 0
    assert results["peak_memory_bytes"] > 1e7
    assert any("images_per_second" in record for record in read_metrics(run))

    images = np.load(squares / "test.npz")["images"]
    said = vit.predict(run, [Image.fromarray(images[0]), images[1]])
    assert [p.label for p in said] == ["0", "1"]
    assert sum(said[0].probabilities.values()) == pytest.approx(1)
    assert vit.predict(run, []) == []

    # Another head on it where classes are others; the same one where they are as many.
    status, out, err = command("tiny", "--init", run, "--evaluate-only", "--data.path", squares)
    assert (status, out.splitlines()[1].split()) == (0, ["validation", "1.0000"]), err
    status, _, err = command(
        "tiny", "--init", run, "--run-dir", "more", "--steps", 1
    )  # in place of the preset's epochs
    assert status == 0, err
    status, out, err = command("tiny", "--init", run, "--run-dir", "more", "--steps", 2)
    assert (status, "resumed from step 1" in out) == (0, True), err
    status, _, err = command("tiny", "--init", run, "--run-dir", "other", "--model.d-model", 32)
    assert (status, err) == (1, f"error: --model.d-model 32, but --init {run} has 16; leave the flag out\n")
    shutil.rmtree(run)  # which a run that goes on has no need of
    status, out, err = command("tiny", "--init", run, "--run-dir", "more", "--steps", 3)
    assert (status, "resumed from step 2" in out) == (0, True), err
    assert load_model(tmp_path / "more")[0].config.n_classes == 10


@pytest.mark.slow
def test_a_truncated_jpeg_ends_a_run_by_its_name_and_not_on_request(tmp_path, command):
    random = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / f"photos/{'ab'[i % 2]}/in/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    rest = ("--data.path", "photos", *SMALL, "--model.channels", 3, "--epochs", 1, "--class-weights", "balanced")
    status, _, err = command("tiny", *rest, "--run-dir", "run")
    assert (status, err.count("\n")) == (1, 1)
    assert "the image 'b/in/23.jpg' cannot be read (" in err
    assert "--data.skip-bad leaves such images out" in err
    status, out, err = command("tiny", *rest, "--run-dir", "other", "--data.skip-bad")
    assert status == 0, err
    assert "2 classes: 19 train, 4 validation images" in out


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(squares, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = ("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--augment.erase", 0.5, "--model.drop-path", 0.3)
    arguments = ("tiny", "--data.path", squares, *SMALL, *change, "--train.ema", 0.9, "--train.save-every", 2)
    assert command(*arguments, "--run-dir", "whole", "--epochs", 2)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_signals", _stop_after(3))
        status, out, _ = command(*arguments, "--run-dir", "parts", "--epochs", 2)
        assert (status, "stopped at step" in out) == (0, True)
    status, out, _ = command(*arguments, "--run-dir", "parts", "--epochs", 2)
    assert "resumed from step" in out
    whole, parts = parameters(tmp_path / "whole"), parameters(tmp_path / "parts")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def _stop_after(n):
    """In place of the loop's signals: stops it at its n-th question."""

    class Stop:
        asked = 0

        @property
        def requested(self):
            Stop.asked += 1
            return Stop.asked >= n

    class Manager:
        def __call__(self):
            return self

        def __enter__(self):
            return Stop()

        def __exit__(self, *exception):
            pass

    return Manager()


@pytest.mark.slow
def test_several_seeds_have_a_mean(squares, tmp_path, command):
    status, out, err = command(
        "tiny", "--data.path", squares, "--run-dir", "seeds", *SMALL, "--epochs", 1, "--seeds", 3, 4
    )
    assert status == 0, err
    assert "mean of 2 seeds ± their standard deviation" in out
    assert {path.name for path in (tmp_path / "seeds").iterdir()} == {
        "seed-3",
        "seed-4",
        "config.json",
        "index.html",
        "result.txt",
        "results.json",
    }
    one, other = (parameters(tmp_path / f"seeds/seed-{seed}") for seed in (3, 4))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "preset 'tinny'"),
        (["tiny", "--data.path", "nowhere"], "--data.path nowhere is no folder"),
        (["tiny", "--model.n-classes", "7"], "--model.n-classes 7, but scikit-learn's digits has 10 classes"),
        (["tiny", "--image-size", "9", "--model.patch-size", "2"], "patch_size=2"),
        (["tiny", "--image-size", "9"], "images of 9 x 9 pixels are 81 tokens, --model.m2.l-max 64"),
        (["tiny", "--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (["tiny", "--steps", "7", "--epochs", "2"], "--steps 7 with --epochs 2.0, expected one of the two"),
        (["tiny", "--evaluate-only"], "--evaluate-only is for an --init"),
        (["tiny", "--augment.crop", "middle"], "middle"),
        (["mnist"], "python -m experiments.data fetch mnist-5k"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, command, arguments, message):
    status, _, err = command(*arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_in_a_published_layout_is_as_good(squares, run_command, tmp_path):
    shape = ("--model.class-token", "first", "--model.pool", "token", "--preprocess.mean", 0.4, "--preprocess.std", 0.3)
    arguments = ("tiny", "--data.path", squares, "--run-dir", "run", *SMALL, *shape, "--epochs", 8)
    assert run_command(vit, *arguments, "--optim.learning-rate", 0.01)[0] == 0
    status, out, err = run_command(convert, "run", "out")
    assert (status, "read back and equal" in out) == (0, True), err
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "0", "1": "1"}
    scores = json.loads((tmp_path / "run/results.json").read_text())["runs"][0]
    config = dataclasses.replace(
        PRESETS["tiny"][1], data=ImagesConfig(path=str(squares)), init="out", evaluate_only=True
    )
    again = vit.evaluate_only(config)
    assert again["test"]["loss"] == pytest.approx(scores["test"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", "vim"])
def test_bfloat16_trains_both_directions_without_nan(tmp_path, pattern):
    """Users of Vision Mamba meet NaN in half precision; the loop would raise FloatingPointError at the first one."""
    _, config = PRESETS["tiny"]
    shape = small_classifier(32, 2, 8, 2, pattern=pattern, dtype="bfloat16", residual_in_fp32=False)
    trained = vit.fit(
        dataclasses.replace(
            config,
            model=shape,
            epochs=None,
            train=dataclasses.replace(config.train, steps=2000, batch_size=32, eval_every=1000, save_every=2000),
        ),
        tmp_path / "run",
    )
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert trained.scores["test"]["accuracy"] > 0.85


def test_help_is_worth_reading(command):
    status, out, _ = command("mnist", "--help")
    assert status == 0
    for words in ("--augment.mixup", "--data.hub", "--model.pattern", "--train.ema", "Share of the target"):
        assert words in out
