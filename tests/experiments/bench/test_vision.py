"""The benchmark of image classifiers as a user runs it, at sizes that take a moment."""

import functools
import json

import pytest

from experiments.bench import vision

TINY = ("--d-model", 8, "--layers", 1, "--patch-size", 8, "--rounds", 1, "--no-timm")


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, vision)


@pytest.mark.slow
def test_a_row_for_each_pattern_part_and_size_a_picture_and_a_record(tmp_path, run):
    record, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ("--sizes", 16, 32, "--patterns", "attn/mlp", "m2[conv=2d]/mlp", "--json", record, "--plot", picture)
    status, out, err = run(*TINY, *arguments)
    assert status == 0, err
    figures = json.loads(record.read_text())["figures"]
    measured = [(figure["size"], figure["part"], figure["tokens"], figure["pattern"]) for figure in figures]
    assert measured == [
        (size, part, tokens, pattern)
        for size, tokens in ((16, 4), (32, 16))
        for part in ("model", "block")
        for pattern in ("attn/mlp", "m2[conv=2d]/mlp")
    ]
    assert all(figure["ms"] > 0 and figure["mib"] > 0 and len(figure["rounds"]) == 1 for figure in figures)
    rows = [line for line in out.splitlines() if line.startswith(("| model", "| block"))]
    assert len(rows) == 8
    assert {row.count("|") for row in rows} == {9}
    assert out.count("takes less than attn/mlp") == 4
    assert picture.stat().st_size > 0


def test_without_timm_the_others_are_timed(run, monkeypatch):
    monkeypatch.setattr(vision, "require", functools.partial(_lacks, "timm"))
    arguments = ("--sizes", 16, "--patterns", "attn/mlp", "--parts", "model", "--timm")
    status, out, err = run(*TINY, *arguments)
    assert status == 0, err
    assert "without timm: pip install timm" in out
    assert "| model |     16 |      4 | attn/mlp" in out


def _lacks(package, *packages):
    if package in packages:
        raise vision.Missing(f"pip install {package}")


def test_each_pattern_is_compared_with_timm_too():
    curves = {"attn": (2, 2), "vim": (3, 1), "timm": (1, 2)}
    figures = [
        {"part": "model", "size": size, "pattern": pattern, "ms": value, "mib": value}
        for pattern, values in curves.items()
        for size, value in zip((8, 16), values, strict=True)
    ]
    assert [line for line in vision.thresholds(figures) if ", ms" in line] == [
        "model, ms: vim takes less than attn from 16 pixels on",
        "model, ms: attn takes less than timm at no size",
        "model, ms: vim takes less than timm from 16 pixels on",
    ]


def test_models_differ_in_the_pattern_and_blocks_without_a_channel_mixer_are_twice_as_many():
    config = vision.Config(sizes=(64,))
    models = {pattern: vision.classifier(config, pattern, 64) for pattern in config.patterns}
    assert {pattern: model.n_layers for pattern, model in models.items()} == {
        "attn/mlp": 12,
        "m2/monarch": 12,
        "m2[conv=2d]/monarch": 12,
        "vim": 24,
        "ss2d/mlp": 12,
    }
    assert {(model.m2.l_max, model.attn.n_heads, model.image_size) for model in models.values()} == {(16, 3, 64)}


@pytest.mark.parametrize(
    ("theirs", "says"),
    [((1, 1, 1), "from 8 pixels on"), ((1, 3, 1), "from 32 pixels on"), ((3, 1, 2), "at no size")],
)
def test_thresholds(theirs, says):
    figures = [
        {"part": "block", "size": size, "pattern": pattern, "ms": value, "mib": value}
        for pattern, values in (("attn", (2, 2, 2)), ("vim", theirs))
        for size, value in zip((8, 16, 32), values, strict=True)
    ]
    expected = [f"block, {unit}: vim takes less than attn {says}" for unit in ("ms", "MiB")]
    assert vision.thresholds(figures) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", 0), "rounds=0, expected at least 1"),
        (("--sizes", 225), "images of 225 x 225 pixels"),
        (("--patterns", "vit"), "unknown mixer 'vit', did you mean 'vim'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run):
    status, _, err = run(*arguments)
    assert status
    assert message in err
    assert "Traceback" not in err
