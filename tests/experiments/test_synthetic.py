"""Synthetic tasks as a user runs them: by the command line, resumed, with mistakes."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import synthetic
from experiments.loop import flags
from experiments.loop.checkpoints import restore_params
from experiments.loop.train import split_model
from experiments.recall.presets import PRESETS, ParityConfig, fit_vocabulary


@pytest.fixture
def command(run_command):
    """Runs the command in an empty folder: (exit status, stdout, stderr)."""
    return functools.partial(run_command, synthetic)


TINY = (
    *("--model.d-model", 8, "--model.n-layers", 1, "--model.pattern", "-/mlp"),
    *("--data.length", 8, "--data.min-length", 3, "--data.max-eval-length", 64, "--train.batch-size", 8),
    *("--eval-sequences", 16, "--train.no-tensorboard"),
    *("--optim.final-fraction", 1),  # so that the rate does not depend on the number of steps
)


def final_parameters(folder):
    config = fit_vocabulary(flags.load_config(ParityConfig, folder / "config.json"))
    _, params, _ = split_model(zoo.CausalLM(config.model, rngs=nnx.Rngs(0)))
    return jax.tree.leaves(restore_params(folder, params))


def table(folder):
    return json.loads(Path(folder, "results.json").read_text())["table"]


@pytest.mark.slow
def test_the_command_trains_measures_and_resumes_exactly(command, tmp_path):
    status, out, err = command("parity", *TINY, "--steps", 4, "--run-dir", "whole")
    assert status == 0, err
    assert "accuracy" in out
    assert [line["length"] for line in table("whole")] == [32, 64]
    assert all(0 <= line["accuracy"] <= 1 for line in table("whole"))

    assert command("parity", *TINY, "--steps", 2, "--run-dir", "halves")[0] == 0
    longer = ("--data.max-eval-length", 128)  # what is measured may change, the run goes on
    status, out, err = command("parity", *TINY, "--steps", 4, "--run-dir", "halves", *longer)
    assert status == 0, err
    assert "resumed from step 2" in out
    assert [line["length"] for line in table("halves")] == [32, 64, 128]
    assert table("halves")[:2] == table("whole")
    for whole, halves in zip(final_parameters(tmp_path / "whole"), final_parameters(tmp_path / "halves"), strict=True):
        assert np.array_equal(whole, halves)


def test_a_config_comes_back_from_json(tmp_path):
    for _, config in PRESETS.values():
        flags.save_config(config, tmp_path / "config.json")
        assert flags.load_config(type(config), tmp_path / "config.json") == config


def test_the_run_folder_depends_on_what_the_run_is():
    for name, (_, config) in PRESETS.items():
        assert str(synthetic.default_run_dir(config)) == f"runs/synthetic/{name}"
        longer = dataclasses.replace(config, eval_sequences=7)
        assert synthetic.default_run_dir(longer) == synthetic.default_run_dir(config)
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern="attn/mlp"))
        assert synthetic.default_run_dir(other).name.startswith(f"{name}-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selective-copying", "--data.n-tokens", 300], "length=64, expected at least 300"),
        (["selective-copying", "--data.vocab-size", 2], "vocab_size=2, expected at least 3"),
        (["induction", "--data.length", 8], "length=8, expected at least 16"),
        (["phonebook", "--data.n-letters", 2], "n_letters=2 and name_length=2 make 4 names, expected at least 64"),
        (["phonebook", "--data.n-questions", 17], "n_entries=16, expected at least 17"),
        (["mqar", "--data.n-pairs", 20], "length=64, expected at least 72"),
        (["mqar", "--data.min-pairs", 17], "n_pairs=16, expected at least 17"),
        (["mqar", "--data.n-queries", 15], "n_queries=15, expected at least 16"),
        (["mqar", "--data.vocab-size", 32], "vocab_size=32, expected at least 34"),
        (["parity", "--data.min-length", 0], "min_length=0, expected at least 1"),
        (["parity", "--data.curriculum-steps", -1], "curriculum_steps=-1, expected at least 0"),
        (["parity", "--eval-sequences", 0], "eval_sequences=0, expected at least 1"),
        (["parity", "--model.vocab-size", 5], "--model.vocab-size 5, expected the task's, 2"),
        (["parity", "--data.n-pairs", 5], "--data.n-pairs"),
        (["inducton"], "unknown preset 'inducton', did you mean 'induction'?"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, command, tmp_path):
    status, _, err = command(*arguments)
    assert status != 0
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selective-copying", "induction", "mqar", "phonebook", "parity"])
def test_each_preset_reaches_what_it_promises(name, command):
    promised = float(synthetic.__doc__.split(f"synthetic {name} ")[1].split(" %")[0].split()[-1])
    status, _, err = command(name, "--train.no-tensorboard", "--run-dir", "run")
    assert status == 0, err
    assert 100 * table("run")[0]["accuracy"] >= promised - 1
