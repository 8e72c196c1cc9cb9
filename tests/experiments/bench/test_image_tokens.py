"""What an image of many tokens costs, as a user measures it, at sizes that take a moment."""

import dataclasses
import functools
import json

import pytest

from experiments.bench import image_tokens
from experiments.bench.image_tokens import PATTERNS, Config, model_config
from experiments.loop.model_size import count_params


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, image_tokens)


def test_models_are_nearly_equal_in_size_and_have_a_token_for_each_patch():
    models = [model_config(Config(), pattern, 16) for pattern in PATTERNS.values()]
    assert [model.image_tokens for model in models] == [256] * 3
    sizes = [count_params(model.text) for model in models]
    assert max(sizes) <= 1.05 * min(sizes)
    assert len({dataclasses.replace(model.text, pattern="attn") for model in models}) == 1


@pytest.mark.slow
def test_a_row_for_each_model_and_size_in_table_picture_and_record(tmp_path, run):
    sizes = ("--sides", 2, 4, "--text", 4, "--d-model", 256, "--layers", 4, "--rounds", 1)
    status, out, err = run(*sizes, "--json", "out.json", "--plot", "out.png")
    assert status == 0, err
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [(f["tokens"], f["model"]) for f in figures] == [(n, name) for n in (4, 16) for name in PATTERNS]
    assert all(f["bytes"] > 0 and f["speed"] > 0 for f in figures)
    assert out.count("| attention | `attn/mlp` |") == 2
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.slow
def test_memory_alone_is_counted_without_running(tmp_path, run):
    status, out, err = run(
        "--sides", 2, "--text", 4, "--d-model", 256, "--layers", 4, "--rounds", 0, "--plot", "out.png"
    )
    assert status == 0, err
    assert "| attention | `attn/mlp` |" in out
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sides": ()}, "sides="),
        ({"d_model": 64}, "multiple of 256"),
        ({"rounds": -1}, "rounds=-1"),
        ({"layers": 3}, "layers=3"),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
