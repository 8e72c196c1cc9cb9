"""A tuned encoder answers in the terms of its labels, from a run or a published folder, and refuses what is no text."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import bert, convert
from experiments.encoders import predict as command
from experiments.encoders.objectives import Target
from experiments.encoders.predictor import Prediction, Predictor
from experiments.loop import flags
from experiments.loop.row_files import whole_file
from tests.experiments.encoders.tuned_runs import write_tuned

CLASSES = ("été", "hiver")
TARGETS = {
    "classes": Target("classification", classes=CLASSES, max_len=16),
    "pairs": Target("classification", classes=CLASSES, max_len=16, pairs=True),
    "numbers": Target("regression", mean=300.0, std=2.0, max_len=16, pairs=False),
    "tags": Target("tagging", classes=("O", "B-é"), max_len=16),
    "answers": Target("span-qa", max_len=16),
    "words": Target(
        "classification", "mlm", CLASSES, max_len=16, template="{text} [MASK]", words=("yes", "no"), word_ids=(5, 6)
    ),
}
TEXTS = ["the cat", "what is this ? the cat sat here .", "here"]


@pytest.fixture
def ask(tmp_path):
    """ask(name): the predictor of a run of one of these targets."""
    return lambda name: Predictor.from_pretrained(write_tuned(tmp_path / name, TARGETS[name]))


def test_classes_come_by_name_with_the_probability_of_each(ask):
    predictor = ask("classes")
    said = predictor(TEXTS)
    assert [type(one) for one in said] == [Prediction] * 3
    for one in said:
        assert list(one.probabilities) == list(CLASSES)
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert one.label == max(one.probabilities, key=one.probabilities.get)
        assert one.score == one.probabilities[one.label]
    # However texts are batched, each gets what it gets alone.
    alone = [predictor([text], batch_size=2)[0] for text in TEXTS]
    assert [one.label for one in alone] == [one.label for one in said]
    np.testing.assert_allclose([one.score for one in alone], [one.score for one in said], atol=1e-5)
    assert predictor([]) == []


def test_every_kind_of_label_is_predicted(ask):
    pairs = ask("pairs")(TEXTS, ["yes", "no", "no"])
    assert {one.label for one in pairs} <= set(CLASSES)
    numbers = ask("numbers")(TEXTS)
    assert all(290 < one.label < 310 and one[1:] == (None, None) for one in numbers)
    tags = ask("tags")([["the", "cat"], "what is this", ""])
    assert [len(one.label) for one in tags] == [len(one.score) for one in tags] == [2, 3, 0]
    assert {tag for one in tags for tag in one.label} <= {"O", "B-é"}
    answers = ask("answers")(["what is this ?"], ["the cat sat here . " * 4])
    assert answers[0].label in "the cat sat here . " * 4
    assert isinstance(answers[0].score, float)
    assert {one.label for one in ask("words")(TEXTS)} <= set(CLASSES)


@pytest.mark.parametrize("name", ["classes", "tags", "numbers"])
def test_a_published_folder_says_what_the_run_said(tmp_path, run_command, ask, name):
    expected = ask(name)(TEXTS)
    status, _, err = run_command(convert, tmp_path / name, tmp_path / "out")
    assert status == 0, err
    (tmp_path / "out/labels.json").unlink()  # as of a folder from elsewhere
    said = Predictor.from_pretrained(tmp_path / "out")(TEXTS)
    if name == "numbers":
        assert [one.label for one in said] == pytest.approx([one.label for one in expected], rel=1e-5)
    else:
        assert [one.label for one in said] == [one.label for one in expected]


WRONG = [
    ("classes", ("the cat",), "texts is the string 'the cat', expected a list of texts"),
    ("classes", (Path("a.csv"),), "texts is the .*Path 'a.csv', expected a list of texts"),
    ("classes", ([Path("a.csv")],), r"texts\[0\] is the path a.csv, expected a text"),
    ("classes", (["x", "there.csv"],), r"texts\[1\] names the file there.csv, expected a text"),
    ("classes", ([["the", "cat"]],), r"texts\[0\] is \['the', 'cat'\], expected a string"),
    ("classes", (["x", None],), r"texts\[1\] is None, expected a string"),
    ("numbers", (["x"], ["y"]), "seconds are given, expected None: the model was tuned on single texts"),
    ("pairs", (["x"],), "seconds=None, expected the second text of each: the model was tuned on pairs"),
    ("pairs", (["x"], ["y", "z"]), "1 texts and 2 seconds, expected as many"),
    ("pairs", (["x"], "y"), "seconds is the string 'y', expected a list of texts"),
    ("tags", ([["the", 3]],), r"texts\[0\] is \['the', 3\], expected a list of words, or a string of them"),
    ("tags", ("the cat",), "texts is the string 'the cat', expected a list of texts"),
    ("answers", (["x"],), "seconds=None, expected the contexts that the answers are in"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_what_is_no_text_is_refused(empty_folder, ask, name, arguments, message):
    Path("there.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=message):
        ask(name)(*arguments)


def test_a_model_without_labels_is_refused(tmp_path, run_command):
    run = write_tuned(tmp_path / "run", TARGETS["words"])
    (run / "labels.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tuned model: there is no labels.json"):
        Predictor.from_pretrained(run)
    status, _, err = run_command(convert, run, tmp_path / "out")
    assert status == 0, err
    with pytest.raises(ValueError, match="holds a MaskedLM without a classifier, which predicts nothing"):
        Predictor.from_pretrained(tmp_path / "out")


def test_the_command_joins_predictions_with_the_rows(tmp_path, run_command, ask, monkeypatch):
    expected = [one.label for one in ask("classes")(TEXTS)]
    rows = [{"id": f"00{i}", "body": text, "other": str(i)} for i, text in enumerate(TEXTS)]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    flags_given = ("--text-column", "body")
    status, out, err = run_command(command, "classes", "in.csv", "out.csv", *flags_given)
    assert (status, out) == (0, "3 predictions in out.csv\n"), err
    written = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8", newline="")))
    assert list(written[0]) == ["id", "body", "other", "predicted", "score", "p(été)", "p(hiver)"]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    assert [row["predicted"] for row in written] == expected
    status, _, err = run_command(command, "classes", "in.csv", "out.csv", *flags_given)
    assert (status, "out.csv is there already; --overwrite replaces it" in err) == (1, True)

    status, _, err = run_command(command, "classes", "in.csv", "out.jsonl", *flags_given, "--no-probabilities")
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["predicted"] for line in lines] == expected
    assert list(lines[0]) == ["id", "body", "other", "predicted", "score"]

    # As `vit predict` has it.
    status, out, err = run_command(command, "classes", "in.csv", "--out", "same.csv", *flags_given)
    assert (status, out) == (0, "3 predictions in same.csv\n"), err
    assert (tmp_path / "same.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()
    status, _, err = run_command(command, "classes", "in.csv", "a.csv", "--out", "b.csv", *flags_given)
    assert (status, err.count("\n")) == (2, 1)
    assert "OUT a.csv and --out b.csv, expected one of the two" in err

    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    monkeypatch.setattr("sys.argv", ["bert", "predict", "classes", "-"])
    with pytest.raises(SystemExit) as ended:
        flags.run(bert.main)
    assert not ended.value.code


def test_the_command_reads_lines_from_standard_input(tmp_path, run_command, ask, monkeypatch):
    expected = [one.label for one in ask("tags")(TEXTS)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    status, out, err = run_command(command, "tags", "-")
    assert status == 0, err
    assert [json.loads(line)["predicted"] for line in out.splitlines()] == expected
    assert [json.loads(line)["text"] for line in out.splitlines()] == TEXTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv", "out.csv"], "missing.csv does not exist; expected a file of texts"),
        (["in.txt", "out.npy"], "out.npy, expected a name that ends in .jsonl, .csv, .tsv"),
        (
            ["in.txt", "out.csv", "--text-column", "body"],
            "in.txt has no column 'body'; --text-column must be one of text",
        ),
        (["in.txt", "nowhere/out.csv"], "nowhere is no folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, run_command, arguments, message):
    write_tuned(tmp_path / "run", TARGETS["classes"])
    (tmp_path / "in.txt").write_text("the cat\n")
    status, _, err = run_command(command, "run", *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err
    assert not list(tmp_path.glob("out*"))


def test_what_is_half_written_does_not_take_the_name(tmp_path):
    (tmp_path / "out.jsonl").write_text("old\n")
    with pytest.raises(TypeError), whole_file(tmp_path / "out.jsonl") as file:
        file.writelines(["new\n", None])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.jsonl", "old\n")]


def test_a_pair_model_takes_the_columns_of_its_training(tmp_path, run_command):
    run = write_tuned(tmp_path / "run", TARGETS["pairs"])
    (run / "config.json").write_text(json.dumps({"data": {"text_column": "a", "second_column": "b"}}))
    (tmp_path / "in.jsonl").write_text(json.dumps({"a": "the cat", "b": "sat here"}) + "\n")
    status, out, err = run_command(command, run, "in.jsonl")
    assert status == 0, err
    assert json.loads(out)["predicted"] in CLASSES
    # So do what it exports, and what that exports.
    for source, target in ((run, "out"), ("out", "again")):
        status, _, err = run_command(convert, source, target)
        assert status == 0, err
    status, exported, err = run_command(command, "again", "in.jsonl")
    assert status == 0, err
    assert exported == out
