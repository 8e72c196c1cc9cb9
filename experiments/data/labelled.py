"""Texts with labels: tables on disk, the hub, what `experiments.data` fetches, or Python's standard library.

    config -> rows of train, validation, test -> checked columns -> Labelled

What a label is follows from its column: strings and integers are classes, floats are numbers, lists are tags of words,
dicts are the answers of SQuAD. What the user can get wrong is one line that names the flag.
"""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.data import data_source
from experiments.data.data_source import SPLITS
from experiments.data.tokenizers import first_line, utf8

Kind = Literal["classification", "regression", "tagging", "span-qa"]
Row = dict[str, Any]

# Columns by their usual names: text, second text, label. The first line whose columns are all there is taken.
LAYOUTS: tuple[tuple[str, str | None, str], ...] = (
    ("text", None, "label"),
    ("question", "context", "answers"),
    ("words", None, "tags"),
    ("tokens", None, "ner_tags"),
    ("text", None, "score"),
)
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# What data sets call their rows by.
ID_COLUMNS = ("id", "_id", "idx")
EXPECTED: dict[str, str] = {
    "classification": "strings or integers",
    "regression": "numbers",
    "tagging": "lists of tags, one for each word",
    "span-qa": "answers as SQuAD has them, {'text': [...], 'answer_start': [...]}",
}


@dataclass(frozen=True)
class LabelledConfig:
    """Which texts and labels. Without path, hub and fetched: source code, and which package of Python it is from."""

    path: str | None = None
    """A file (.jsonl, .json, .csv, .tsv, .parquet), or a folder with train.*, validation.* and test.*."""
    hub: str | None = None
    """A data set of the Hugging Face hub, NAME or NAME:CONFIG (nyu-mll/glue:mnli), or a folder laid out like one."""
    fetched: str | None = None
    """A labelled data set that `python -m experiments.data fetch` brings: 20newsgroups, r8, rotten-tomatoes, ..."""
    text_column: str | None = None
    """The text; for tags, lists of words; for answers, the question. None: "text", or another usual name."""
    second_column: str | None = None
    """The second text of a pair, or the context that answers are in. None: single texts, or "context"."""
    label_column: str | None = None
    """The label. None: "label", or another usual name."""
    train_split: str = "train"
    """The hub's name of the rows to train on."""
    validation_split: str = "validation"
    """The hub's name of the rows to evaluate on."""
    test_splits: tuple[str, ...] = ("test",)
    """More rows to evaluate on at the end, those of these that there are."""
    validation_fraction: float = 0.1
    """Share of the training rows that is held out, chosen by a hash of the text, where there is no validation split."""
    train_rows: int | None = None
    """Train on so many rows only, chosen by a hash of the text. None: all."""
    tokenizer: str = "wordpiece"
    """wordpiece (uncased) or bpe, trained on the training texts; bytes; a tokenizer.json, or a folder or hub repository
    that holds one. With --init: that model's."""
    vocab_size: int = 8192
    """At most this many ids in a tokenizer that is trained here."""

    def __post_init__(self):
        data_source.check(self, "train_rows")


class Examples(NamedTuple):
    """One split, checked."""

    texts: list[Any]
    """Strings; for tagging, lists of words."""
    seconds: list[str] | None
    """Second texts, or contexts."""
    labels: list[Any] | None
    """str for a class, float for a number, list of str for tags, dict of lists for answers. None: kept secret."""
    ids: list[Any] | None = None
    """What the data calls each example, in a column "id", "_id" or "idx"; None where it has none."""


class Labelled(NamedTuple):
    """A data set."""

    kind: Kind
    classes: tuple[str, ...]
    """Names of the classes, or of the tags, in their order. Empty for numbers and answers."""
    splits: dict[str, Examples]
    """Examples by the name of their split, those to train on first, then those to evaluate on, then others."""
    where: str
    """What the user asked for, for messages."""


