"""What a label is: a class, several, a number, a tag for each word, or answers; and the checks that rows stand.

Classes are the text of their label as it stands: "1", "01" and "007" are three.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.data import squad

Kind = Literal["classification", "multi-label", "regression", "tagging", "span-qa"]
Row = dict[str, Any]
# What data sets call their rows by.
ID_COLUMNS = ("id", "_id", "idx")
EXPECTED: dict[str, str] = {
    "classification": "strings or integers",
    "multi-label": "lists of strings or integers",
    "regression": "numbers",
    "tagging": "lists of tags, one for each word",
    "span-qa": "answers as SQuAD has them, {'text': [...], 'answer_start': [...]}",
}
_INTEGER = re.compile(r"\s*[-+]?\d+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)


# What stands for a number that is missing or none.
_NO_NUMBER = re.compile(r"\s*([-+]?nan|[-+]?inf(inity)?|n/?a|null|none|[-?])\s*", re.ASCII | re.IGNORECASE)


class Columns(NamedTuple):
    """Names of the columns of a table."""

    text: str
    second: str | None
    label: str


class Examples(NamedTuple):
    """One split, checked."""

    texts: list[Any]
    """Strings; for tagging, lists of words."""
    seconds: list[str] | None
    """Second texts, or contexts."""
    labels: list[Any] | None
    """str for a class, list of str for several or for tags, float for a number, dict of lists for answers. None: kept
    secret."""
    ids: list[Any] | None = None
    """What the data calls each example, in a column "id", "_id" or "idx"; None where it has none."""


class Found(NamedTuple):
    """What the labels of a column are taken for."""

    kind: Kind
    note: str = ""
    """What they could be as well, and how to say so."""


def find_kind(rows: Sequence[Row], columns: Columns, where: str, *, bare: bool, declared: Sequence[str]) -> Found:
    """What labels look like.

    Args:
      bare: whether cells are text alone, as in CSV, so that numbers are to be told by their digits.
      declared: names of classes, where the table says so.

    Raises:
      ValueError: they are of several kinds.
    """
    labels = [row[columns.label] for row in rows if row.get(columns.label) is not None]
    if labels and all(isinstance(label, list) for label in labels):
        if any(isinstance(each, dict) for label in labels for each in label):
            return Found("span-qa")
        of_words = any(isinstance(row.get(columns.text), list) for row in rows)
        return Found("tagging" if of_words or columns.label in ("tags", "ner_tags") else "multi-label")
    if labels and all(isinstance(label, dict) for label in labels):
        return Found("span-qa")
    if declared or not labels:
        return Found("classification")
    if bare:
        if all(_INTEGER.fullmatch(label) for label in labels):
            return Found("classification", _integers(labels, columns))
        others = [label for label in labels if not _NUMBER.fullmatch(label)]
        if 0 < len(others) < len(labels) and all(_NO_NUMBER.fullmatch(label) for label in others):
            raise ValueError(
                f"{where}: --data.label-column '{columns.label}' holds {len(labels) - len(others)} numbers and "
                f"{others[0]!r}; --kind regression expects numbers alone (--data.skip-bad leaves out the other rows), "
                "--kind classification takes each for a class"
            )
        return Found("classification" if others else "regression")
    if all(isinstance(label, str | int) for label in labels):
        numbers = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
        return Found("classification", _integers(labels, columns) if numbers else "")
    if all(isinstance(label, int | float) for label in labels):
        return Found("regression")
    counts = Counter(type(label).__name__ for label in labels)
    found = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    raise ValueError(f"{where}: --data.label-column '{columns.label}' holds {found}; expected labels of one kind")


def _integers(labels: Sequence[Any], columns: Columns) -> str:
    n = len({str(label) for label in labels})
    return f"the integers of '{columns.label}' are taken as {n} classes; --kind regression takes them as numbers"


def checked(
    rows: Sequence[Row],
    columns: Columns,
    kind: Kind,
    where: str,
    *,
    secret: bool,
    separator: str | None = None,
    skip: Callable[[str], None] | None = None,
) -> Examples:
    """The examples of one split.

    Args:
      secret: allows that none has a label.
      separator: what is between the labels of a string that holds several.
      skip: called with what is wrong with a row, which is left out then. None: an exception.

    Raises:
      ValueError: one line that names the row.
    """
    if not rows:
        raise ValueError(f"{where} has no rows")
    if columns.second is None and kind == "span-qa":
        raise ValueError(f"{where}: answers need --data.second-column, the text that they are in")
    missing = [i for i, row in enumerate(rows, start=1) if row.get(columns.label) is None]
    hidden = secret and len(missing) == len(rows)
    if missing and not hidden and skip is None:
        raise ValueError(
            f"{where}: {len(missing)} of {len(rows)} rows have no label in --data.label-column '{columns.label}', "
            f"first row {missing[0]}; expected one in each"
        )
    named = next((name for name in ID_COLUMNS if name in rows[0] and name not in columns), None)
    examples = Examples([], [] if columns.second else None, None if hidden else [], None if named is None else [])
    for number, row in enumerate(rows, start=1):
        try:
            text, second, label = _checked_row(row, columns, kind, hidden, separator)
        except ValueError as error:
            message = f"{where}, row {number}: {error}"
            if skip is None:
                raise ValueError(message) from error
            skip(message)
            continue
        examples.texts.append(text)
        if examples.seconds is not None:
            examples.seconds.append(second)
        if examples.labels is not None:
            examples.labels.append(label)
        if examples.ids is not None:
            examples.ids.append(row.get(str(named)))
    if not examples.texts:
        raise ValueError(f"{where}: none of {len(rows)} rows is left")
    return examples


def _checked_row(row: Row, columns: Columns, kind: Kind, hidden: bool, separator: str | None) -> tuple[Any, Any, Any]:
    text = _words(row, columns.text) if kind == "tagging" else _text(row, columns.text, "text")
    second = None if columns.second is None else _text(row, columns.second, "second")
    if hidden:
        return text, second, None
    given = row.get(columns.label)
    if given is None:
        raise ValueError(f"--data.label-column '{columns.label}' holds nothing")
    if separator is not None and isinstance(given, str):
        given = [part.strip() for part in given.split(separator) if part.strip()]
    try:
        label = _LABELS[kind](given)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--data.label-column '{columns.label}' holds {given!r:.60}; --kind {kind} expects {EXPECTED[kind]}"
        ) from error
    if kind == "tagging" and len(label) != len(text):
        raise ValueError(f"it has {len(text)} words and {len(label)} tags in '{columns.label}'")
    if kind == "span-qa":
        _check_answers(label, second or "")
    return text, second, label


def _words(row: Row, column: str) -> list[str]:
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        return value
    raise ValueError(f"--data.text-column '{column}' holds {value!r:.60}; expected a list of words")


def _text(row: Row, column: str, flag: str) -> str:
    """A string, or a number as it is written."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = "nothing" if value is None else f"{value!r:.60}"
        raise ValueError(f"--data.{flag}-column '{column}' holds {found}; expected strings")
    return str(value)


