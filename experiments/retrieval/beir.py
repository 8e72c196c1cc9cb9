"""Queries, documents, and which answers which: folders in BEIR's layout, LoCoV1's, or Python's standard library.

    BEIR      corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id", "text"}, qrels/{train,dev,test}.tsv
    LoCoV1    documents {"pid", "passage", "dataset"} and queries {"qid", "query", "answer_pids", "dataset"}
    default   functions of the standard library, found by their docstrings

LoCoV1 is published as one split, "test", which its own scripts train on and evaluate on. Here a hash of the documents
splits it: no query and no answer is on two sides.
"""

import ast
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.data_source import datasets_library
from experiments.data.documents import DataConfig, open_source
from experiments.data.inside import what_is_wrong, within
from experiments.data.tables import delimiter_of
from experiments.data.text_files import OPENERS, check_encoding, lines_of, open_text, read_text, stem_and_suffix
from zoo.published.json_files import parse_json

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
LOCO = ("hazyresearch/LoCoV1-Documents", "hazyresearch/LoCoV1-Queries")
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """Queries and documents. Without any of these: the standard library's functions and their docstrings."""

    path: str | None = None
    """A folder in BEIR's layout, or the name of a data set of `python -m experiments.data fetch`."""
    loco_documents: str | None = None
    """LoCoV1's documents: hazyresearch/LoCoV1-Documents, or a file or folder with its columns."""
    loco_queries: str | None = None
    """LoCoV1's queries: hazyresearch/LoCoV1-Queries, or a file or folder with its columns."""
    tasks: tuple[str, ...] = ()
    """Of LoCoV1, only these tasks: qmsum gov_report ..."""
    dev_share: float = 0.1
    """Share of the training pairs for choosing a checkpoint, where there is no qrels/dev.tsv."""
    test_share: float = 0.2
    """Share of the pairs for the last evaluation, where the data has no splits. 1 evaluates on all of LoCoV1, as its
    published numbers do, and leaves nothing to train on."""
    encoding: str = "utf-8"
    """Of text files, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...)."""

    def __post_init__(self):
        check_encoding(self.encoding)
        for name in ("dev_share", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 0 to 1")
        if (self.loco_documents is None) != (self.loco_queries is None):
            raise ValueError("--data.loco-documents and --data.loco-queries belong together")
        if self.path is not None and self.loco_queries is not None:
            raise ValueError(
                f"--data.path {self.path} and --data.loco-queries {self.loco_queries}, expected one of them"
            )
        if self.tasks and self.loco_queries is None:
            raise ValueError("--data.tasks belongs to --data.loco-queries")


class Collection(NamedTuple):
    """Documents to be searched, and queries with their answers."""

    name: str
    documents: dict[str, str]
    """Text of each document by its id, its title before it."""
    queries: dict[str, str]
    qrels: dict[str, dict[str, dict[str, int]]]
    """split -> query -> document -> grade; above 0 is relevant. Every query here has a relevant document."""


def load_collections(config: RetrievalData) -> list[Collection]:
    """Reads what the configuration names: one collection, or one for each task of LoCoV1.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, and the line in it.
    """
    if config.loco_documents is not None and config.loco_queries is not None:
        return read_loco(
            config.loco_documents,
            config.loco_queries,
            config.tasks,
            dev=config.dev_share,
            test=config.test_share,
            encoding=config.encoding,
        )
    if config.path is None:
        return [standard_library(dev=config.dev_share, test=config.test_share)]
    return [read_beir(find(config.path), dev=config.dev_share, encoding=config.encoding)]


def find(path: str) -> Path:
    """The folder of that name, or of a fetched data set of that name."""
    folder = Path(path).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w-]+", path):
        return folder
    from experiments.data import fetch

    try:
        return fetch.path(path)
    except ValueError as error:
        raise FileNotFoundError(f"--data.path {path} is no folder, and {error}") from error


