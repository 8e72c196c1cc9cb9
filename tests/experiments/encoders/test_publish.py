"""What a tuned encoder's outputs mean goes with it into every published layout, and from one to another."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import zoo
from experiments import convert
from experiments.encoders.finetune import predict
from experiments.encoders.load import load_encoder
from experiments.encoders.objectives import Target, load_target
from tests.experiments.encoders.tuned_runs import write_tuned
from tests.places import ROOT

NAMES = ("été", "hiver", "日本")


def said(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_class_names_of_a_run_are_in_the_published_config(tmp_path, run_command, kind):
    run = write_tuned(tmp_path / "run", Target(kind, classes=NAMES, max_len=16))
    status, _, err = run_command(convert, run, tmp_path / "out")
    assert status == 0, err
    assert said(tmp_path / "out")["id2label"] == {"0": "été", "1": "hiver", "2": "日本"}
    assert said(tmp_path / "out")["label2id"] == {"été": 0, "hiver": 1, "日本": 2}
    assert load_target(tmp_path / "out").classes == NAMES

    # From there into another published folder, whose weights are rounded, with and without our own file beside it.
    (tmp_path / "out/labels.json").unlink()
    status, _, err = run_command(convert, tmp_path / "out", tmp_path / "again", "--dtype", "bfloat16")
    assert status == 0, err
    names = ("id2label", "label2id", "problem_type")
    assert [said(tmp_path / "again").get(n) for n in names] == [said(tmp_path / "out").get(n) for n in names]


def test_class_names_are_in_the_official_layout_too(tmp_path, run_command):
    small = zoo.presets["m2-bert-80m"]
    shape = dataclasses.replace(small, d_model=16, n_layers=1, max_len=32, m2=dataclasses.replace(small.m2, l_max=32))
    run = write_tuned(tmp_path / "run", Target("classification", classes=NAMES, max_len=16), shape)
    status, _, err = run_command(convert, run, tmp_path / "out", "--layout", "official")
    assert status == 0, err
    assert list(said(tmp_path / "out")["id2label"].values()) == list(NAMES)


def test_published_names_that_are_not_the_model_s_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(ROOT / "tests/published/bert_sequence_classification")
    with pytest.raises(ValueError, match="id2label names 2 classes, expected the model's 3"):
        zoo.save_pretrained(model, tmp_path / "out", "transformers", extra={"id2label": {0: "no", 1: "yes"}})
    zoo.save_pretrained(model, tmp_path / "out", "transformers", extra={"id2label": {0: "a", 1: "b", 2: "c"}})
    assert said(tmp_path / "out")["label2id"] == {"a": 0, "b": 1, "c": 2}


@pytest.mark.slow
def test_a_published_number_is_in_the_unit_of_its_labels(tmp_path, run_command):
    run = write_tuned(tmp_path / "run", Target("regression", mean=300.0, std=20.0, max_len=16))
    status, _, err = run_command(convert, run, tmp_path / "out")
    assert status == 0, err
    expected = predict(run, ["the cat"]).labels
    model, tokenizer, _ = load_encoder(tmp_path / "out")
    ids = jnp.array([[2, *tokenizer.encode("the cat"), 3]])
    assert float(model(ids)[0, 0]) == pytest.approx(expected[0], rel=1e-5)
    assert said(tmp_path / "out")["problem_type"] == "regression"
    assert (load_target(tmp_path / "out").mean, load_target(tmp_path / "out").std) == (0, 1)