def _class(value: Any) -> str:
    if not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _classes(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return list(dict.fromkeys(_class(each) for each in value))


def _number(value: Any) -> float:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise ValueError
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise TypeError
    return float(value)


def _tags(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [_class(tag) for tag in value]


def _answers(value: Any) -> dict[str, list]:
    if isinstance(value, list):
        value = squad.lists_of(value)
    texts, starts = list(value["text"]), list(value["answer_start"])
    if len(texts) != len(starts) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return {"text": texts, "answer_start": [int(start) for start in starts]}


def _check_answers(answers: dict[str, list], context: str) -> None:
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if context[start : start + len(text)] != text:
            raise ValueError(
                f"the answer {text!r:.40} is not at answer_start {start}, where the context has "
                f"{context[start : start + len(text)]!r:.40}"
            )


_LABELS: dict[str, Callable[[Any], Any]] = {
    "classification": _class,
    "multi-label": _classes,
    "regression": _number,
    "tagging": _tags,
    "span-qa": _answers,
}


def classes_of(kind: Kind, splits: dict[str, Examples], train: str, column: str, where: str) -> tuple[str, ...]:
    """The classes that training shows, in the order of their names, or of their values; none for numbers and answers.

    Raises:
      ValueError: there is only one, or another split has more.
    """
    if kind in ("regression", "span-qa"):
        return ()

    def names(examples: Examples) -> Iterable[str]:
        labels = examples.labels or []
        return labels if kind == "classification" else (name for several in labels for name in several)

    known = set(names(splits[train]))
    numbers = all(_INTEGER.fullmatch(name) for name in known)
    classes = tuple(sorted(known, key=lambda name: (int(name), name) if numbers else (0, name)))
    if not classes:
        raise ValueError(f"{where}: --data.label-column '{column}' is empty in every row of {train}")
    if len(classes) < 2 and kind != "multi-label":
        raise ValueError(f"{where}: --data.label-column '{column}' always holds {classes[0]!r} in {train}")
    for split, examples in splits.items():
        for name in names(examples):
            if name not in known:
                raise ValueError(
                    f"{where}: the label {name!r} of {split} is never in {train}, whose --data.label-column "
                    f"'{column}' has {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
                )
    return classes