def read_beir(folder: Path, *, dev: float = 0.1, encoding: str = "utf-8") -> Collection:
    """A folder in BEIR's layout, its files perhaps compressed.

    Args:
      dev: share of the training pairs that a hash takes where there is no qrels/dev.tsv.
      encoding: of the files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected corpus.jsonl, queries.jsonl and qrels/*.tsv in it")
    for name in ("corpus.jsonl", "queries.jsonl"):
        path = _perhaps_compressed(folder / name)
        if wrong := os.path.lexists(path) and what_is_wrong(path, folder):
            raise ValueError(f"{path} {wrong}")
    documents = _texts(
        folder / "corpus.jsonl", lambda row: " ".join(filter(None, (row.get("title"), row["text"]))), encoding
    )
    queries = _texts(folder / "queries.jsonl", lambda row: row["text"], encoding)
    qrels = {}
    for split in SPLITS:
        if _exists(path := _perhaps_compressed(folder / "qrels" / f"{split}.tsv"), folder):
            qrels[split] = _read_qrels(path, queries, documents)
    if not qrels:
        raise FileNotFoundError(f"no {', '.join(f'{split}.tsv' for split in SPLITS)} in {folder / 'qrels'}")
    if "train" in qrels and "dev" not in qrels:
        sides = split_pairs(qrels["train"], {"dev": dev, "train": 1 - dev})
        qrels = {"train": sides["train"], "dev": sides["dev"]} | {k: v for k, v in qrels.items() if k != "train"}
    return Collection(folder.resolve().name, documents, queries, qrels)


def records(
    path: Path, encoding: str = "utf-8", *, flag: str = "--data.encoding"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl, .csv or .parquet file, perhaps compressed, with their numbers, counted from 1.

    Args:
      encoding: of text; `flag` names it at the command line.

    Raises:
      ValueError: another kind of file, or what is in it is not of its kind.
      FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = stem_and_suffix(path)[1]
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}, expected a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
        return
    with open_text(path, str(path), encoding, newline="" if suffix == ".csv" else "\n", flag=flag) as file:
        if suffix == ".csv":
            csv.field_size_limit(1 << 30)
            head = file.readline()
            try:
                yield from enumerate(
                    csv.DictReader(itertools.chain([head], file), delimiter=delimiter_of(head)), start=1
                )
            except csv.Error as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: expected an object, not {line.strip()[:40]}")
            yield number, row


def _perhaps_compressed(path: Path) -> Path:
    """The file of this name, or of this name with a suffix of compression."""
    there = (path.with_name(path.name + suffix) for suffix in OPENERS)
    return path if os.path.lexists(path) else next((file for file in there if os.path.lexists(file)), path)


def _exists(path: Path, folder: Path) -> bool:
    """Whether there is a file in a folder of others; a link that leads out of it, or a pipe, is named and is none."""
    if not os.path.lexists(path):
        return False
    return any(file.is_file() for file in within([path], folder, functools.partial(_left_out, folder)))


def _left_out(folder: Path, message: str) -> None:
    log.warning("%s: %s; left out", folder, message)


def _texts(path: Path, text_of: Callable[[dict], str], encoding: str) -> dict[str, str]:
    """Texts by "_id"."""
    path = _perhaps_compressed(path)
    texts: dict[str, str] = {}
    for number, row in records(path, encoding):
        where = f"{path} line {number}"
        for name in ("_id", "text"):
            if name not in row:
                raise ValueError(f'{where} has no "{name}"')
        for name in ("text", "title"):
            if not isinstance(row.get(name, ""), str | (type(None) if name == "title" else str)):
                raise ValueError(f'{where}: "{name}" is {json.dumps(row[name])[:40]}, expected a string')
        _add(texts, str(row["_id"]), text_of(row), where)
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def _add(texts: dict[str, str], name: str, text: str, where: str) -> None:
    if name in texts:
        raise ValueError(f"{where}: the id {name!r} occurs twice")
    texts[name] = text


def _read_qrels(path: Path, queries: Mapping[str, str], documents: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """A table of query, document and grade; its queries that have a relevant document."""
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines_of(read_text(path, str(path))), start=1):
        if not line.strip() or (number == 1 and line.split("\t")[0] == "query-id"):
            continue
        where, fields = f"{path} line {number}", line.split("\t")
        if len(fields) != 3 or not re.fullmatch(r"\s*-?\d+(\.0*)?\s*", fields[2]):
            raise ValueError(f"{where} is {line[:60]!r}, expected query-id, corpus-id and a whole number, with tabs")
        query, document = fields[:2]
        if query not in queries:
            raise ValueError(f"{where}: there is no query {query!r} in queries.jsonl")
        if document not in documents:
            raise ValueError(f"{where}: there is no document {document!r} in corpus.jsonl")
        qrels.setdefault(query, {})[document] = int(float(fields[2]))
    answered = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not answered:
        raise ValueError(f"{path} has no query with a relevant document")
    return answered


def read_loco(
    documents: str,
    queries: str,
    tasks: Iterable[str] = (),
    *,
    dev: float = 0.1,
    test: float = 0.2,
    encoding: str = "utf-8",
) -> list[Collection]:
    """LoCoV1 or what has its columns: a collection for each task, split by a hash of the documents.

    Args:
      documents, queries: a name on the hub, a file, or a folder of files.
      tasks: only these; none is all.
      dev, test: shares of the pairs.
    """
    tasks = set(tasks)
    texts: dict[str, dict[str, str]] = {}
    for where, row in _loco_rows(documents, ("pid", "passage", "dataset"), encoding):
        _add(texts.setdefault(row["dataset"], {}), str(row["pid"]), _string(row, "passage", where), where)
    asked: dict[str, dict[str, str]] = {}
    answers: dict[str, dict[str, dict[str, int]]] = {}
    for where, row in _loco_rows(queries, ("qid", "query", "answer_pids", "dataset"), encoding):
        task, name = row["dataset"], str(row["qid"])
        _add(asked.setdefault(task, {}), name, _string(row, "query", where), where)
        pids = [row["answer_pids"]] if isinstance(row["answer_pids"], str) else list(row["answer_pids"] or ())
        for pid in map(str, pids):
            if pid not in texts.get(task, {}):
                raise ValueError(f"{where}: there is no document {pid!r} of {task} in {documents}")
        if pids:
            answers.setdefault(task, {})[name] = dict.fromkeys(map(str, pids), 1)
    if unknown := sorted(tasks - answers.keys()):
        raise ValueError(f"--data.tasks {unknown[0]} is not in {queries}; there are {', '.join(sorted(answers))}")
    shares = {"test": test, "dev": (1 - test) * dev, "train": (1 - test) * (1 - dev)}
    collections = []
    for task in sorted(tasks or answers):
        qrels = split_pairs(answers[task], shares)
        collections.append(Collection(task, texts[task], asked[task], {s: qrels[s] for s in SPLITS if qrels[s]}))
    if not collections:
        raise ValueError(f"{queries} has no query with an answer")
    return collections


def _loco_rows(source: str, columns: tuple[str, ...], encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, of the files of a folder, or of a hub data set's split "test", each with where it is from."""
    path = Path(source).expanduser()
    rows: Iterable[tuple[str, dict[str, Any]]]
    if path.exists():
        files = [path]
        if path.is_dir():
            named = sorted(file for file in path.rglob("*") if stem_and_suffix(file)[1] in SUFFIXES)
            files = [file for file in within(named, path, functools.partial(_left_out, path)) if file.is_file()]
        if not files:
            raise FileNotFoundError(f"{path} has no {', '.join(SUFFIXES)}")
        rows = ((f"{file} line {number}", row) for file in files for number, row in records(file, encoding))
    else:
        rows = _hub_rows(source)
    for where, row in rows:
        for name in columns:
            if name not in row or (row[name] is None and name != "answer_pids"):
                raise ValueError(f'{where} has no "{name}"; expected {", ".join(columns)}')
        yield where, row


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import huggingface_hub

    datasets = datasets_library()
    try:
        # One quick question first: without a network, `datasets` tries for half a minute.
        revision = huggingface_hub.HfApi().dataset_info(source, timeout=10).sha
        table = datasets.load_dataset(source, split="test", revision=revision)
    except Exception as error:  # a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{source} is neither a file or folder nor can it be loaded from the hub ({reason})"
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{source} row {number}", row


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f'{where}: "{name}" is {json.dumps(row[name])[:40]}, expected a string')
    return row[name]


