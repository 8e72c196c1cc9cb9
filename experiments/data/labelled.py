"""Texts with labels: tables on disk, the hub, what `experiments.data` fetches, or Python's standard library.

    config -> rows of train, validation, test -> checked columns -> Labelled

What a label is follows from its column (`labels`): strings and integers are classes, lists of them several classes, or
tags where texts are lists of words, floats are numbers, dicts are the answers of SQuAD. What the user can get wrong is
one line that names the flag.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import conll, data_source, labels, snippets
from experiments.data.data_source import SPLITS
from experiments.data.inside import within
from experiments.data.labels import Columns
from experiments.data.labels import Examples as Examples
from experiments.data.labels import Kind as Kind
from experiments.data.left_out import LeftOut
from experiments.data.tables import TABLES, Reading, Row, check_delimiter, class_names, names_in, read_rows
from experiments.data.text_files import BadFile, check_encoding, stem_and_suffix
from experiments.data.tokenizers import utf8

log = logging.getLogger(__name__)

# Columns by their usual names: text, second text, label. The first line whose columns are all there is taken.
LAYOUTS: tuple[tuple[str, str | None, str], ...] = (
    ("text", None, "label"),
    ("question", "context", "answers"),
    ("words", None, "tags"),
    ("tokens", None, "ner_tags"),
    ("text", None, "score"),
    ("text", None, "labels"),
)


@dataclass(frozen=True)
class LabelledConfig:
    """Which texts and labels. Without path, hub and fetched: source code, and which package of Python it is from."""

    path: str | None = None
    """A file, or a folder with train.*, validation.* and test.*: .jsonl, .json (SQuAD's too), .csv, .tsv, .parquet, and
    for tags .conll, .iob, .bio, .conllu; .gz, .bz2, .xz or .zst may follow."""
    hub: str | None = None
    """A data set of the Hugging Face hub, NAME or NAME:CONFIG (nyu-mll/glue:mnli), or a folder laid out like one."""
    fetched: str | None = None
    """A labelled data set that `python -m experiments.data fetch` brings: 20newsgroups, r8, rotten-tomatoes, ..."""
    text_column: str | None = None
    """The text; for tags, lists of words; for answers, the question. None: "text", or another usual name."""
    second_column: str | None = None
    """The second text of a pair, or the context that answers are in. None: single texts, or "context"."""
    label_column: str | None = None
    """The label. None: "label", or another usual name. In files of CoNLL, the number of a column, or a name of CoNLL-U
    (upos, deprel); None: the last, or upos."""
    label_separator: str | None = None
    """What is between the labels of a text that has several in one cell, as in "sports|politics". None: a cell is one
    label."""
    encoding: str = "utf-8"
    """Of text files, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...)."""
    delimiter: str | None = None
    """What is between the cells of .csv and .tsv: a character, or comma, semicolon, tab. None: the one of these three
    that fits the first line of a .csv."""
    skip_bad: bool = False
    """Leave out rows that cannot be used (no text, no label, not JSON, ...), name the first and count them, instead of
    ending at the first."""
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
        check_encoding(self.encoding)
        check_delimiter(self.delimiter)
        if self.label_separator == "":
            raise ValueError("--data.label-separator '', expected at least a character")


class Labelled(NamedTuple):
    """A data set."""

    kind: Kind
    classes: tuple[str, ...]
    """Names of the classes, or of the tags, in their order. Empty for numbers and answers."""
    splits: dict[str, Examples]
    """Examples by the name of their split, those to train on first, then those to evaluate on, then others."""
    where: str
    """What the user asked for, for messages."""
    note: str = ""
    """What labels could have been taken for as well."""


class _Table(NamedTuple):
    rows: list[Row]
    names: dict[str, tuple[str, ...]]  # column -> names of its classes, where the file says so
    bare: bool = False  # whether cells are text alone


def load_labelled(config: LabelledConfig, kind: Kind | None = None) -> Labelled:
    """Reads and checks what `config` names.

    Args:
      kind: what labels are. None: what their column looks like.

    Raises:
      ValueError, FileNotFoundError: one line that names the flag, its value and what was expected.
    """
    tables, where, names = _read(config, kind)
    train, held_out = config.train_split, config.validation_split
    if train not in tables or not tables[train].rows:
        what = "is empty" if train in tables else f"is not there; there are {', '.join(tables) or 'none'}"
        raise ValueError(f"{where}: the split '{train}' to train on {what}")
    columns = _columns(config, tables[train], where)
    declared = tables[train].names.get(columns.label, ())
    note = ""
    if kind is None and config.label_separator is not None:
        kind = "multi-label"
    elif kind is None:
        rows, bare = tables[train].rows, tables[train].bare
        kind, note = labels.find_kind(rows, columns, where, bare=bare, declared=declared)
    splits = {}
    for name in dict.fromkeys((train, held_out, *config.test_splits)):
        if name in tables:
            here = f"{where}: {names.get(name, name)}"
            left_out = LeftOut(_warn(where), f"rows of {names.get(name, name)} were")
            splits[name] = labels.checked(
                tables[name].rows,
                columns,
                kind,
                here,
                secret=name not in (train, held_out),
                separator=config.label_separator,
                skip=left_out if config.skip_bad else None,
            )
            left_out.summary(len(splits[name].texts))
    if held_out not in splits:
        kept, aside = _hold_out(splits[train], config.validation_fraction, where)
        splits = {train: kept, "validation": aside} | {name: splits[name] for name in splits if name != train}
    if config.train_rows is not None:
        splits[train] = _few(splits[train], config.train_rows)
    _warn_of_duplicates(splits, where)
    return Labelled(kind, declared or labels.classes_of(kind, splits, train, columns.label, where), splits, where, note)


def _warn(where: str) -> Callable[[str], None]:
    return lambda message: log.warning("%s: %s", where, message)


def _warn_of_duplicates(splits: dict[str, Examples], where: str) -> None:
    """Says how many texts of other splits are in the first, to train on, too."""
    (train, trained), *others = ((name, _whole(examples)) for name, examples in splits.items())
    known = set(trained)
    for name, texts in others:
        again = [number for number, text in enumerate(texts, start=1) if text in known]
        if again:
            log.warning(
                "%s: %d of %d rows of %s have the text of a row of %s, row %d the first: scores count what was seen in "
                "training",
                *(where, len(again), len(texts), name, train, again[0]),
            )


def _whole(examples: Examples) -> list[str]:
    """The texts of each example, as one."""
    seconds = examples.seconds or [""] * len(examples.texts)
    return [str(texts) for texts in zip(examples.texts, seconds, strict=True)]


def _read(config: LabelledConfig, kind: Kind | None) -> tuple[dict[str, _Table], str, dict[str, str]]:
    """Tables by split; what the user asked for; and a name of each split's source."""
    if config.hub is not None:
        return _from_hub(config, config.hub), f"--data.hub {config.hub}", {}
    here = data_source.local(config)
    if here is None:
        tables = {split: _Table(rows, {}) for split, rows in snippets.standard_library().items()}
        return tables, "Python's standard library", {}
    path, where = here
    known = (*TABLES, conll.PLAIN) if kind == "tagging" else TABLES
    if path.is_file():
        return {config.train_split: _read_table(path, where, config, known)}, where, {config.train_split: path.name}
    if not path.is_dir():
        raise FileNotFoundError(f"{where} does not exist; expected a table ({', '.join(known)}) or a folder of them")
    files: dict[str, Path] = {}
    named = sorted(file for file in path.iterdir() if stem_and_suffix(file)[1] in known)
    for file in within(named, path, LeftOut(_warn(where), "files were")):
        if file.is_file():
            stem = stem_and_suffix(file)[0]
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
    tables = {split: _read_table(file, where, config, known) for split, file in files.items() if split in used}
    return tables, where, {split: file.name for split, file in files.items()}


