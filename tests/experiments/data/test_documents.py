import csv
import gzip
import hashlib
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from experiments.data import text_files
from experiments.data.corpus import DataConfig, load_corpus
from tests.experiments.data.texts import LONG, compress, documents_of, fails, write_documents

pytestmark = pytest.mark.usefixtures("cache")


def test_default_corpus_is_the_source_of_the_standard_library(default_corpus):
    root = Path(sysconfig.get_path("stdlib"))
    documents = documents_of(default_corpus)
    everything = documents["train"] | documents["validation"]
    assert len(everything) > 500
    assert not any("site-packages" in name or "__pycache__" in name for name in everything)
    for name in ("this.py", "json/decoder.py", "functools.py", "asyncio/base_events.py"):
        assert everything[name].encode() == (root / name).read_bytes()
    for name, text in everything.items():
        assert len(text.encode("utf-8")) > 0, name


# The split.


def test_default_split_holds_out_about_the_fraction_and_shares_no_text(default_corpus):
    share = default_corpus.validation.n_documents / (
        default_corpus.train.n_documents + default_corpus.validation.n_documents
    )
    assert 0.03 < share < 0.08
    digests = [
        {hashlib.sha256(stream.document(i)).digest() for i in range(stream.n_documents)}
        for stream in default_corpus[1:]
    ]
    assert not digests[0] & digests[1]
    assert [len(side) for side in digests] == [stream.n_documents for stream in default_corpus[1:]]


def test_split_is_stable_when_documents_come_and_go(tmp_path):
    texts = write_documents(tmp_path / "text", 60)
    config = DataConfig(path=str(tmp_path / "text"), validation_fraction=0.2, seq_len=64)
    before = documents_of(load_corpus(config))
    assert before["train"] | before["validation"] == texts
    assert not before["train"].keys() & before["validation"].keys()
    assert 4 <= len(before["validation"]) <= 20
    for name in list(texts)[30:40]:
        (tmp_path / "text" / name).unlink()
    edited = next(iter(before["validation"]))
    (tmp_path / "text" / edited).write_text("an edited text " * 30)
    write_documents(tmp_path / "text" / "more", 30)
    (tmp_path / "text" / "more" / "new.txt").write_text("a new text " * 30)
    after = documents_of(load_corpus(config))
    assert edited in after["validation"]
    for name in texts.keys() & (after["train"] | after["validation"]).keys():
        assert (name in before["train"]) == (name in after["train"])


def test_neither_side_is_empty_however_small_the_fraction(tmp_path):
    write_documents(tmp_path / "text", 20)
    for fraction in (1e-9, 1 - 1e-9):
        corpus = load_corpus(DataConfig(path=str(tmp_path / "text"), validation_fraction=fraction, seq_len=8))
        assert sorted([corpus.train.n_documents, corpus.validation.n_documents]) == [1, 19]


def test_equal_and_blank_documents_are_dropped(tmp_path):
    texts = write_documents(tmp_path / "text", 30)
    for i, text in enumerate(texts.values()):
        (tmp_path / "text" / f"copy{i}.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "text" / "empty.txt").touch()
    (tmp_path / "text" / "blank.txt").write_text(" \n\t\n")
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path / "text"), seq_len=64)))
    assert sorted([*sides["train"].values(), *sides["validation"].values()]) == sorted(texts.values())


def test_few_documents_give_up_their_tails_at_the_end_of_a_line(tmp_path):
    texts = {"a.txt": LONG, "b.txt": LONG.replace("fox", "ox"), "c.txt": "x" * 500}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path), validation_fraction=0.11)))
    for name, text in texts.items():
        assert sides["train"][name] + sides["validation"][name] == text
        assert 0.05 < len(sides["validation"][name]) / len(text) < 0.15
    assert sides["train"]["a.txt"].endswith("\n")
    assert sides["validation"]["a.txt"].startswith("The quick")


# Files, tables and the hub.


def rows(n: int) -> list[dict]:
    return [
        {"id": i, "text": f'Row {i}, "quoted" é\nsecond line {random.Random(i).random()}', "tag": None}
        for i in range(n)
    ]


def write_csv(path: Path, table: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)


def write_parquet(path: Path, table: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)


def json_lines(table: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in table)


WRITERS = {
    "a.jsonl": lambda path, table: path.write_text(json_lines(table)),
    "a.json": lambda path, table: path.write_text(json.dumps(table, indent=1)),
    "a.jsonl.gz": lambda path, table: path.write_bytes(gzip.compress(json_lines(table).encode())),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_a_table_are_documents(name, tmp_path):
    WRITERS[name](tmp_path / name, rows(50))
    options = {"seq_len": 16, "validation_fraction": 0.2}
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path / name), **options)))
    assert sides["train"] | sides["validation"] == {f"{name}:{i}": row["text"] for i, row in enumerate(rows(50))}
    some = documents_of(load_corpus(DataConfig(path=str(tmp_path / name), max_documents=30, **options)))
    for side in sides:
        assert some[side] == {name: text for name, text in sides[side].items() if int(name.rpartition(":")[2]) < 30}