def split_pairs(
    qrels: Mapping[str, dict[str, int]], shares: Mapping[str, float]
) -> dict[str, dict[str, dict[str, int]]]:
    """Splits queries by a hash, so that those with a document in common are on one side.

    Args:
      qrels: query -> document -> grade.
      shares: of each side, 1 together. They hold on average over groups of queries that share documents.

    Returns:
      side -> the part of `qrels`.
    """
    group: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (parent := group.setdefault(node, node)) != node:
            group[node] = node = group[parent]
        return node

    for query, grades in qrels.items():
        for document in grades:
            group[root(("d", document))] = root(("q", query))
    # A group is named after its least document, whatever the order of the file.
    names: dict[Hashable, str] = {}
    for query, grades in qrels.items():
        names[root(("q", query))] = min(names.get(root(("q", query)), "\U0010ffff"), *grades)
    sides: dict[str, dict[str, dict[str, int]]] = {side: {} for side in shares}
    for query, grades in qrels.items():
        sides[side_of(names[root(("q", query))], shares)][query] = grades
    return sides


def side_of(name: str, shares: Mapping[str, float]) -> str:
    """Which side of a split a name belongs to, by a hash alone."""
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="replace")).digest()[:8]) / 2**64
    for side, share in shares.items():
        if (place := place - share) < 0:
            return side
    return side