def _read_table(path: Path, where: str, config: LabelledConfig, known: tuple[str, ...]) -> _Table:
    """The rows of a file."""
    suffix = stem_and_suffix(path)[1]
    if suffix not in known:
        raise ValueError(f"{where}: {path.name} is no table, expected one of {', '.join(known)}")
    left_out = LeftOut(_warn(where), f"rows of {path.name} were")
    how = Reading(config.encoding, check_delimiter(config.delimiter), left_out if config.skip_bad else None)
    try:
        rows = list(read_rows(path, path.name, how))
    except BadFile as error:
        raise BadFile(f"{where}: {error}") from error
    left_out.summary(len(rows))
    names = class_names(path)
    return _named(rows, names) if names else _Table(rows, {}, bare=suffix in (".csv", ".tsv"))


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
            names = {column: given for column, feature in features.items() if (given := names_in(feature))}
            tables[split] = _named(splits[split].to_list(), names)
    return tables or {split: _Table([], {}) for split in splits if split != config.train_split}


def _columns(config: LabelledConfig, table: _Table, where: str) -> Columns:
    """The columns of texts, second texts and labels."""
    there = list(dict.fromkeys(column for row in table.rows[:1000] for column in row))

    def layout(text: str, second: str | None, label: str) -> Columns:
        return Columns(config.text_column or text, config.second_column or second, config.label_column or label)

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
    return np.array([_place(text) for text in _whole(examples)])


def _take(examples: Examples, rows: np.ndarray) -> Examples:
    texts, *others = (None if column is None else [column[row] for row in rows] for column in examples)
    return Examples(texts or [], *others)


def _place(text: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(utf8(text), digest_size=6).digest(), "big") / (1 << 48)
