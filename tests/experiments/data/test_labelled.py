"""Labelled tables of every format, and every mistake in them as one line."""

import csv
import json
import sysconfig
from pathlib import Path

import pytest

from experiments.data import snippets
from experiments.data.labelled import LabelledConfig, load_labelled
from tests.experiments.data.texts import compress

ROWS = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(40)]


def write(path, rows, **options):
    """Writes rows in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows, **options).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(compress(content.encode(), "" if path.suffix == ".jsonl" else path.suffix))
    return path


def load(path, kind=None, **options):
    return load_labelled(LabelledConfig(path=str(path), **options), kind)


def fails(path, kind=None, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as failure:
        load(path, kind, **options)
    message = " ".join(str(failure.value).split())
    assert f"--data.path {path}" in message
    return message


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.jsonl.zst"])
def test_every_format_holds_the_same(name, tmp_path):
    data = load(write(tmp_path / name, ROWS))
    assert (data.kind, data.classes) == ("classification", ("even", "odd"))
    assert list(data.splits) == ["train", "validation"]
    rows = [(t, label) for split in data.splits.values() for t, label in zip(split.texts, split.labels, strict=True)]
    assert sorted(rows) == sorted((row["text"], row["label"]) for row in ROWS)
    assert len(data.splits["validation"].texts) == 4


def test_one_file_is_split_by_what_the_texts_are(tmp_path):
    whole = load(write(tmp_path / "a.jsonl", ROWS))
    twice = load(write(tmp_path / "b.jsonl", ROWS[::-1] + ROWS))
    for split in whole.splits:
        assert set(whole.splits[split].texts) == set(twice.splits[split].texts)


def test_a_folder_has_its_own_splits(tmp_path):
    write(tmp_path / "d/train.jsonl", ROWS)
    write(tmp_path / "d/dev.csv", ROWS[:6])
    write(tmp_path / "d/test.parquet", ROWS[6:9])
    (tmp_path / "d/README.md").write_text("about")
    data = load(tmp_path / "d")
    assert {name: len(split.texts) for name, split in data.splits.items()} == {"train": 40, "validation": 6, "test": 3}
    (tmp_path / "d/dev.csv").unlink()
    data = load(tmp_path / "d", validation_fraction=0.25)
    assert {name: len(split.texts) for name, split in data.splits.items()} == {"train": 30, "validation": 10, "test": 3}


def test_integers_are_classes_and_floats_are_numbers(tmp_path):
    rows = [{"text": str(i) + "x", "stars": i % 11, "score": i / 7} for i in range(40)]
    for name in ("d.jsonl", "d.csv", "d.parquet"):
        data = load(write(tmp_path / name, rows), label_column="stars")
        assert (data.kind, data.classes[:3], data.classes[-1]) == ("classification", ("0", "1", "2"), "10")
        data = load(tmp_path / name)
        assert data.kind == "regression"
        assert sorted(data.splits["train"].labels + data.splits["validation"].labels) == [i / 7 for i in range(40)]
        assert load(tmp_path / name, "regression", label_column="stars").kind == "regression"


def test_pairs_tags_and_answers_by_their_columns(tmp_path):
    pairs = [{"a": f"a{i}", "b": f"b{i}", "label": i % 2} for i in range(20)]
    data = load(write(tmp_path / "p.jsonl", pairs), text_column="a", second_column="b")
    first = data.splits["train"]
    assert [text[1:] for text in first.texts] == [text[1:] for text in first.seconds]
    tags = [{"words": ["Ann", "ran"], "tags": ["B-PER", "O"]} for _ in range(3)]
    data = load(
        write(tmp_path / "t.jsonl", [{**row, "words": [*row["words"][:1], str(i)]} for i, row in enumerate(tags)])
    )
    assert (data.kind, data.classes) == ("tagging", ("B-PER", "O"))
    answers = [
        {"question": f"who {i}?", "context": "It was Ann.", "answers": {"text": ["Ann"], "answer_start": [7]}}
        for i in range(5)
    ]
    data = load(write(tmp_path / "q.jsonl", answers))
    assert data.kind == "span-qa"
    assert data.splits["train"].labels[0] == {"text": ["Ann"], "answer_start": [7]}


def test_names_of_the_hub_s_classes_are_kept_in_order(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad", "never seen"])}
    )
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    write(tmp_path / "d/train.parquet", rows, features=features)
    write(tmp_path / "d/test.parquet", [{"text": "t", "label": -1}], features=features)
    for options in ({"path": str(tmp_path / "d")}, {"hub": str(tmp_path / "d")}):
        data = load_labelled(LabelledConfig(**options))
        assert data.classes == ("good", "bad", "never seen")
        assert set(data.splits["train"].labels) == {"good", "bad"}
        assert data.splits["test"].labels is None  # kept secret


def test_few_rows_are_the_same_few(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    few, more = (set(load(path, train_rows=n).splits["train"].texts) for n in (5, 10))
    assert len(few) == 5
    assert few < more
    assert load(path, train_rows=5).splits["validation"] == load(path).splits["validation"]


def without(rows, column, *numbers):
    return [{**row, column: None} if i in numbers else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"label_column": "lable"}, "has no column 'lable'; --data.label-column must be one of text, label"),
        (ROWS, {"text_column": "body"}, "has no column 'body'; --data.text-column must be one of text, label"),
        (ROWS, {"second_column": "b"}, "has no column 'b'; --data.second-column must be one of"),
        ([], {}, "the split 'train' to train on is empty"),
        (ROWS[:1] * 5, {}, "5 rows, too few different ones to hold some out"),
        (without(ROWS, "label", *range(40)), {}, "rows have no label in --data.label-column 'label', first row 1"),
        ([{"text": f"{i}", "label": "x"} for i in range(20)], {}, "always holds 'x' in train"),
        ([{"text": f"{i}", "label": "x" if i % 2 else 0.5} for i in range(20)], {}, "expected labels of one kind"),
        ([{"text": ["a"], "label": i % 2} for i in range(20)], {}, "--data.text-column 'text' holds ['a']; expected"),
        ([{"text": None, "label": i % 2} for i in range(20)], {}, "'text' holds nothing; expected strings"),
    ],
)
def test_a_wrong_table_is_one_clear_line(rows, options, message, tmp_path):
    assert message in fails(write(tmp_path / "d.jsonl", rows), **options)


@pytest.mark.parametrize(
    ("kind", "label", "expected"),
    [
        ("classification", 0.5, "expects strings or integers"),
        ("regression", "good", "expects numbers"),
        ("regression", True, "expects numbers"),
        ("tagging", "good", "expected a list of words"),
        ("span-qa", "good", "answers need --data.second-column"),
    ],
)
def test_labels_of_another_kind_than_asked_for(kind, label, expected, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": f"t{i}", "label": label} for i in range(20)])
    assert expected in fails(path, kind)


def test_missing_labels_are_counted(tmp_path):
    write(tmp_path / "d/train.jsonl", without(ROWS, "label", 3, 8))
    message = fails(tmp_path / "d")
    assert (
        "train.jsonl: 2 of 40 rows have no label in --data.label-column 'label', first row 4; expected one" in message
    )
    write(tmp_path / "d/train.csv", without(ROWS, "label", 3, 8))
    assert "both train.csv and train.jsonl are train, expected one file" in fails(tmp_path / "d")


def test_a_label_that_training_never_shows(tmp_path):
    write(tmp_path / "d/train.jsonl", ROWS)
    write(tmp_path / "d/test.jsonl", [{"text": "t", "label": "prime"}])
    assert "the label 'prime' of test is never in train" in fails(tmp_path / "d")


def test_an_empty_split_is_named(tmp_path):
    write(tmp_path / "d/train.jsonl", ROWS)
    write(tmp_path / "d/test.jsonl", [])
    assert "test.jsonl has no rows" in fails(tmp_path / "d")


def test_tags_and_answers_that_do_not_fit_their_texts(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"words": [f"a{i}", "b"], "tags": ["O"]} for i in range(9)])
    assert "has 2 words and 1 tags in 'tags'" in fails(path)
    answers = {"text": ["Ann"], "answer_start": [1]}
    rows = [{"question": f"{i}", "context": "It was Ann.", "answers": answers} for i in range(9)]
    assert "the answer 'Ann' is not at answer_start 1, where the context has 't w'" in fails(
        write(tmp_path / "q.jsonl", rows)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 of d.jsonl is not JSON"),
        ("d.jsonl", "[1, 2]\n", "row 1 of d.jsonl holds 1, expected an object of columns"),
        ("d.parquet", "no parquet", "d.parquet cannot be read as parquet"),
        ("d.jsonl.gz", "no gzip", "d.jsonl.gz cannot be read (Not a gzipped file"),
        ("d.txt", "text", "d.txt is no table"),
        ("e/d.txt", "text", "has no train.jsonl, .csv, .parquet; tables there: none"),
    ],
)
def test_damaged_files(name, content, message, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert message in fails(tmp_path / name.split("/")[0])


def test_other_mistakes(tmp_path, monkeypatch):
    assert "does not exist" in fails(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--data\.path and --data\.hub exclude each other"):
        LabelledConfig(path="a", hub="b")
    with pytest.raises(ValueError, match=r"--data\.hub no/where cannot be loaded"):
        load_labelled(LabelledConfig(hub="no/where"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.data fetch r8"):
        load_labelled(LabelledConfig(fetched="r8"))


def test_the_standard_library_gives_nothing_away():
    data = load_labelled(LabelledConfig())
    library = Path(sysconfig.get_path("stdlib"))  # some systems keep a package of it apart
    assert data.classes == tuple(sorted(name for name in snippets.PACKAGES if (library / name).is_dir()))
    train, validation, test = (data.splits[name] for name in ("train", "validation", "test"))
    assert set(train.labels) == set(validation.labels) == set(test.labels) == set(data.classes)
    for text in [*train.texts, *test.texts]:
        assert not any(name in text.lower() for name in data.classes)
        assert not any(line.lstrip().startswith(("import ", "from ")) for line in text.splitlines())
    assert len(train.texts) > len(test.texts) > 100


def examples(data):
    """What every text is labelled, over all splits."""
    return {t: label for split in data.splits.values() for t, label in zip(split.texts, split.labels, strict=True)}


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.parquet"])
def test_labels_are_kept_as_they_are_written(name, tmp_path):
    spelled = ("1", "01", "007", "1.0", "1e3")
    rows = [{"text": f"t{i}", "label": spelled[i % 5]} for i in range(40)]
    data = load(write(tmp_path / name, rows), "classification")
    assert data.classes == tuple(sorted(spelled))
    assert examples(data) == {row["text"]: row["label"] for row in rows}
    whole = load(
        write(tmp_path / f"e{name}", [row for row in rows if "." not in row["label"] and "e" not in row["label"]])
    )
    assert whole.classes == ("01", "1", "007")  # by value, then by their text


def test_integers_say_how_they_were_taken_and_how_to_say_otherwise(tmp_path):
    rows = [{"text": f"t{i}", "score": i % 11, "other": i / 4} for i in range(40)]
    for name in ("d.csv", "d.jsonl"):
        path = write(tmp_path / name, rows)
        note = load(path).note
        assert note == "the integers of 'score' are taken as 11 classes; --kind regression takes them as numbers"
        assert load(path, "regression").note == load(path, label_column="other").note == ""
    assert load(write(tmp_path / "w.csv", ROWS)).note == ""


def test_texts_may_be_numbers(tmp_path):
    for name in ("d.csv", "d.jsonl", "d.parquet"):
        data = load(write(tmp_path / name, [{"text": 100 + i, "label": "xy"[i % 2]} for i in range(40)]))
        assert set(examples(data)) == {str(100 + i) for i in range(40)}


def test_a_csv_of_semicolons_in_another_encoding(tmp_path):
    lines = "".join(f'"déjà, vu {i}";{"xy"[i % 2]}\n' for i in range(40))
    (tmp_path / "d.csv").write_bytes(f"text;label\n{lines}".encode("cp1252"))
    data = load(tmp_path / "d.csv", encoding="cp1252")
    assert data.classes == ("x", "y")
    assert "déjà, vu 7" in examples(data)
    assert "d.csv is not utf-8 text; --data.encoding cp1252 may be its encoding" in fails(tmp_path / "d.csv")
    (tmp_path / "p.csv").write_text("".join(f"{a}|{b}\n" for a, b in [("text", "label"), *examples(data).items()]))
    assert load(tmp_path / "p.csv", delimiter="|").classes == ("x", "y")


def test_several_labels_of_a_text(tmp_path):
    rows = [{"text": f"t{i}", "labels": [name for bit, name in enumerate("abc") if i >> bit & 1]} for i in range(40)]
    data = load(write(tmp_path / "d.jsonl", rows))
    assert (data.kind, data.classes) == ("multi-label", ("a", "b", "c"))
    assert examples(data) == {row["text"]: row["labels"] for row in rows}
    cells = [row | {"labels": "|".join(row["labels"]) or "c"} for row in rows]
    data = load(write(tmp_path / "d.csv", cells), label_separator="|")
    assert (data.kind, data.classes) == ("multi-label", ("a", "b", "c"))
    assert examples(data)["t6"] == ["b", "c"]
    assert "expects lists of strings or integers" in fails(write(tmp_path / "e.jsonl", ROWS), "multi-label")


def test_files_of_conll_are_tags(tmp_path):
    (tmp_path / "d").mkdir()
    sentence = "EU NNP B-ORG\nrejects VBZ O\n\nPeter{} NNP B-PER\n\n"
    for split, n in (("train", 9), ("dev", 1), ("test", 2)):
        (tmp_path / f"d/{split}.conll").write_text("".join(sentence.format(f"{split}{i}") for i in range(n)))
    data = load(tmp_path / "d")
    assert (data.kind, data.classes) == ("tagging", ("B-ORG", "B-PER", "O"))
    assert data.splits["test"].texts[1] == ["Petertest0"]
    assert load(tmp_path / "d", label_column="2").classes == ("NNP", "VBZ")
    for file in list((tmp_path / "d").iterdir()):
        file.rename(file.with_suffix(".txt"))
    assert load(tmp_path / "d", "tagging").splits["train"] == data.splits["train"]


def test_squad_as_it_is_published(tmp_path):
    def article(i):
        asked = {"id": str(i), "question": f"who {i}?", "answers": [{"text": "Ann", "answer_start": 7}]}
        return {"title": str(i), "paragraphs": [{"context": "It was Ann.", "qas": [asked]}]}

    (tmp_path / "d").mkdir()
    for name, part in (("train-v2.0.json", range(9)), ("dev-v2.0.json", range(9, 12))):
        (tmp_path / "d" / name).write_text(json.dumps({"version": "v2.0", "data": [article(i) for i in part]}))
    data = load(tmp_path / "d")
    assert (data.kind, [len(split.texts) for split in data.splits.values()]) == ("span-qa", [9, 3])
    assert data.splits["train"].labels[0] == {"text": ["Ann"], "answer_start": [7]}
    flat = [
        {"question": f"{i}", "context": "It was Ann.", "answers": [{"text": "Ann", "answer_start": 7}]}
        for i in range(9)
    ]
    assert load(write(tmp_path / "f.jsonl", flat)).splits["train"].labels[0] == data.splits["train"].labels[0]


def test_rows_of_training_that_come_again_are_counted(tmp_path, caplog):
    write(tmp_path / "d/train.jsonl", ROWS[:30])
    write(tmp_path / "d/validation.jsonl", ROWS[30:35])
    write(tmp_path / "d/test.jsonl", [*ROWS[35:], *ROWS[3:6]])
    load(tmp_path / "d")
    (said,) = [record.message for record in caplog.records]
    assert "3 of 8 rows of test have the text of a row of train, row 6 the first" in said


def test_rows_that_cannot_be_used_are_left_out_on_request_and_counted(tmp_path, caplog):
    broken = [*without(ROWS, "label", 3, 8)]
    broken[12] = {"text": None, "label": "odd"}
    broken[14] = {"text": "x", "label": 0.5}
    path = write(tmp_path / "d.jsonl", broken)
    path.write_text(path.read_text() + '{"text": \n')
    fails(path)
    data = load(path, "classification", skip_bad=True)
    assert len(examples(data)) == 36
    said = [record.message for record in caplog.records]
    assert sum("left out" in message for message in said) == 7
    assert any("line 41 of d.jsonl is not JSON" in message for message in said)
    assert any("row 13: --data.text-column 'text' holds nothing" in message for message in said)
    assert "4 of 40 rows of d.jsonl were left out, as --data.skip-bad asks" in said[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "utf-9"}, "--data.encoding utf-9, expected one that Python knows"),
        ({"delimiter": "ab"}, "--data.delimiter 'ab', expected a character"),
        ({"label_separator": ""}, "--data.label-separator '', expected at least a character"),
    ],
)
def test_wrong_ways_to_read(options, message):
    with pytest.raises(ValueError, match=message):
        LabelledConfig(**options)