def standard_library(*, dev: float = 0.1, test: float = 0.2) -> Collection:
    """Functions of Python's standard library as documents, the first paragraphs of their docstrings as queries.

    A document is a function's code without its docstring and comments, and with `f` in place of its name. Whole files
    are on one side of the split; of equal queries or documents the first stays.

    Source: the task of CodeSearchNet (Husain et al. 2019, arXiv:1909.09436).
    """
    shares = {"test": test, "dev": (1 - test) * dev, "train": (1 - test) * (1 - dev)}
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    seen: set[str] = set()
    for file in open_source(DataConfig()).documents():
        if {"test", "tests", "idle_test"} & set(file.name.split("/")):
            continue
        for line, query, code in _functions(file.text):
            name = f"{file.name}:{line}"
            if query.lower() in seen or code in seen:
                continue
            seen |= {query.lower(), code}
            documents[name], queries[name] = code, query
            qrels[side_of(file.name, shares)][name] = {name: 1}
    return Collection("stdlib", documents, queries, {split: pairs for split, pairs in qrels.items() if pairs})


def _functions(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, first paragraph of the docstring and code of a file's functions that have three words of each."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    documented = [(node, docstring) for node in functions if (docstring := ast.get_docstring(node))]
    for inner in ast.walk(tree):  # an outer function must not spell out the docstring of an inner one
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            inner.body = inner.body[1:]
    for node, docstring in documented:
        query = " ".join(docstring.split("\n\n")[0].split())
        if len(query.split()) < 3 or not node.body:
            continue
        code = re.sub(rf"\b{re.escape(node.name)}\b", "f", ast.unparse(node))
        if len(re.findall(r"\w+", code)) >= 8:
            yield node.lineno, query, code


def overlap(collection: Collection) -> int:
    """How many documents answer queries of both train and test."""
    sides = [
        {name for grades in collection.qrels.get(split, {}).values() for name, grade in grades.items() if grade > 0}
        for split in ("train", "test")
    ]
    return len(sides[0] & sides[1])