class _Table(NamedTuple):
    rows: list[Row]
    names: dict[str, tuple[str, ...]]  # column -> names of its classes, where the file says so


def load_labelled(config: LabelledConfig, kind: Kind | None = None) -> Labelled:
    """Reads and checks what `config` names.

    Args:
      kind: what labels are. None: what their column looks like.

    Raises:
      ValueError, FileNotFoundError: one line that names the flag, its value and what was expected.
    """
    tables, where, names = _read(config)
    train, held_out = config.train_split, config.validation_split
    if train not in tables or not tables[train].rows:
        what = "is empty" if train in tables else f"is not there; there are {', '.join(tables) or 'none'}"
        raise ValueError(f"{where}: the split '{train}' to train on {what}")
    columns = _columns(config, tables[train], where)
    declared = tables[train].names.get(columns[2], ())
    kind = kind or _kind(tables[train].rows, columns[2], where, declared)
    splits = {
        name: _checked(
            tables[name], columns, kind, f"{where}: {names.get(name, name)}", secret=name not in (train, held_out)
        )
        for name in dict.fromkeys((train, held_out, *config.test_splits))
        if name in tables
    }
    if held_out not in splits:
        kept, aside = _hold_out(splits[train], config.validation_fraction, where)
        splits = {train: kept, "validation": aside} | {name: splits[name] for name in splits if name != train}
    if config.train_rows is not None:
        splits[train] = _few(splits[train], config.train_rows)
    return Labelled(kind, declared or _classes(kind, splits, train, columns[2], where), splits, where)


def _read(config: LabelledConfig) -> tuple[dict[str, _Table], str, dict[str, str]]:
    """Tables by split; what the user asked for; and a name of each split's source."""
    if config.hub is not None:
        return _from_hub(config, config.hub), f"--data.hub {config.hub}", {}
    here = data_source.local(config)
    if here is None:
        return standard_library(), "Python's standard library", {}
    path, where = here
    if path.is_file():
        return {config.train_split: _read_table(path, where)}, where, {config.train_split: path.name}
    if not path.is_dir():
        raise FileNotFoundError(f"{where} does not exist; expected a table ({', '.join(_TABLES)}) or a folder of them")
    files: dict[str, Path] = {}
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        stem, suffix = _stem(file)
        if suffix in _TABLES:
            split = SPLITS.get(re.split(r"[-.]", stem)[0], stem)  # train-00000-of-00001 is train
            if split in files:
                raise ValueError(f"{where}: both {files[split].name} and {file.name} are {split}, expected one file")
            files[split] = file
    given = {"train": config.train_split, "validation": config.validation_split}
    files = {given.get(split, split): file for split, file in files.items()}
    if config.train_split not in files and len(files) == 1:
        files = {config.train_split: next(iter(files.values()))}
    if config.train_split not in files:
        raise ValueError(f"{where} has no train.jsonl, .csv, .parquet; tables there: {', '.join(files) or 'none'}")
    used = {config.train_split, config.validation_split, *config.test_splits}
    tables = {split: _read_table(file, where) for split, file in files.items() if split in used}
    return tables, where, {split: file.name for split, file in files.items()}


def _stem(path: Path) -> tuple[str, str]:
    """Name and format of a file that may be compressed: ("train", ".csv") of train.csv.gz."""
    inner = Path(path.stem) if path.suffix in _OPEN else path
    return inner.stem, inner.suffix


def read_rows(path: Path, where: str) -> list[Row]:
    """The rows of a table as they are, without labels: the cells of a CSV stay strings.

    Args:
      path: a file (.jsonl, .json, .csv, .tsv, .parquet), perhaps compressed.
      where: what errors call it.

    Raises:
      ValueError: one line that names the file and the line.
    """
    rows = _read_table(path, where, typed=False).rows
    return [{name: cell for name, cell in row.items() if name is not None} for row in rows]


