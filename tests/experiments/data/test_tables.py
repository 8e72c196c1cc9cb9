"""Tables of every format, row by row, and what is wrong with a row."""

import json

import pytest

from experiments.data.tables import Reading, check_delimiter, delimiter_of, read_rows
from experiments.data.text_files import BadFile
from tests.experiments.data.texts import compress


def rows(path, content, **how):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, path.name, Reading(**how)))


def test_cells_of_csv_are_text_as_it_stands(tmp_path):
    content = 'text,label\n"a, ""b""\nc",007\n 1 ,\n'
    assert rows(tmp_path / "a.csv", content) == [
        {"text": 'a, "b"\nc', "label": "007"},
        {"text": " 1 ", "label": None},
    ]


@pytest.mark.parametrize(("header", "delimiter"), [("a,b", ","), ("a;b", ";"), ("a\tb", "\t"), ('"a,b,c";d', ";")])
def test_the_header_says_what_is_between_cells(header, delimiter, tmp_path):
    assert delimiter_of(header) == delimiter
    content = f'{header}\n"x, y; z"{delimiter}2\n'
    (row,) = rows(tmp_path / "a.csv", content)
    assert list(row.values()) == ["x, y; z", "2"]


def test_one_column_is_one_column(tmp_path):
    assert rows(tmp_path / "a.csv", "text\nx; y; z\n") == [{"text": "x; y; z"}]


def test_a_delimiter_can_be_given(tmp_path):
    assert rows(tmp_path / "a.csv", "a|b\n1|2\n", delimiter="|") == [{"a": "1", "b": "2"}]
    assert [check_delimiter(name) for name in (None, "tab", "\\t", "semicolon", "|")] == [None, "\t", "\t", ";", "|"]
    with pytest.raises(ValueError, match=r"--data.delimiter '::', expected a character, or one of comma"):
        check_delimiter("::")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.conll"])
def test_every_table_may_be_compressed(suffix, name, tmp_path):
    contents = {
        "a.csv": "words,tags\né,1\n",
        "a.tsv": "words\ttags\né\t1\n",
        "a.json": '[{"words": "é",\n"tags": "1"}]',
        "a.jsonl": '{"words": "é", "tags": "1"}\n',
        "a.conll": "é 1\n",
    }
    (row,) = rows(tmp_path / f"{name}{suffix}", compress(contents[name].encode(), suffix))
    assert "".join(row["words"]) == "é"
    assert "".join(row["tags"]) == "1"


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n\n{"a": 2}\n',
        '[{"a": 1}, {"a": 2}]',
        '[\n {"a": 1},\n {"a": 2}\n]\n',
        '{"data": [{"a": 1}, {"a": 2}]}',
        '{\n "version": 1,\n "data": [\n  {"a": 1},\n  {"a": 2}\n ]\n}\n',
        '[{"a": 1}]\n'.replace("]", ',{"a": 2}]'),
    ],
)
def test_json_in_lines_in_a_list_or_in_an_object(content, tmp_path):
    assert rows(tmp_path / "a.json", content) == [{"a": 1}, {"a": 2}]


def test_one_line_is_one_row(tmp_path):
    row = {"words": ["a", "b"], "tags": ["x", "y"]}
    assert rows(tmp_path / "a.jsonl", json.dumps(row)) == [row]
    assert rows(tmp_path / "a.jsonl", "") == []


def test_squad_s_own_json(tmp_path):
    answered = {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 7}]}
    refused = {"id": "2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{}]}
    paragraph = {"context": "It was Ann.", "qas": [answered, refused]}
    content = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [paragraph]}]}
    one, other = rows(tmp_path / "train-v2.0.json", json.dumps(content))
    assert one == {
        **{"id": "1", "title": "T", "question": "Who?", "context": "It was Ann."},
        "answers": {"text": ["Ann"], "answer_start": [7]},
    }
    assert other["answers"] == {"text": [], "answer_start": []}
    del paragraph["context"]
    with pytest.raises(BadFile, match=r"a.json is not JSON as SQuAD has it: paragraph 1 of 'T' lacks 'context'"):
        rows(tmp_path / "a.json", json.dumps(content))


def test_sentences_of_conll(tmp_path):
    content = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter\tNNP\tB-NP\tB-PER\n"
    first, second = rows(tmp_path / "a.conll", content)
    assert (first["words"], first["tags"]) == (["EU", "rejects"], ["B-ORG", "O"])
    assert first["2"] == ["NNP", "VBZ"]
    assert (second["words"], second["tags"]) == (["Peter"], ["B-PER"])


def test_universal_dependencies(tmp_path):
    content = (
        "# text = vámonos\n1-2\tvámonos\t_\t_\n1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_\n"
        "2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_\n"
    )
    (row,) = rows(tmp_path / "a.conllu", content)
    assert (row["words"], row["tags"], row["deprel"]) == (["vamos", "nos"], ["VERB", "PRON"], ["root", "obj"])


@pytest.mark.parametrize(
    ("name", "content", "message", "left"),
    [
        ("a.csv", "a,b\n1,2\n1,2,3\n3,4\n", "line 3 of a.csv has 3 cells, expected at most the 2", 2),
        ("a.jsonl", '{"a": 1}\n{"a"\n{"a": 3}\n', "line 2 of a.jsonl is not JSON", 2),
        ("a.jsonl", '{"a"\n{"a": 1}\n{"a": 3}\n', "line 1 of a.jsonl is not JSON", 2),
        ("a.jsonl", '{"a": 1}\n5\n', "row 2 of a.jsonl holds 5, expected an object of columns", 1),
        ("a.conll", "x O\ny\n\nz O\n", "the sentence from line 1 on of a.conll has lines of 1 and 2 columns", 1),
    ],
)
def test_a_bad_row_is_named_and_skipped_on_request(name, content, message, left, tmp_path):
    with pytest.raises(BadFile, match=message):
        rows(tmp_path / name, content)
    said = []
    assert len(rows(tmp_path / name, content, skip=said.append)) == left
    assert len(said) == 1
    assert message in said[0]


def test_cells_behind_the_last_column_may_be_empty(tmp_path):
    assert rows(tmp_path / "a.csv", "a,b\n1,2,\n") == [{"a": "1", "b": "2"}]
