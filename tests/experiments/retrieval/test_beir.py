"""Every layout of queries and documents, what keeps its sides apart, and its mistakes, in one line each."""

import ast
import json
import logging
import os
import textwrap

import pyarrow
import pyarrow.parquet
import pytest

from experiments.retrieval import beir
from experiments.retrieval.beir import RetrievalData, load_collections, read_beir, read_loco, records, split_pairs
from tests.experiments.data.texts import compress

SHARES = {"train": 0.6, "dev": 0.2, "test": 0.2}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_qrels(folder, split, rows):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def write_beir(folder, n=60, splits=("train", "dev", "test"), words=12):
    """Documents of which each has a word of its own, and queries that ask for it; a third for each split."""
    names = [f"w{i}" for i in range(n)]
    texts = [
        " ".join([name, *(f"filler{(i * j) % 17}" for j in range(words + i % 30))]) for i, name in enumerate(names)
    ]
    write_rows(folder / "corpus.jsonl", ({"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)))
    write_rows(folder / "queries.jsonl", ({"_id": f"q{i}", "text": f"where is {name}"} for i, name in enumerate(names)))
    for number, split in enumerate(splits):
        write_qrels(folder, split, ((f"q{i}", f"d{i}", 1) for i in range(number, n, len(splits))))
    return folder


def sides_of(collection):
    """split -> (queries, documents with an answer)."""
    return {
        split: (set(qrels), {name for grades in qrels.values() for name, grade in grades.items() if grade > 0})
        for split, qrels in collection.qrels.items()
    }


def assert_disjoint(collection):
    sides = list(sides_of(collection).values())
    for i, (queries, documents) in enumerate(sides):
        for other_queries, other_documents in sides[i + 1 :]:
            assert not queries & other_queries
            assert not documents & other_documents


def test_reads_beirs_layout(tmp_path):
    write_rows(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "a", "title": "A title", "text": "and text"},
            {"_id": 7, "text": "no title"},
            {"_id": "c", "title": None, "text": ""},
        ],
    )
    write_rows(
        tmp_path / "queries.jsonl", [{"_id": "q", "text": "what"}, {"_id": "r", "text": "which", "metadata": {}}]
    )
    write_qrels(tmp_path, "test", [("q", "a", 2), ("q", "7", 0), ("r", "c", 0)])
    collection = read_beir(tmp_path)
    assert collection.documents == {"a": "A title and text", "7": "no title", "c": ""}
    assert collection.queries == {"q": "what", "r": "which"}
    assert collection.qrels == {"test": {"q": {"a": 2, "7": 0}}}  # r has no relevant document


def test_files_may_be_compressed_and_of_another_encoding(tmp_path):
    plain = read_beir(write_beir(tmp_path / "a/set"))
    write_beir(tmp_path / "b/set")
    for path, suffix in (("corpus.jsonl", ".gz"), ("queries.jsonl", ".zst"), ("qrels/train.tsv", ".xz")):
        file = tmp_path / "b/set" / path
        file.with_name(file.name + suffix).write_bytes(compress(file.read_bytes(), suffix))
        file.unlink()
    assert read_beir(tmp_path / "b/set") == plain
    row = '{"_id": "q0", "text": "déjà vu"}\n'
    (tmp_path / "a/set/queries.jsonl").write_bytes(row.encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"queries.jsonl is not utf-8 text; --data.encoding cp1252 may be its encoding"
    ):
        read_beir(tmp_path / "a/set")
    assert list(records(tmp_path / "a/set/queries.jsonl", "cp1252")) == [(1, {"_id": "q0", "text": "déjà vu"})]
    (tmp_path / "rows.csv").write_text('_id;text\nq0;"a, b; c"\n')
    assert list(records(tmp_path / "rows.csv")) == [(1, {"_id": "q0", "text": "a, b; c"})]


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "queries.jsonl.gz"])
def test_the_texts_of_a_folder_lie_in_it(name, tmp_path):
    folder = write_beir(tmp_path / "data")
    path = folder / name
    (folder / name.removesuffix(".gz")).rename(tmp_path / "elsewhere")
    path.symlink_to("../elsewhere")
    with pytest.raises(ValueError, match=rf"{name} leads out of the folder"):
        read_beir(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name} is a pipe, a socket or a device"):
        read_beir(folder)