def _read_table(path: Path, where: str, *, typed: bool = True) -> _Table:
    """The rows of a file; typed, columns of numbers in a CSV are such."""
    suffix = _stem(path)[1]
    if suffix not in _TABLES:
        raise ValueError(f"{where}: {path.name} is no table, expected one of {', '.join(_TABLES)}")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                csv.field_size_limit(1 << 30)
                table = csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t")
                return _Table(_typed(list(table)) if typed else list(table), {})
            content = file.read()
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError) as error:
        raise ValueError(f"{where}: {path.name} cannot be read as {suffix[1:]} ({first_line(error)})") from error
    rows: list[Row] = []
    records = [content] if content.lstrip().startswith("[") else content.split("\n")
    for number, record in enumerate(records, start=1):
        try:
            parsed = json.loads(record) if record.strip() else []
        except ValueError as error:
            at = f"line {number} of {path.name}" if len(records) > 1 else path.name
            raise ValueError(f"{where}: {at} is not JSON ({error})") from error
        rows += parsed if isinstance(parsed, list) else [parsed]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: row {number} of {path.name} holds {row!r:.40}, expected an object of columns")
    return _Table(rows, {})


def _typed(rows: list[dict[str, str | None]]) -> list[Row]:
    """The rows of a CSV with columns of integers or floats as such; empty cells are missing."""

    def convert(column: str) -> Callable[[str], Any]:
        cells = [cell for row in rows if (cell := row[column])]
        for kind in (int, float):
            try:
                for cell in cells:
                    kind(cell)
            except ValueError:
                continue
            return kind
        return str

    kinds = {column: convert(column) for column in (rows[0] if rows else ()) if column is not None}
    return [{name: kind(cell) if (cell := row[name]) else None for name, kind in kinds.items()} for row in rows]


def _read_parquet(path: Path) -> _Table:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    names = {}
    for key, value in (table.schema.metadata or {}).items():
        if key == b"huggingface":
            features = json.loads(value).get("info", {}).get("features", {})
            names = {column: _class_names(feature) for column, feature in features.items()}
    return _named(table.to_pylist(), {column: given for column, given in names.items() if given})


def _class_names(feature: Any) -> tuple[str, ...]:
    """Names that the hub's description of a column, or of the lists in it, gives its integers."""
    while isinstance(feature, dict) and "names" not in feature and "feature" in feature:
        feature = feature["feature"]
    if isinstance(feature, list) and feature:
        return _class_names(feature[0])
    return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()


