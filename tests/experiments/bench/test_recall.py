"""The comparison of recall as a user runs it, at sizes that take a moment."""

import dataclasses
import functools
import json

import pytest

import ssm
import zoo
from experiments import synthetic
from experiments.bench import recall
from experiments.loop.summary import Summary
from experiments.loop.train import TrainConfig
from experiments.recall.tasks import MQAR, Phonebook


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, recall)


@pytest.fixture
def tiny(monkeypatch):
    """Tasks and models that take a moment."""
    data = {
        "mqar": MQAR(length=8, n_pairs=2, n_queries=4, vocab_size=8),
        "phonebook": Phonebook(n_entries=3, n_letters=4, max_eval_entries=4),
    }
    mixers = {"mamba2": ssm.Mamba2Config(head_dim=8), "attn": zoo.AttentionConfig(n_heads=2)}
    model = zoo.CausalLMConfig(d_model=8, n_layers=1, **mixers)
    train = TrainConfig(steps=2, batch_size=4, tensorboard=False)
    for task, (size, config) in recall.TASKS.items():
        small = dataclasses.replace(config, data=data[task], model=model, train=train, eval_sequences=8)
        monkeypatch.setitem(recall.TASKS, task, (size, small))
    monkeypatch.setattr(recall, "MODELS", {"one": "-/mlp", "other": "attn/mlp"})


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_run_is_done_once_and_in_table_picture_and_record(tmp_path, run, monkeypatch):
    arguments = ("--seeds", 0, 1, "--steps", 2, "--run-dir", "runs", "--json", "out.json", "--plot", "out.png")
    status, out, err = run(*arguments)
    assert status == 0, err
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [(f["task"], f["model"], list(f["accuracy"])) for f in figures] == [
        ("mqar", "one", ["2"]),
        ("mqar", "other", ["2"]),
        ("phonebook", "one", ["2", "4"]),
        ("phonebook", "other", ["2", "4"]),
    ]
    assert (tmp_path / "out.png").stat().st_size > 0
    assert out.count("| other | `attn/mlp` |") == 2
    table = json.loads((tmp_path / "runs/phonebook/other/seed-1/results.json").read_text())["table"]
    assert figures[-1]["runs"][1] == {"seed": 1} | {
        str(line["n_entries"]): {"accuracy": line["accuracy"]} for line in table
    }

    monkeypatch.setattr(synthetic, "run", None)  # nothing is left to do
    status, again, err = run(*arguments)
    assert status == 0, err
    assert again.splitlines()[-4:] == out.splitlines()[-4:]


@pytest.mark.parametrize("d_state", [4, 16, 64])
def test_the_models_differ_in_their_pattern_and_are_equal_in_size(d_state):
    config = recall.Config(d_state=d_state)
    for task in recall.TASKS:
        configs = [recall.configuration(config, task, model, 0) for model in recall.MODELS]
        assert len({config.model.pattern for config in configs}) == len(configs)
        others = [dataclasses.replace(c, model=dataclasses.replace(c.model, pattern="attn")) for c in configs]
        assert others == others[:1] * len(configs)
        sizes = [recall.count_params(config.model) for config in configs]
        assert max(sizes) <= 1.02 * min(sizes)


def test_the_table_has_mean_and_deviation_in_percent():
    accuracy = {4: Summary(0.9876, 0.0123), 8: Summary(0.5, None)}
    row = {"task": "mqar", "model": "hybrid", "pattern": "mamba2 attn", "parameters": 12345, "accuracy": accuracy}
    assert recall.table([row])[-1] == "| hybrid | `mamba2 attn` | 12,345 | 98.8 ± 1.2 | 50.0 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "steps=0, expected at least 1"),
        (("--seeds",), "expected at least one of tasks and of seeds"),
        (("--tasks", "parity"), "parity"),
        (("--learning-rate", 0), "learning_rate=0.0, expected more than 0"),
        (("--d-state", 0), "d_state=0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err
