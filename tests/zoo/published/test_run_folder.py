"""The model in a run's folder, as training leaves it."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.runs import begin
from experiments.loop.train import TrainConfig, split_model
from zoo.models.build import build
from zoo.published.run_folder import MODEL_FILE

SMALL = zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=11, mamba=ssm.MambaConfig(d_state=2))


@dataclasses.dataclass(frozen=True)
class Said:
    """A run's configuration, as earlier versions left it alone."""

    model: zoo.CausalLMConfig
    train: TrainConfig = TrainConfig()


def save(folder, models, *, average=None):
    with Checkpoints(folder) as checkpoints:
        for step, (model, loss) in models.items():
            state = {"params": split_model(model)[1], "step": step}
            if average is not None:
                state["average"] = split_model(average)[1]
            checkpoints.save(step, state, data_state={}, metrics={"loss": loss})


@pytest.fixture(scope="module")
def models():
    return [build(SMALL, rngs=nnx.Rngs(seed)) for seed in range(3)]


def vectors(model):
    return np.asarray(model.embedding.embedding[...])


def test_a_run_is_loaded_at_its_newest_checkpoint_its_best_or_any(tmp_path, models):
    begin(Said(SMALL), tmp_path, SMALL)
    save(tmp_path, {10: (models[0], 1.0), 20: (models[1], 2.0)})
    for revision, expected in ((None, 1), ("latest", 1), ("best", 0), (10, 0), ("20", 1)):
        model = zoo.from_pretrained(tmp_path, revision=revision, kind=zoo.CausalLM)
        assert model.config == SMALL
        assert np.array_equal(vectors(model), vectors(models[expected])), revision
    assert zoo.from_pretrained(tmp_path, dtype="bfloat16").config.param_dtype == "bfloat16"
    for revision, error, message in (
        (30, FileNotFoundError, r"no sound checkpoint for step=30 .* there are \[10, 20\]"),
        ("main", ValueError, "revision='main' of the run .*, expected 'latest', 'best' or a step"),
    ):
        with pytest.raises(error, match=message):
            zoo.from_pretrained(tmp_path, revision=revision)
    with pytest.raises(ValueError, match="is a CausalLM, expected kind=MaskedLM"):
        zoo.from_pretrained(tmp_path, kind=zoo.MaskedLM)


def test_the_running_mean_is_loaded_where_there_is_one(tmp_path, models):
    begin(Said(SMALL), tmp_path, SMALL)
    save(tmp_path, {10: (models[0], 1.0)}, average=models[2])
    assert np.array_equal(vectors(zoo.from_pretrained(tmp_path)), vectors(models[2]))


def test_runs_of_earlier_versions_are_read_from_their_configuration(tmp_path, models):
    begin(Said(dataclasses.replace(SMALL, vocab_size=0)), tmp_path)
    vocabulary = {"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": [{"id": 10}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    save(tmp_path, {10: (models[0], 1.0)})
    assert not (tmp_path / MODEL_FILE).exists()
    assert zoo.from_pretrained(tmp_path).config == SMALL


def test_a_folder_of_several_runs_names_them(tmp_path, models):
    for seed in (0, 1):
        begin(Said(SMALL), tmp_path / f"seed-{seed}", SMALL)
        save(tmp_path / f"seed-{seed}", {1: (models[0], 1.0)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds several runs, name one of them: seed-0, seed-1"):
        zoo.from_pretrained(tmp_path)


def test_a_damaged_description_is_named(tmp_path, models):
    save(tmp_path, {1: (models[0], 1.0)})
    with pytest.raises(FileNotFoundError, match=MODEL_FILE):
        zoo.from_pretrained(tmp_path)
    for text in ("{", "[]", json.dumps({"kind": "Other", "config": {}}), json.dumps({"kind": "CausalLMConfig"})):
        (tmp_path / MODEL_FILE).write_text(text)
        with pytest.raises(ValueError, match=rf"{MODEL_FILE} describes no model"):
            zoo.from_pretrained(tmp_path)
