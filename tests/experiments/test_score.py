"""Texts of any length are scored as the whole would be, by their own units."""

import functools
import gzip
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import score
from experiments.causal import scoring
from tests.experiments.causal.made_runs import write_run

TEXTS = ["naïve 雪", "a", "b" * 40, "", "the state goes on"]


@pytest.fixture
def command(run_command):
    return functools.partial(run_command, score)


def nats_of_the_whole(model, text):
    """By one pass over the document."""
    n = len(text.encode())
    ids = jnp.array([[256, *text.encode(), *[0] * (40 - n)]])  # what is behind it changes nothing, and compiles once
    return float(jnp.sum(_nats(model)(ids)[0, :n]))


@functools.cache
def _nats(model):
    return jax.jit(lambda ids: optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:]))


@pytest.mark.parametrize("pattern", ["mamba", "attn/mlp"])
def test_documents_of_any_length_are_scored_by_a_carried_state(tmp_path, command, monkeypatch, pattern):
    monkeypatch.setattr(scoring, "PIECE", 8)
    model = write_run(tmp_path / "run", pattern)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    status, out, err = command("run", "in.jsonl", "--out", "out.jsonl", "--batch-size", 2)
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [len(text.encode()) for text in TEXTS] == [row["bytes"] for row in rows]
    assert [row["id"] for row in rows] == list(range(5))
    expected = [nats_of_the_whole(model, text) for text in TEXTS]
    np.testing.assert_allclose([row["nats"] for row in rows], expected, rtol=1e-4)
    first = rows[0]
    assert first["bits_per_byte"] == pytest.approx(expected[0] / math.log(2) / 10, rel=1e-4)
    assert first["perplexity"] == pytest.approx(math.exp(expected[0] / 10), rel=1e-4)
    assert rows[3]["perplexity"] is None
    total = sum(expected) / math.log(2) / sum(row["bytes"] for row in rows)
    assert float(out.split("bits/token, ")[1].split()[0]) == pytest.approx(total, abs=2e-4)
    assert "the state carried through each" in out


def test_the_column_of_texts_is_that_of_the_training(tmp_path, command):
    write_run(tmp_path / "run")
    said = json.loads((tmp_path / "run/config.json").read_text())
    said["data"]["text_column"] = "body"
    (tmp_path / "run/config.json").write_text(json.dumps(said))
    for name, row in {"body.jsonl": {"body": "ab", "text": "abcd"}, "text.jsonl": {"text": "ab"}}.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        status, out, err = command("run", name, "--out", "-")
        assert status == 0, err
        assert json.loads(out)["tokens"] == 2


def test_a_compressed_file_of_another_encoding_is_the_text_in_it(tmp_path, command):
    write_run(tmp_path / "run", "mamba")
    text = "un été à Besançon"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "latin.txt").write_text(text, encoding="cp1252")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (command("run", name) for name in ("plain.txt", "packed.txt.gz"))
    assert plain == packed == command("run", "latin.txt", "--encoding", "cp1252")
    assert plain[0] == 0
    status, _, err = command("run", "latin.txt")
    assert (status, err.count("\n")) == (1, 1)
    assert "--encoding" in err


@pytest.mark.slow
def test_long_convolutions_read_in_windows_and_say_so(tmp_path, command):
    model = write_run(tmp_path / "run", "m2/monarch")
    text = TEXTS[-1]
    (tmp_path / "in.txt").write_text(text)
    status, out, err = command("run", "in.txt", "--out", "-")
    assert status == 0, err
    row = json.loads(out)
    assert (row["tokens"], row["windows"]) == (len(text), 3)
    assert "in 3 windows" in err
    ids, nats, call = [256, *text.encode()], 0.0, jax.jit(model)
    for start in range(0, len(ids) - 1, 8):
        part = ids[start : start + 9]
        whole = jnp.array([[*part[:-1], *[0] * (9 - len(part)), 0]])[:, :8]
        logits = call(whole)[0, : len(part) - 1]
        nats += float(jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(part[1:]))))
    assert row["nats"] == pytest.approx(nats, rel=1e-4)
    status, _, err = command("run", "in.txt", "--window", 9)
    assert (status, "window=9, expected 1 to 8" in err) == (1, True)


def test_lines_of_standard_input_are_documents(tmp_path, command, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nanother\n"))
    status, out, err = command("run", "-", "--lines", "--begin", "False")
    assert status == 0, err
    assert out.startswith("2 documents of 8 tokens")  # without the first of each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.txt"], "missing.txt does not exist"),
        (["run", "in.csv"], "in.csv row 1 has no text in 'text'; --text-column may be one of body"),
        (["nowhere", "in.csv", "--text-column", "body"], "nowhere is neither a folder nor a name on the hub"),
        (
            ["run", "in.csv", "--text-column", "body", "--tokenizer", "bytes"],
            "--tokenizer belongs to a published model",
        ),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, command, arguments, message):
    write_run(tmp_path / "run")
    (tmp_path / "in.csv").write_text("body\nx\n")
    status, _, err = command(*arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err
