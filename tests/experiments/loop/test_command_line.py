"""A configuration as the command that makes it, read back by the command itself."""

import dataclasses
import shlex
import sys

import pytest

from experiments import causal_lm
from experiments.encoders import finetune_presets
from experiments.loop import flags
from experiments.loop.command_line import command_line
from experiments.retrieval import retrieve


def changed(config, **fields):
    """A configuration with other fields, by their dotted names."""
    for name, value in fields.items():
        *groups, last = name.split("__")
        if groups:
            inner = changed(getattr(config, groups[0]), **{"__".join([*groups[1:], last]): value})
            config = dataclasses.replace(config, **{groups[0]: inner})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


@pytest.mark.parametrize(
    ("module", "preset", "fields"),
    [
        (causal_lm, "tiny", {}),
        (causal_lm, "mamba-130m", {"model__pattern": "mamba*2 attn[window=4]/mlp", "data__path": "it's my text.txt"}),
        (causal_lm, "tiny", {"eval_batches": None, "train__tensorboard": False, "train__steps": 7}),
        (finetune_presets, "tiny", {"seeds": (0, 1, 2), "baseline": True, "optim__learning_rate": 3e-05}),
        (retrieve, "tiny", {"objective__loss": "orthogonal", "init": "runs/bert/tiny", "pool": "last"}),
    ],
)
def test_the_command_of_a_configuration_makes_it_again(module, preset, fields, monkeypatch):
    config = changed(module.PRESETS[preset][1], **fields)
    line = command_line("python -m experiments.it", config, module.PRESETS)
    monkeypatch.setattr(sys, "argv", shlex.split(line)[2:])
    assert flags.parse(module.PRESETS, prog="it", description="") == config


def test_only_what_differs_from_the_nearest_preset_is_said():
    config = changed(causal_lm.PRESETS["mamba-130m"][1], data__path="my text.txt", run_dir="somewhere")
    line = command_line("python -m experiments.causal_lm", config, causal_lm.PRESETS)
    assert line == "python -m experiments.causal_lm mamba-130m --data.path 'my text.txt'"