def test_answers_and_tables_outside_a_folder_are_named_and_left_out(tmp_path, caplog):
    folder = write_beir(tmp_path / "data")
    (folder / "qrels" / "test.tsv").rename(tmp_path / "test.tsv")
    (folder / "qrels" / "test.tsv").symlink_to("../../test.tsv")
    with caplog.at_level(logging.WARNING):
        assert read_beir(folder).qrels.keys() == {"train", "dev"}
    assert "'qrels/test.tsv' leads out of the folder; left out" in caplog.text
    documents, queries = tmp_path / "documents", tmp_path / "queries"
    for place, rows in zip((documents, queries), loco_rows(), strict=True):
        place.mkdir()
        write_rows(place / "a.jsonl", rows)
        os.mkfifo(place / "pipe.jsonl")
        (place / "out.jsonl").symlink_to(tmp_path / "test.tsv")
    with caplog.at_level(logging.WARNING):
        assert len(read_loco(str(documents), str(queries))) == 2
    assert caplog.text.count("'pipe.jsonl' is a pipe") == 2


def test_dev_is_taken_from_train_where_there_is_none(tmp_path):
    collection = read_beir(write_beir(tmp_path, n=90, splits=("train", "test")), dev=0.3)
    assert list(collection.qrels) == ["train", "dev", "test"]
    assert 5 <= len(collection.qrels["dev"]) <= 25
    assert len(collection.qrels["train"]) + len(collection.qrels["dev"]) == 45
    assert_disjoint(collection)


def test_queries_that_share_documents_are_on_one_side_whatever_the_order():
    # Groups of three queries in a chain over two documents.
    qrels = {}
    for i in range(100):
        qrels |= {f"a{i}": {f"x{i}": 1}, f"b{i}": {f"x{i}": 1, f"y{i}": 1}, f"c{i}": {f"y{i}": 1}}
    sides = split_pairs(qrels, SHARES)
    assert sum(map(len, sides.values())) == 300
    where = {query: side for side, mine in sides.items() for query in mine}
    assert all(where[f"a{i}"] == where[f"b{i}"] == where[f"c{i}"] for i in range(100))
    assert 0.4 < len(sides["train"]) / 300 < 0.8
    assert sides == split_pairs(dict(reversed(qrels.items())), SHARES)


def loco_rows(tasks=("alpha", "beta"), n=40):
    documents = [{"pid": f"{t}_P{i}", "passage": f"{t} text {i}", "dataset": t} for t in tasks for i in range(n)]
    queries = [
        {"qid": f"{t}_Q{i}", "query": f"{t} query {i}", "answer_pids": [f"{t}_P{i // 2}"], "dataset": t}
        for t in tasks
        for i in range(n)
    ]
    return documents, queries


def test_reads_locos_layout_task_by_task_and_splits_it(tmp_path):
    documents, queries = loco_rows()
    for task in ("alpha", "beta"):  # a file for each task, as on the hub
        write_rows(tmp_path / "d" / f"{task}_test.jsonl", [row for row in documents if row["dataset"] == task])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(queries), tmp_path / "q.parquet")
    collections = read_loco(str(tmp_path / "d"), str(tmp_path / "q.parquet"))
    assert [(one.name, len(one.documents), len(one.queries)) for one in collections] == [
        ("alpha", 40, 40),
        ("beta", 40, 40),
    ]
    for one in collections:
        assert sum(map(len, one.qrels.values())) == 40
        assert {"train", "test"} <= set(one.qrels)
        assert_disjoint(one)
    (one,) = read_loco(str(tmp_path / "d"), str(tmp_path / "q.parquet"), ["beta"], test=1)
    assert {split: len(queries) for split, queries in one.qrels.items()} == {"test": 40}


@pytest.mark.slow
def test_the_standard_library_hides_names_and_docstrings_and_splits_by_file():
    collection = beir.standard_library()
    assert {split: len(mine) > 100 for split, mine in collection.qrels.items()} == dict.fromkeys(beir.SPLITS, True)
    assert_disjoint(collection)
    files = {split: {name.split(":")[0] for name in queries} for split, (queries, _) in sides_of(collection).items()}
    assert not files["train"] & files["test"]
    assert not files["train"] & files["dev"]
    name = next(name for name in collection.queries if name.startswith("textwrap.py:"))
    assert len(set(collection.documents.values())) == len(collection.documents)
    for name in list(collection.documents)[::50]:
        function = ast.parse(collection.documents[name]).body[0]
        assert function.name == "f"
        assert not any(ast.get_docstring(node) for node in ast.walk(function) if isinstance(node, ast.FunctionDef))