def _named(rows: list[Row], names: dict[str, tuple[str, ...]]) -> _Table:
    """Puts names in place of integers; -1, which stands for a label that is kept secret, is missing."""

    def name(value: Any, given: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [name(each, given) for each in value]
        return given[value] if isinstance(value, int) and 0 <= value < len(given) else None

    named = [row | {column: name(row[column], given) for column, given in names.items()} for row in rows]
    return _Table(named, names)


def _from_hub(config: LabelledConfig, spec: str) -> dict[str, _Table]:
    splits = data_source.load_hub(spec)
    tables = {}
    for split in (config.train_split, config.validation_split, *config.test_splits):
        if split in splits:
            features = json.loads(json.dumps(splits[split].features.to_dict()))
            names = {column: given for column, feature in features.items() if (given := _class_names(feature))}
            tables[split] = _named(splits[split].to_list(), names)
    return tables or {split: _Table([], {}) for split in splits if split != config.train_split}


Columns = tuple[str, str | None, str]


def _columns(config: LabelledConfig, table: _Table, where: str) -> Columns:
    """The columns of texts, second texts and labels."""
    there = list(dict.fromkeys(column for row in table.rows[:1000] for column in row))

    def layout(text: str, second: str | None, label: str) -> Columns:
        return config.text_column or text, config.second_column or second, config.label_column or label

    layouts = [layout(*columns) for columns in LAYOUTS]
    chosen = next((c for c in layouts if all(name is None or name in there for name in c)), layouts[0])
    for flag, column in zip(("text", "second", "label"), chosen, strict=True):
        if column is not None and column not in there:
            raise ValueError(
                f"{where} has no column '{column}'; --data.{flag}-column must be one of {', '.join(map(str, there))}"
            )
    return chosen


def _hold_out(examples: Examples, fraction: float, where: str) -> tuple[Examples, Examples]:
    """Examples to train on, and about a `fraction` that is held out; equal texts are on one side."""
    places = _places(examples)
    cut = np.unique(places)[max(1, round(fraction * len(np.unique(places)))) - 1]
    if cut == places.max():
        raise ValueError(f"{where}: {len(places)} rows, too few different ones to hold some out; add validation.*")
    return _take(examples, np.flatnonzero(places > cut)), _take(examples, np.flatnonzero(places <= cut))


def _few(examples: Examples, n: int) -> Examples:
    """The first n examples in the order of their hashes; more are these and others."""
    return _take(examples, np.argsort(_places(examples), kind="stable")[:n])


def _places(examples: Examples) -> np.ndarray:
    seconds = examples.seconds or [""] * len(examples.texts)
    return np.array([_place(str(texts)) for texts in zip(examples.texts, seconds, strict=True)])


def _take(examples: Examples, rows: np.ndarray) -> Examples:
    texts, *others = (None if column is None else [column[row] for row in rows] for column in examples)
    return Examples(texts or [], *others)


def _place(text: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(utf8(text), digest_size=6).digest(), "big") / (1 << 48)


def _kind(rows: Sequence[Row], column: str, where: str, declared: Sequence[str]) -> Kind:
    labels = [row.get(column) for row in rows if row.get(column) is not None]
    if all(isinstance(label, list) for label in labels) and labels:
        return "tagging"
    if all(isinstance(label, dict) for label in labels) and labels:
        return "span-qa"
    if declared or all(isinstance(label, str | int) for label in labels):
        return "classification"
    if all(isinstance(label, int | float) for label in labels):
        return "regression"
    counts = Counter(type(label).__name__ for label in labels)
    found = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    raise ValueError(f"{where}: --data.label-column '{column}' holds {found}; expected labels of one kind")


def _checked(table: _Table, columns: Columns, kind: Kind, where: str, *, secret: bool) -> Examples:
    """The examples of one split; `secret` allows that none has a label."""
    rows, (text, second, label) = table.rows, columns
    if not rows:
        raise ValueError(f"{where} has no rows")
    texts = [_checked_text(row, text, kind, f"{where}, row {i}", "text") for i, row in enumerate(rows, start=1)]
    seconds = None
    if second is not None:
        seconds = [
            _checked_text(row, second, "classification", f"{where}, row {i}", "second")
            for i, row in enumerate(rows, start=1)
        ]
    elif kind == "span-qa":
        raise ValueError(f"{where}: answers need --data.second-column, the text that they are in")
    name = next((name for name in ID_COLUMNS if name in rows[0] and name not in columns), None)
    ids = None if name is None else [row.get(name) for row in rows]
    missing = [i for i, row in enumerate(rows, start=1) if row.get(label) is None]
    if secret and len(missing) == len(rows):
        return Examples(texts, seconds, None, ids)
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {len(rows)} rows have no label in --data.label-column '{label}', first row "
            f"{missing[0]}; expected one in each"
        )
    labels = []
    for i, row in enumerate(rows, start=1):
        try:
            labels.append(_LABELS[kind](row[label]))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{where}: --data.label-column '{label}' holds {row[label]!r:.60} in row {i}; --kind {kind} expects "
                f"{EXPECTED[kind]}"
            ) from error
        if kind == "tagging" and len(labels[-1]) != len(texts[i - 1]):
            raise ValueError(f"{where}: row {i} has {len(texts[i - 1])} words and {len(labels[-1])} tags in '{label}'")
        if kind == "span-qa" and seconds is not None:
            _check_answers(labels[-1], seconds[i - 1], f"{where}, row {i}")
    return Examples(texts, seconds, labels, ids)


