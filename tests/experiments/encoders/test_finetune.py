"""Fine-tuning as a user runs it: by its command line, on tables, with several seeds, interrupted, and in a notebook."""

import dataclasses
import functools
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import zoo
from experiments.encoders import finetune, masked_lm
from experiments.encoders.load import load_encoder
from experiments.loop import flags, train
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.metrics import read_metrics
from experiments.loop.train import split_model

SMALL = [
    *("--model.d-model", "16", "--model.n-layers", "1", "--model.pattern", "attn/mlp", "--model.attn.head-dim", "8"),
    *("--model.mlp.d-ff", "16", "--data.tokenizer", "bytes", "--max-len", "32", "--train.batch-size", "8"),
    *("--train.log-every", "5", "--train.no-tensorboard"),
]


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def command(run_command):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, finetune)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(tmp_path):
    """A folder with texts that their first letter tells apart, and nothing else does."""
    rows = [
        {"text": f"{'xy'[i % 2]} {i // 2}", "label": ("left", "right")[i % 2], "score": float(i % 2), "id": i}
        for i in range(48)
    ]
    write(tmp_path / "words/train.jsonl", rows[:32])
    write(tmp_path / "words/validation.jsonl", rows[32:40])
    write(tmp_path / "words/test.jsonl", rows[40:])
    return tmp_path / "words"


def parameters(folder):
    model = load_encoder(folder).model
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(split_model(model)[1])}


