"""Models from one layout to another, out of runs and back."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import convert
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import split_model
from tests.places import PUBLISHED
from zoo.published.native_layout import write_config
from zoo.published.weight_files import open_weights
from zoo.stack.option_values import from_dict


@pytest.fixture
def run(empty_folder):
    """A folder with checkpoints of a model that no published layout holds, and the two models in them."""
    fields = {"d_model": 8, "n_layers": 1, "pattern": "m2/monarch", "vocab_size": 8, "m2": {"l_max": 4}}
    config = from_dict(zoo.CausalLMConfig, fields)
    models = [zoo.CausalLM(config, rngs=nnx.Rngs(seed)) for seed in range(2)]
    with Checkpoints(empty_folder / "run") as checkpoints:
        for step, model in enumerate(models):
            checkpoints.save(step, {"params": split_model(model)[1]}, data_state={}, metrics={"loss": step})
    (empty_folder / "run/config.json").write_text(json.dumps({"model": write_config(config)["config"]}))
    return models


def vectors(model):
    return np.asarray(model.embedding.embedding[...])


def test_a_model_without_a_published_layout_goes_out_in_ours(run, run_command):
    status, out, err = run_command(convert, "run", "out")
    assert status == 0, err
    assert "parameters in the native layout, read back and equal" in out
    for layout in ("official", "transformers"):
        assert f"--layout {layout}: not this model, pattern='m2/monarch'" in out
    assert np.array_equal(vectors(zoo.from_pretrained("out")), vectors(run[1]))
    status, out, err = run_command(convert, "run", "best", "--checkpoint", "best", "--dtype", "bfloat16")
    assert status == 0, err
    best = vectors(zoo.from_pretrained("best"))
    assert best.dtype == "bfloat16"
    assert np.array_equal(best, vectors(run[0]).astype(best.dtype))


def test_a_layout_that_lacks_something_says_what_and_which_has_it(run, run_command):
    status, _, err = run_command(convert, "run", "out", "--layout", "transformers")
    assert (status, err.count("\n")) == (1, 1)
    assert "pattern='m2/monarch'" in err
    assert "layout='native' holds every model" in err


def test_a_published_model_comes_through_our_layout_unchanged(empty_folder, run_command):
    status, out, err = run_command(convert, PUBLISHED / "mamba1", "ours")
    assert status == 0, err
    assert "--layout official: would hold it, too" in out
    assert run_command(convert, "ours", "back", "--layout", "official")[0] == 0
    theirs, back = open_weights(PUBLISHED / "mamba1"), open_weights(empty_folder / "back")
    assert theirs.keys() == back.keys()
    assert all(np.array_equal(tensor.read(), back[name].read()) for name, tensor in theirs.items())


def test_a_link_among_the_companions_is_named_before_anything_is_written(empty_folder, run_command):
    shutil.copytree(PUBLISHED / "mamba_hf", empty_folder / "model")
    (empty_folder / "model" / "tokenizer_config.json").symlink_to("/etc/hostname")
    status, _, err = run_command(convert, "model", "out")
    assert status != 0
    assert "tokenizer_config.json leads out of the folder" in err
    assert not (empty_folder / "out").exists()


def test_broken_weights_are_converted_where_that_is_asked_for(empty_folder, run_command):
    model = zoo.from_pretrained(PUBLISHED / "mamba_hf")
    model.embedding.embedding[...] = model.embedding.embedding[...].at[3].set(np.nan)
    zoo.save_pretrained(model, "broken")
    status, _, err = run_command(convert, "broken", "out")
    assert status != 0
    assert "embedding.embedding holds" in err
    assert "allow_nonfinite=True" in err
    status, out, err = run_command(convert, "broken", "out", "--allow-nonfinite")
    assert status == 0, err
    assert "read back and equal" in out
