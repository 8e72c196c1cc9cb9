"""The comparison of what reads pictures, as a user runs it, at sizes that take a moment."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from experiments.bench import pictures
from experiments.bench.pictures import Config, Row, configuration, most_frequent, rows_of, table, trained_parameters
from experiments.data.image_texts import Example
from experiments.loop import seeds
from experiments.loop.summary import Summary
from experiments.vision_language import encoder


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, pictures)


def test_rows_differ_in_what_they_are_called_and_are_nearly_equal_in_size():
    config = Config()
    rows = rows_of(config)
    assert len(rows) == len(set(rows)) == 9 + 3 + 5
    assert rows_of(Config(parts=("pairs", "deepstack"), cross=True)) == [*rows[:5], *rows[9:11]]
    assert rows_of(Config(connectors=("scan",), cross=True)) == [Row("scan", "attention")]
    sizes = []
    for row in rows:
        one = configuration(config, row, 3)
        assert (one.model.connector.kind, one.model.deepstack) == (row.connector, 1 + row.deepstack)
        assert one.model.image_tokens == (4 if row.deepstack else 16)
        assert (one.trained, one.train.seed, one.train.steps) == ("language", 3, config.steps)
        text = dataclasses.replace(one.model.text, vocab_size=400)
        sizes.append(trained_parameters(dataclasses.replace(one.model, text=text)))
    assert max(sizes[:5]) <= 1.05 * min(sizes[:5])
    assert max(sizes) <= 1.12 * min(sizes)


def test_a_model_without_eyes_says_the_most_frequent_answer():
    answers = {"caption": "ab", "shape": "aab", "colour": "a", "place": "abbb"}
    examples = [Example(0, kind, "?", answer) for kind, several in answers.items() for answer in several]
    expected = {"exact": 7 / 10, "caption": 1 / 2, "shape": 2 / 3, "colour": 1.0, "place": 3 / 4}
    assert most_frequent(examples) == pytest.approx(expected)


def test_the_table_has_mean_and_deviation_in_percent():
    accuracy = {kind: Summary(0.5, 0.0123) for kind in ("exact", *pictures.KINDS)} | {"place": Summary(0.25, None)}
    row = Row("mlp", "Mamba-2", True)._asdict() | {"parameters": 12345, "accuracy": accuracy}
    lines = table([row], dict.fromkeys(accuracy, 0.1))
    said = "50.0 ± 1.2 | " * 4
    assert lines[2] == f"| mlp, DeepStack | Mamba-2 | 12,345 | {said}25.0 |"
    assert lines[3].count("10.0") == 5


@pytest.mark.slow
def test_every_run_is_done_once_and_in_the_table(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pictures, "rows_of", lambda config: [Row("mlp", "Mamba-2"), Row("mlp", "attention", True)])
    monkeypatch.setattr(encoder, "BATCH_SIZE", 4)
    arguments = ("--steps", 1, "--encoder-steps", 1, "--batch-size", 4, "--scenes", 20, "--run-dir", "runs")
    arguments += ("--parts", "pairs", "--seeds", 0, 1, "--json", "out.json")
    status, out, err = run(*arguments)
    assert status == 0, err
    figures = json.loads(Path("out.json").read_text())["figures"]
    assert [(f["connector"], f["language"], f["deepstack"], len(f["runs"])) for f in figures] == [
        ("mlp", "Mamba-2", False, 2),
        ("mlp", "attention", True, 2),
    ]
    assert "| mlp, DeepStack | attention |" in out
    monkeypatch.setattr(seeds, "fit_one", None)  # nothing is left to do
    status, again, err = run(*arguments)
    assert status == 0, err
    assert again.splitlines()[-5:] == out.splitlines()[-5:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"steps": 0}, "steps=0"), ({"seeds": ()}, "one of seeds"), ({"seeds": (1, 1)}, "expected different ones")],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