def assert_same_bits(one, other):
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_learns_and_predicts_from_its_folder(words, tmp_path, command):
    rate = ("--optim.learning-rate", 0.01, "--epochs", 20)
    arguments = ("tiny", "--data.path", words, "--run-dir", "run", *SMALL, *rate, "--baseline")
    status, out, err = command(*arguments)
    assert status == 0, err
    assert "classification of 2 classes: 32 train, 8 validation, 8 test" in out
    table = out.split("after the last step:")[1].splitlines()
    assert table[1].split() == ["accuracy", "matthews", "f1"]
    assert table[2].split() == ["validation", "1.0000", "1.0000", "1.0000"]
    assert [line.split("  ")[1] for line in table[3:6]] == [
        "test",
        "validation, counting words",
        "test, counting words",
    ]
    for name in ("config.json", "results.json", "labels.json", "curves.png", "confusion.png", "tokenizer.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["summary"]["test"]["accuracy"] == {"mean": 1.0, "std": None}
    written = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [(row["split"], row["predicted"]) for row in written] == [("test", row["label"]) for row in written]
    assert [(row["id"], row["text"]) for row in written] == [(i, f"{'xy'[i % 2]} {i // 2}") for i in range(40, 48)]
    assert all(row["scores"].keys() == {"left", "right"} for row in written)

    said = finetune.predict(tmp_path / "run", ["x 7", "y 900", "x" * 99])
    assert said.labels[:2] == ["left", "right"]
    assert np.allclose(np.sum(said.scores, axis=1), 1)
    assert said.scores[0][0] > 0.5
    assert finetune.predict(tmp_path / "run", []) == ([], [])
    with pytest.raises(ValueError, match="expected a list of texts"):
        finetune.predict(tmp_path / "run", "x 7")
    assert isinstance(load_encoder(tmp_path / "run").model, zoo.SequenceClassifier)

    status, again, err = command(*arguments)
    assert status == 0, err
    assert "resumed from step 80" in again
    assert again.split("after the last step:")[1] == out.split("after the last step:")[1]


@pytest.mark.slow
def test_several_seeds_and_a_stop_end_where_one_run_would(words, tmp_path, command):
    rest = ("--data.path", words, *SMALL, "--epochs", 2, "--train.save-every", 3)
    status, out, err = command("tiny", *rest, "--run-dir", "several", "--seeds", 3, 5)
    assert status == 0, err
    assert "mean of 2 seeds ± their standard deviation" in out
    assert command("tiny", *rest, "--run-dir", "one", "--train.seed", 5)[0] == 0
    assert_same_bits("several/seed-5", "one")

    shutil.copytree("several", "stopped")
    for step in Checkpoints(tmp_path / "stopped/seed-5").steps()[1:]:
        shutil.rmtree(tmp_path / f"stopped/seed-5/checkpoints/{step}")
    status, out, err = command("tiny", *rest, "--run-dir", "stopped", "--seeds", 3, 5, 6)
    assert status == 0, err
    assert "mean of 3 seeds" in out
    assert "resumed from step 8 in stopped/seed-3" in out
    assert f"resumed from step {Checkpoints(tmp_path / 'stopped/seed-5').steps()[0]} in stopped/seed-5" in out
    assert_same_bits("stopped/seed-5", "several/seed-5")
    name = "seed-5/predictions.jsonl"
    assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "several" / name).read_text()

    results, more = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("several", "stopped"))
    assert more["runs"][:2] == results["runs"]
    losses = [run["test"]["loss"] for run in results["runs"]]
    assert losses[0] != losses[1]
    assert results["summary"]["test"]["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert results["summary"]["test"]["loss"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)

    with pytest.raises(FileNotFoundError, match="choose one of its runs, seed-3, seed-5"):
        finetune.predict("several", ["x 1"])
    status, _, err = command("tiny", *rest, "--run-dir", "one", "--seeds", 3, 5)
    assert (status, err.count("\n")) == (1, 1)
    assert "one holds a run of one seed" in err


def test_a_stop_ends_all_seeds_and_says_where_it_goes_on(words, tmp_path, command, monkeypatch):
    monkeypatch.setattr(train, "stop_signals", lambda: nullcontext(SimpleNamespace(requested=True)))
    arguments = ("tiny", "--data.path", words, *SMALL, "--epochs", 2, "--run-dir", "run", "--seeds", 3, 5)
    status, out, err = command(*arguments)
    assert status == 0, err
    assert out.endswith("stopped at step 1 of 8, saved in run/seed-3; the same command resumes\n")
    assert not (tmp_path / "run/results.json").exists()
    assert not (tmp_path / "run/seed-5").exists()
    assert "resumed from step 1 in run/seed-3" in command(*arguments)[1]


def test_an_epoch_is_all_rows_and_another_run_in_the_folder_is_refused(words, command):
    arguments = ("tiny", "--data.path", words, "--run-dir", "run", *SMALL, "--epochs", 3)
    assert command(*arguments)[0] == 0
    held_out = [record["step"] for record in read_metrics(Path("run")) if record["split"] == "validation"]
    assert held_out == [4, 8, 12]
    status, _, err = command(*arguments, "--pool", "last")
    assert (status, err.count("\n")) == (1, 1)
    assert "run holds a run with --pool mean, not last" in err


@pytest.fixture
def pretrained(tmp_path, run_command):
    """The folder of a masked language model that has seen a little text."""
    (tmp_path / "text.txt").write_text("".join(f"x says good {i}, y says bad.\n" for i in range(300)))
    small = [flag for flag in SMALL if flag not in ("--max-len", "32")]
    arguments = ("tiny", "--data.path", "text.txt", "--data.seq-len", 32, "--run-dir", "pretrained", *small)
    steps = ("--steps", 3, "--eval-batches", 1, "--examples", 0)
    status, _, err = run_command(masked_lm, *arguments, *steps)
    assert status == 0, err
    return tmp_path / "pretrained"


@pytest.mark.slow
def test_starts_from_what_was_pretrained_and_from_scratch_in_its_shape(words, pretrained, command):
    rest = ("--data.path", words, "--max-len", 32, "--train.batch-size", 8, "--train.no-tensorboard", "--steps", 1)
    frozen = ("--epochs", "None", "--optim.learning-rate", 1e-12, "--init", pretrained)
    for name, options in {
        "init": (),
        "scratch": ("--scratch",),
        "mlm": ("--head", "mlm", "--verbaliser", "l r"),
    }.items():
        status, _, err = command("tiny", *rest, *frozen, *options, "--run-dir", name)
        assert status == 0, err
    before = parameters(pretrained)
    after = {name: parameters(name) for name in ("init", "scratch", "mlm")}

    for flag, value, said in (("--model.d-model", 32, 16), ("--model.n-layers", 2, 1)):
        status, _, err = command("tiny", *rest, *frozen, "--run-dir", "other", flag, value)
        assert (status, err) == (1, f"error: {flag} {value}, but --init {pretrained} has {said}; leave the flag out\n")
    shutil.rmtree(pretrained)  # which a run that goes on has no need of
    status, out, err = command("tiny", *rest, *frozen, "--run-dir", "init", "--steps", 2)
    assert (status, "resumed from step 1" in out) == (0, True), err

    def nearly(name, key):
        return np.allclose(after[name][key], before[key], atol=1e-6)

    encoder = [key for key in before if key.startswith("['encoder']")]
    assert encoder
    assert all(nearly("init", key) for key in encoder)
    assert not all(nearly("scratch", key) for key in encoder)
    assert after["init"].keys() == after["scratch"].keys()
    assert "['classifier']['kernel']" in after["init"]
    # The head of pre-training is the classifier: nothing is new.
    assert after["mlm"].keys() == before.keys()
    assert all(nearly("mlm", key) for key in before)
    assert finetune.predict("mlm", ["x"]).labels[0] in ("left", "right")


@pytest.mark.slow
def test_numbers(words, tmp_path, command):
    rest = ("--data.path", words, "--data.label-column", "score", *SMALL, "--optim.learning-rate", 0.01)
    status, out, err = command("tiny", *rest, "--run-dir", "run", "--epochs", 20, "--metrics", "pearson")
    assert status == 0, err
    assert "regression: 32 train" in out
    assert out.split("after the last step:")[1].splitlines()[1].split() == ["pearson"]
    said = finetune.predict("run", ["x 3", "y 4"]).labels
    assert said == pytest.approx([0, 1], abs=0.2)
    status, _, err = command("tiny", *rest, "--run-dir", "run", "--epochs", 20, "--metrics", "f1")
    assert (status, err.count("\n")) == (1, 1)
    assert "--metrics f1, expected some of pearson, spearman, rmse" in err


@pytest.mark.slow
def test_several_classes_of_a_text_and_rare_ones(tmp_path, command):
    sets = (["left"], ["right", "rare"], ["left"], ["right"], [])
    rows = [{"text": f"{'xyxyz'[i % 5]} {'!' if i % 5 == 1 else ''} {i}", "labels": sets[i % 5]} for i in range(60)]
    path = write(tmp_path / "several.jsonl", rows)
    rest = ("--optim.learning-rate", 0.02, "--epochs", 25, "--class-weights", "balanced", "--baseline")
    status, out, err = command("tiny", "--data.path", path, "--run-dir", "run", *SMALL, *rest)
    assert status == 0, err
    assert "multi-label of 3 classes: 54 train, 6 validation" in out
    table = out.split("after the last step:")[1].splitlines()
    assert table[1].split() == ["accuracy", "micro_f1", "macro_f1"]
    assert float(table[2].split()[2]) > 0.9
    said = finetune.predict("run", ["x  3", "y ! 4", "z  5"])
    assert said.labels == [["left"], ["rare", "right"], []]
    assert np.shape(said.scores) == (3, 3)


@pytest.mark.slow
def test_integers_are_said_to_be_classes(tmp_path, command):
    path = write(tmp_path / "stars.jsonl", [{"text": f"t{i}", "label": i % 3} for i in range(30)])
    status, out, err = command(
        "tiny", "--data.path", path, "--run-dir", "run", *SMALL, "--steps", 1, "--epochs", "None"
    )
    assert status == 0, err
    assert "the integers of 'label' are taken as 3 classes; --kind regression takes them as numbers" in out


@pytest.mark.slow
def test_tags(tmp_path, command):
    rows = [{"words": ["x" * (i % 3 + 1), "is", f"y{i}"], "tags": ["B-X", "O", "B-Y"]} for i in range(40)]
    path = write(tmp_path / "tags.jsonl", rows)
    rate = ("--optim.learning-rate", 0.01, "--epochs", 12)
    status, out, err = command("tiny", "--data.path", path, "--run-dir", "run", *SMALL, *rate)
    assert status == 0, err
    assert out.split("after the last step:")[1].splitlines()[1].split() == ["accuracy", "f1", "precision", "recall"]
    assert finetune.predict("run", [["xx", "is", "y3"]]).labels == [["B-X", "O", "B-Y"]]


@pytest.mark.slow
def test_answers_in_contexts_longer_than_a_row(tmp_path, command):
    rows = []
    for i in range(40):
        context = "a " * (i % 20) + "ZZ" + " b" * 12
        rows.append({"question": "Z?", "context": context, "answers": {"text": ["ZZ"], "answer_start": [2 * (i % 20)]}})
    path = write(tmp_path / "squad.jsonl", [row | {"question": f"Z{i}?"} for i, row in enumerate(rows)])
    rate = ("--optim.learning-rate", 0.01, "--epochs", 10, "--stride", 10)
    status, out, err = command("tiny", "--data.path", path, "--run-dir", "run", *SMALL, *rate)
    assert status == 0, err
    table = out.split("after the last step:")[1].splitlines()
    assert table[1].split() == ["exact_match", "f1"]
    assert float(table[2].split()[1]) > 0.7
    assert finetune.predict("run", ["Z1?"], ["a " * 25 + "ZZ b b"]).labels == ["ZZ"]
    with pytest.raises(ValueError, match="expected the contexts"):
        finetune.predict("run", ["Z1?"])


@pytest.mark.slow
def test_a_monarch_mixer_from_a_published_folder(words, tmp_path, command):
    small = zoo.presets["m2-bert-80m"]
    config = dataclasses.replace(
        small, d_model=16, n_layers=1, vocab_size=300, max_len=32, m2=dataclasses.replace(small.m2, l_max=32)
    )
    from flax import nnx

    from experiments.data.tokenizers import save_tokenizer, train_wordpiece

    zoo.save_pretrained(zoo.MaskedLM(config, rngs=nnx.Rngs(0)), tmp_path / "published", "official")
    save_tokenizer(train_wordpiece(["x y 1 2 3"] * 3, 300), tmp_path / "published")
    rest = ("--data.path", words, "--max-len", 32, "--train.batch-size", 8, "--train.no-tensorboard", "--epochs", 1)
    status, _, err = command("tiny", *rest, "--init", tmp_path / "published", "--run-dir", "run")
    assert status == 0, err
    one, many = (finetune.predict("run", texts).scores[0] for texts in (["x 1"], ["x 1", "y 2 3 1 2 3 1 2 3"]))
    assert one == pytest.approx(many, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.label-column", "lable"], "--data.label-column must be one of text, label, score"),
        (["--data.path", "missing.csv"], "--data.path missing.csv does not exist"),
        (["--max-len", "64", "--model.max-len", "32"], "--max-len 64 with --model.max-len 32"),
        (["--kind", "regression"], "--kind regression expects numbers"),
        (["--head", "mlm", "--verbaliser", "l"], "--verbaliser has 1 words, expected 2"),
        (["--head", "mlm", "--data.label-column", "score"], "it cannot say --kind regression"),
        (["--verbaliser", "l r"], "--verbaliser 'l r' belongs to --head mlm"),
        (
            ["--kind", "regression", "--data.label-column", "score", "--class-weights", "balanced"],
            "--kind regression has",
        ),
        (["--scratch"], "--scratch is for the shape of an --init"),
        (["--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (["--epochs", "0"], "--epochs 0.0, expected more than 0"),
        (["--seeds", "1", "1"], "--seeds 1 1, expected different ones"),
        (["--run-dir", "."], "--run-dir . is not empty and holds no run"),
        (["--data.fetched", "r8"], "--data.path and --data.fetched exclude each other"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, words, tmp_path, command):
    status, _, err = command("tiny", "--data.path", words, "--run-dir", "run", *SMALL, *arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_run_folder_depends_on_what_the_run_is():
    tiny = finetune.PRESETS["tiny"][1]
    assert finetune.default_run_dir(tiny) == Path("runs/finetune/tiny")
    assert finetune.default_run_dir(dataclasses.replace(tiny, seeds=(0, 1))) == Path("runs/finetune/tiny-seeds")
    assert finetune.default_run_dir(dataclasses.replace(tiny, init="x")).name.startswith("tiny-")


def test_a_config_comes_back_from_json(tmp_path):
    for _, config in finetune.PRESETS.values():
        config = dataclasses.replace(config, seeds=(1, 2), metrics=("f1",))
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(finetune.Config, tmp_path / "config.json") == config