def test_text_column_can_have_any_name_and_rows_without_text_are_skipped(tmp_path):
    table = [{"body": f"{i} {LONG}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(json_lines([*table, {"body": None}, {"body": ""}]))
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.jsonl"), text_column="body"))
    assert corpus.train.n_documents == 5


def test_folder_file_and_glob_name_files(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("a.md", "b/c.py", "b/d.rs", "b/.hidden/e.txt", ".f"):
        (tmp_path / name).write_text(f"{name}\n{LONG}")
    for path, expected in {
        "": ["a.md", "b/c.py", "b/d.rs"],
        "a.md": ["a.md"],
        "b": ["c.py", "d.rs"],
        "**/*.[pm]*": ["a.md", "b/c.py"],
        "*/d*": ["b/d.rs"],
    }.items():
        corpus = load_corpus(DataConfig(path=str(tmp_path / path)))
        assert [corpus.train.document_name(i) for i in range(corpus.train.n_documents)] == expected


def test_encodings_are_found_and_line_ends_kept(tmp_path):
    text = "# -*- coding: latin-1 -*-\r\ncafé = 'naïve'\r\n" + LONG
    (tmp_path / "a.py").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(("b" + text).encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(("c" + text).encode("utf-8-sig"))
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path))))
    for name, prefix in {"a.py": "", "b.txt": "b", "c.txt": "c"}.items():
        assert sides["train"][name] + sides["validation"][name] == prefix + text


def test_few_broken_characters_are_replaced_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " + LONG.encode())
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    assert documents_of(corpus)["train"]["a.txt"].startswith("caf\ufffd The")
    assert "1 characters of 'a.txt' are not utf-8" in caplog.text


@pytest.mark.parametrize("name", ["a.txt.zst", "a.md.xz", "a.py.bz2", "a.txt.gz"])
def test_a_text_may_be_compressed(name, tmp_path):
    (tmp_path / name).write_bytes(compress(f"é {LONG}".encode(), Path(name).suffix))
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path / name))))
    assert sides["train"][name] + sides["validation"][name] == f"é {LONG}"


def test_an_encoding_can_be_named(tmp_path):
    text = f"déjà vu {LONG}"
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    (tmp_path / "b.csv").write_bytes(f'text;n\n"b {text}";1\n'.encode("cp1252"))
    sides = documents_of(load_corpus(DataConfig(path=str(tmp_path), encoding="cp1252")))
    assert sides["train"]["a.txt"] + sides["validation"]["a.txt"] == text
    assert sides["train"]["b.csv:0"] + sides["validation"]["b.csv:0"] == f"b {text}"
    assert "'b.csv' is not utf-8 text; --data.encoding cp1252 may be" in fails(DataConfig(path=str(tmp_path / "b.csv")))


def test_numbers_are_text_too(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"0{i}\n" for i in range(60)))
    (tmp_path / "b.jsonl").write_text(json_lines([{"text": i} for i in range(60)]))
    write_parquet(tmp_path / "c.parquet", [{"text": i / 4} for i in range(60)])
    for name, first in {"a.csv": "00", "b.jsonl": "0", "c.parquet": "0.0"}.items():
        sides = documents_of(load_corpus(DataConfig(path=str(tmp_path / name), seq_len=2)))
        assert (sides["train"] | sides["validation"])[f"{name}:0"] == first