def test_an_inner_functions_docstring_is_not_in_the_outer_ones_code():
    source = textwrap.dedent(
        '''
        """Of the file."""
        def outer(a):
            """Does a thing well."""
            def inner(b):
                """Helps the outer one."""
                return outer(b) + outer.x + inner(b, a, b)
            return inner(a)
        '''
    )
    first, second = beir._functions(source)
    assert (first[0], first[1]) == (3, "Does a thing well.")
    assert (second[0], second[1]) == (5, "Helps the outer one.")
    assert "Helps" not in first[2]
    assert "outer" not in first[2]
    assert "inner" not in second[2]


def broken(change):
    """A sound folder after one change to it."""

    def make(folder):
        write_beir(folder)
        change(folder)
        return {"path": str(folder)}

    return make


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return broken(change)


def loco(change):
    def make(folder):
        documents, queries = loco_rows(n=4)
        change(documents, queries)
        write_rows(folder / "d.jsonl", documents)
        write_rows(folder / "q.jsonl", queries)
        return {"loco_documents": str(folder / "d.jsonl"), "loco_queries": str(folder / "q.jsonl")}

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: {"path": "no/where"}, "no/where is no folder"),
        (broken(lambda folder: (folder / "corpus.jsonl").unlink()), "corpus.jsonl does not exist"),
        (broken(lambda folder: (folder / "queries.jsonl").write_text("")), "queries.jsonl is empty"),
        (
            broken(lambda folder: [path.unlink() for path in (folder / "qrels").iterdir()]),
            "no train.tsv, dev.tsv, test",
        ),
        (replace("corpus.jsonl", '"_id": "d1"', '"_id": "d0"'), "corpus.jsonl line 2: the id 'd0' occurs twice"),
        (replace("corpus.jsonl", '"_id": "d1"', '"id": "d1"'), 'corpus.jsonl line 2 has no "_id"'),
        (replace("queries.jsonl", '"where is w2"', "3"), 'queries.jsonl line 3: "text" is 3, expected a string'),
        (replace("queries.jsonl", '"where is w2"', "null"), '"text" is null, expected a string'),
        (replace("corpus.jsonl", '"title": ""', '"title": []'), '"title" is [], expected a string'),
        (replace("queries.jsonl", "{", ""), "queries.jsonl line 1 is not JSON"),
        (replace("queries.jsonl", '{"_id": "q0", "text": "where is w0"}', "[1]"), "line 1: expected an object"),
        (replace("qrels/test.tsv", "q2\t", "q999\t"), "test.tsv line 2: there is no query 'q999' in queries.jsonl"),
        (replace("qrels/dev.tsv", "\td1\t", "\td999\t"), "dev.tsv line 2: there is no document 'd999' in corpus.jsonl"),
        (replace("qrels/dev.tsv", "q1\td1\t1", "q1 d1 1"), "dev.tsv line 2 is 'q1 d1 1', expected query-id, corpus-id"),
        (replace("qrels/dev.tsv", "q1\td1\t1", "q1\td1\tyes"), "expected query-id, corpus-id and a whole number"),
        (broken(lambda folder: write_qrels(folder, "test", [])), "test.tsv has no query with a relevant document"),
        (loco(lambda d, q: d.pop(0)), "q.jsonl line 1: there is no document 'alpha_P0' of alpha in"),
        (loco(lambda d, q: d.append(d[0])), "d.jsonl line 9: the id 'alpha_P0' occurs twice"),
        (loco(lambda d, q: q[0].pop("qid")), 'q.jsonl line 1 has no "qid"; expected qid, query, answer_pids, dataset'),
        (loco(lambda d, q: d[0].update(passage=5)), '"passage" is 5, expected a string'),
        (lambda folder: {"loco_documents": "d"}, "--data.loco-documents and --data.loco-queries belong together"),
        (lambda folder: {"tasks": ("a",)}, "--data.tasks belongs to --data.loco-queries"),
        (lambda folder: {"dev_share": 2}, "dev_share=2, expected 0 to 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(make, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as failure:
        load_collections(RetrievalData(**make(tmp_path)))
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_an_unknown_task_is_answered_with_those_there_are(tmp_path):
    config = RetrievalData(**loco(lambda d, q: None)(tmp_path), tasks=("gamma",))
    with pytest.raises(ValueError, match=r"--data.tasks gamma is not in .*; there are alpha, beta"):
        load_collections(config)


def test_a_name_without_a_folder_is_a_fetched_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="fetch headlines"):
        load_collections(RetrievalData(path="headlines"))
    with pytest.raises(FileNotFoundError, match="headlinez is no folder"):
        load_collections(RetrievalData(path="headlinez"))