def _checked_text(row: Row, column: str, kind: Kind, where: str, flag: str) -> Any:
    value = row.get(column)
    if kind == "tagging":
        if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
            return value
        raise ValueError(f"{where}: --data.{flag}-column '{column}' holds {value!r:.60}; expected a list of words")
    if not isinstance(value, str):
        found = "nothing" if value is None else f"{value!r:.60}"
        raise ValueError(f"{where}: --data.{flag}-column '{column}' holds {found}; expected strings")
    return value


def _class_label(value: Any) -> str:
    if not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _number_label(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise TypeError
    return float(value)


def _tags_label(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [_class_label(tag) for tag in value]


def _answers_label(value: Any) -> dict[str, list]:
    texts, starts = list(value["text"]), list(value["answer_start"])
    if len(texts) != len(starts) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return {"text": texts, "answer_start": [int(start) for start in starts]}


def _check_answers(answers: dict[str, list], context: str, where: str) -> None:
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if context[start : start + len(text)] != text:
            raise ValueError(
                f"{where}: the answer {text!r:.40} is not at answer_start {start}, where the context has "
                f"{context[start : start + len(text)]!r:.40}"
            )


_LABELS: dict[str, Callable[[Any], Any]] = {
    "classification": _class_label,
    "regression": _number_label,
    "tagging": _tags_label,
    "span-qa": _answers_label,
}


def _classes(kind: Kind, splits: dict[str, Examples], train: str, column: str, where: str) -> tuple[str, ...]:
    """The classes that training shows, in the order of their names, or of their values."""
    if kind not in ("classification", "tagging"):
        return ()

    def names(examples: Examples) -> Iterable[str]:
        labels = examples.labels or []
        return (tag for tags in labels for tag in tags) if kind == "tagging" else labels

    known = set(names(splits[train]))
    numbers = all(re.fullmatch(r"-?\d+", name) for name in known)
    classes = tuple(sorted(known, key=int if numbers else str))
    if len(classes) < 2:
        raise ValueError(f"{where}: --data.label-column '{column}' always holds {classes[0]!r} in {train}")
    for split, examples in splits.items():
        for name in names(examples):
            if name not in known:
                raise ValueError(
                    f"{where}: the label {name!r} of {split} is never in {train}, whose --data.label-column "
                    f"'{column}' has {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
                )
    return classes


# Ten packages of the standard library that have files enough to hold some out.
PACKAGES: tuple[str, ...] = ("asyncio", "email", "http", "idlelib", "importlib")
PACKAGES += ("multiprocessing", "tkinter", "unittest", "urllib", "xml")
# Lines of a snippet.
LINES = 30


def standard_library() -> dict[str, _Table]:
    """Snippets of some thirty lines with the package that they are from, each file on one side of the split.

    Lines that import are left out, and the packages' own names, which would give it away.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)
    tables: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for package in PACKAGES:
        files = [
            file
            for file in sorted((root / package).rglob("*.py"))
            if not {"test", "tests", "idle_test", "__pycache__"} & set(file.relative_to(root).parts)
        ]
        files = [file for file in files if file.stat().st_size > 1000]
        files.sort(key=lambda file: (-file.stat().st_size, file.relative_to(root).as_posix()))
        for number, file in enumerate(files):
            split = ("train", "train", "test", "train", "validation")[number % 5]
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [line for line in lines if line.strip() and not re.match(r"\s*(import|from)\b", line)]
            for start in range(0, len(lines), LINES):
                snippet = lines[start : start + LINES]
                if len(snippet) >= LINES // 3:
                    tables[split].append({"text": names.sub("", "\n".join(snippet)), "label": package})
    return {split: _Table(rows, {}) for split, rows in tables.items()}
