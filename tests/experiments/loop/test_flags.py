"""The command line: which fields its flags name."""

import sys

import pytest

from experiments import causal_lm
from experiments.loop import flags


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], set()),
        (["--steps", "7", "--seq-len=9"], {"train.steps", "data.seq_len"}),
        (["--train.steps=7", "--model.mamba.d_state", "4"], {"train.steps", "model.mamba.d_state"}),
        (["--train.no-tensorboard", "--prompt=--steps"], {"train.tensorboard", "prompt"}),
        (["--model.no-such"], set()),
    ],
)
def test_the_fields_that_flags_name(arguments, fields, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["causal_lm", "tiny", *arguments])
    assert flags.given(causal_lm.Config) == fields
