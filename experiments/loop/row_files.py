"""Rows as JSON lines or a CSV, for one command to write and another to read: whole or not at all."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from experiments.loop.distributed import by_first

SUFFIXES = (".jsonl", ".csv", ".tsv")
# In place of a file's name: standard input or output.
STANDARD = "-"


@contextlib.contextmanager
def whole_file(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """A text file to write that takes its name when all is written: until then the old one stays, or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline=newline) as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def one_out(place: str, flag: str | None) -> str:
    """Where a command writes that takes OUT both behind what it reads and as --out.

    Args:
      place: OUT, "-" where none was given.
      flag: --out.

    Raises:
      ValueError: both were given.
    """
    if flag is None:
        return place
    if place not in (STANDARD, flag):
        raise ValueError(f"OUT {place} and --out {flag}, expected one of the two")
    return flag


def check_out(out: str, *, overwrite: bool) -> None:
    """Whether `write_rows` can write there, before the work is done.

    Raises:
      ValueError: a name of another kind, or one that is taken.
      FileNotFoundError: there is no such folder.
    """
    if out == STANDARD:
        return
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{out}, expected a name that ends in {', '.join(SUFFIXES)}, or - for standard output")
    if path.exists() and not overwrite:
        raise ValueError(f"{out} is there already; --overwrite replaces it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder")


@by_first
def write_rows(rows: Iterable[Mapping[str, Any]], out: str | Path) -> None:
    """Writes rows, by what the name ends in; "-" is JSON lines to standard output.

    In a CSV the numbers of a dict have columns of their own, `probabilities["yes"]` that of "p(yes)", and lists are
    JSON.
    """
    if str(out) == STANDARD:
        for row in rows:
            print(json_line(row), file=sys.stdout, flush=True)
        return
    path = Path(out)
    if path.suffix == ".jsonl":
        with whole_file(path) as file:
            file.writelines(json_line(row) + "\n" for row in rows)
        return
    flat = [dict(_cells(row)) for row in rows]
    with whole_file(path, newline="") as file:
        columns = dict.fromkeys(column for row in flat for column in row)
        table = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(flat)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False)


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"p({inner})", number) for inner, number in value.items())
        else:
            yield name, json_line(value) if isinstance(value, list) else value  # type: ignore[arg-type]