def test_rows_without_text_are_counted_and_said_once(tmp_path, caplog):
    table = [{"text": f"{i} {LONG}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(json_lines([*table, {"text": None}, {"id": 3}]))
    write_parquet(tmp_path / "b.parquet", [{"text": None}, {"text": f"b {LONG}"}])
    load_corpus(DataConfig(path=str(tmp_path), tokenizer="bpe", bpe_vocab_size=300))
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "'a.jsonl': 2 of 7 rows have no text in 'text' and are left out",
        "'b.parquet': 1 of 2 rows have no text in 'text' and are left out",
    ]


def test_bad_files_are_named_and_left_out_on_request(tmp_path, caplog):
    texts = write_documents(tmp_path / "text", 4)
    bad = {
        "bad.txt.gz": b"no gzip",
        "cut.txt.xz": compress(LONG.encode(), ".xz")[:40],
        "logo.png": b"\x89PNG\r\n\x1a\n\0\0\0",
        "latin.txt": ("déjà vu " * 99).encode("latin-1"),
        "a.parquet": b"not parquet",
        "b.csv": b"body\nx\n",
    }
    for name, content in bad.items():
        (tmp_path / "text" / name).write_bytes(content)
        assert f"'{name}'" in fails(DataConfig(path=str(tmp_path / "text" / name)))
    (tmp_path / "text" / "rows.jsonl").write_text('{"text": "one row"}\n{"text": \n{"text": "another"}\n')
    corpus = load_corpus(DataConfig(path=str(tmp_path / "text"), skip_bad=True))
    kept = {corpus.train.document_name(i) for i in range(corpus.train.n_documents)}
    assert kept == {*texts, "rows.jsonl:0", "rows.jsonl:1"}
    said = [record.message.split(": ", 1)[1] for record in caplog.records]
    assert all(any(f"'{name}'" in message for message in said) for name in bad)
    assert "line 2 of 'rows.jsonl' is not JSON" in " ".join(said)
    assert "1 of 3 rows of 'rows.jsonl' were left out, as --data.skip-bad asks" in said
    assert said[-1] == "6 of 11 files were left out, as --data.skip-bad asks"


def test_how_files_are_read_is_part_of_what_is_kept_and_its_default_is_not(tmp_path, builds):
    (tmp_path / "a.txt").write_text(LONG)
    for options in ({}, {}, {"encoding": "cp1252"}, {"skip_bad": True}, {"encoding": "cp1252"}):
        load_corpus(DataConfig(path=str(tmp_path / "a.txt"), **options))
    assert len(builds) == 3
    assert "encoding" not in repr(DataConfig())  # the key of what earlier versions kept


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A data set laid out as on the hub, which `datasets` opens by the same call."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json_lines(rows(50)))
    (folder / "validation.jsonl").write_text(json_lines([*rows(3), {"id": 9, "text": "only here", "tag": None}]))
    return folder


@pytest.mark.parametrize("max_documents", [None, 40])
def test_hub_data_set_keeps_its_own_validation_split(hub_folder, max_documents):
    corpus = load_corpus(DataConfig(hub=str(hub_folder), seq_len=16, max_documents=max_documents))
    sides = documents_of(corpus)
    texts = [row["text"] for row in rows(50)]
    assert list(sides["validation"].values()) == [*texts[:3], "only here"]
    assert list(sides["train"].values()) == texts[3:max_documents]  # what validation has is dropped


def test_hub_data_set_without_validation_is_split(hub_folder):
    (hub_folder / "validation.jsonl").unlink()
    corpus = load_corpus(DataConfig(hub=str(hub_folder), seq_len=16))
    assert corpus.train.n_documents + corpus.validation.n_documents == 50
    assert corpus.validation.n_documents >= 1


@pytest.fixture
def fake_hub(hub_folder, monkeypatch):
    """The name someone/set leads to `hub_folder`, while `reachable` is set."""
    import datasets
    import huggingface_hub

    class Hub:
        reachable, revision, asked = True, "1234", ()

        def dataset_info(self, name, timeout):
            if not Hub.reachable:
                raise ConnectionError("[Errno -2] Name or service not known\nand more lines")
            return type("Info", (), {"sha": Hub.revision})

    def load(name, subset, **options):
        Hub.asked = (name, subset, options)
        return original(str(hub_folder), streaming=options["streaming"])

    original = datasets.load_dataset
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return Hub


def test_hub_data_set_is_read_at_the_revision_that_names_its_cache(fake_hub):
    config = DataConfig(hub="someone/set:plain", seq_len=16)
    first = load_corpus(config)
    assert fake_hub.asked == ("someone/set", "plain", {"revision": "1234", "streaming": False})
    fake_hub.asked = ()
    load_corpus(config)
    assert fake_hub.asked == ()
    fake_hub.revision = "5678"
    load_corpus(config)
    assert fake_hub.asked[2]["revision"] == "5678"
    load_corpus(DataConfig(hub="someone/set:plain", seq_len=16, max_documents=30))
    assert fake_hub.asked[2]["streaming"]
    assert first.train.n_documents == 47


def test_tokens_of_a_hub_data_set_outlive_the_network(fake_hub, caplog):
    config = DataConfig(hub="someone/set", seq_len=16)
    first = load_corpus(config)
    fake_hub.reachable = False
    again = load_corpus(config)
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert "cannot be reached; the tokens kept from an earlier run are used" in caplog.text
    with pytest.raises(
        ValueError, match=r"--data\.hub 'someone/other' cannot be loaded \(\[Errno -2\].*HF_HUB_OFFLINE=1"
    ):
        load_corpus(DataConfig(hub="someone/other"))


# What the user can get wrong.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"path": "a", "hub": "b"}, "--data.path 'a' and --data.hub 'b' exclude each other; give one"),
        ({"validation_fraction": 0.0}, "--data.validation-fraction 0.0 must be between 0 and 1"),
        ({"validation_fraction": 1.0}, "--data.validation-fraction 1.0 must be between 0 and 1"),
        ({"seq_len": 0}, "--data.seq-len 0 must be at least 1"),
        ({"tokenizer": "bpe", "bpe_vocab_size": 256}, "--data.bpe-vocab-size 256 must be at least 257"),
        ({"path": ""}, "--data.path '' does not exist"),
        ({"max_documents": 0}, "--data.max-documents 0 must be at least 1"),
        (
            {"path": "missing.txt"},
            "--data.path 'missing.txt' does not exist; expected a text file, a folder of them or",
        ),
        ({"path": "missing/*.txt"}, "--data.path 'missing/*.txt' matches no file; expected text, .jsonl, .csv or"),
        ({"tokenizer": "missing.json"}, "--data.tokenizer: tokenizer 'missing.json' does not exist; expected 'bytes',"),
        ({"hub": "nobody/nothing"}, "--data.hub 'nobody/nothing' cannot be loaded ("),
    ],
)
def test_wrong_flag_is_named_with_its_value(options, expected):
    assert fails(DataConfig(**options)).startswith(expected)


FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n \n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "image.txt": (b"\x89PNG\0\0" * 100, "'image.txt' is not text (zero byte at offset 4); pick text files with a glob"),
    "latin.txt": (("déjà vu " * 99).encode("latin-1"), "'latin.txt' is not utf-8 text (198 of 792 characters"),
    "a.py": (b"\0" * 99, "'a.py' is not text (zero byte at offset 0)"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": b}\n', "line 2 of 'bad.jsonl' is not JSON (Expecting value"),
    "bad.json": (
        b'[{"text": "a"},\n{"text" "b"}]',
        "'bad.json' is not JSON (Expecting ':' delimiter: line 2",
    ),
    "list.jsonl": (
        b'{"text": "a"}\n"b"\n',
        "row 2 of 'list.jsonl' holds 'b', expected an object of columns",
    ),
    "type.jsonl": (b'{"text": "a"}\n{"text": [3]}\n', "row 2 of 'type.jsonl' holds list in --data.text-column 'text'"),
    "column.jsonl": (
        b'{"id": 1, "body": "a"}\n',
        "'column.jsonl' has no column 'text'; --data.text-column must be one of id, body",
    ),
    "column.csv": (b"id,body\n1,a\n", "'column.csv' has no column 'text'; --data.text-column must be one of id, body"),
    "ragged.csv": (
        b"id,text\n1,a\n1,2,3,4\n",
        "line 3 of 'ragged.csv' has 4 cells, expected at most the 2 of the first line",
    ),
    "a.parquet": (b"not parquet", "'a.parquet' cannot be read as parquet ("),
    "one.txt": (b"x", "--data.validation-fraction 0.05 leaves no validation text of --data.path"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_text_is_one_clear_line(name, tmp_path, capfd):
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    message = fails(DataConfig(path=str(tmp_path / name)))
    assert expected in message
    assert f"--data.path '{tmp_path / name}'" in message
    assert capfd.readouterr().err == ""


def test_file_that_is_no_text_is_the_same_line_to_a_bpe_in_training(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(FILES["bad.jsonl"][0])
    assert FILES["bad.jsonl"][1] in fails(DataConfig(path=str(tmp_path / "bad.jsonl"), tokenizer="bpe"))


def test_empty_folder_and_folder_with_a_stray_binary_are_told_apart(tmp_path):
    assert "is an empty folder" in fails(DataConfig(path=str(tmp_path)))
    write_documents(tmp_path / "text", 3)
    (tmp_path / "text" / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    assert "'logo.png' is not text" in fails(DataConfig(path=str(tmp_path / "text")))
    load_corpus(DataConfig(path=str(tmp_path / "text" / "*.txt")))


def test_hub_data_set_without_a_train_split_lists_what_it_has(hub_folder):
    (hub_folder / "train.jsonl").rename(hub_folder / "test.jsonl")
    assert "has no split 'train'; it has" in fails(DataConfig(hub=str(hub_folder)))
    assert fails(DataConfig(hub=str(hub_folder / "missing"))).startswith("--data.hub")


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    write_documents(tmp_path / "text", 2)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_files, "_open", refuse)
    message = fails(DataConfig(path=str(tmp_path / "text")))
    assert message.endswith("'000.txt' cannot be read (Permission denied); --data.skip-bad leaves such files out")
