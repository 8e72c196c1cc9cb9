"""Tables in files, row by row: .jsonl, .json, .csv, .tsv, .parquet, and sentences as `conll` has them.

Cells of .csv and .tsv are text as it stands, and None where they are empty; what they mean is up to who reads them.
"""

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.data import conll, squad
from experiments.data.text_files import BadFile, open_text, read_bytes, stem_and_suffix
from experiments.data.tokenizers import first_line
from zoo.published.json_files import parse_json

Row = dict[str, Any]
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *conll.SUFFIXES)
DELIMITERS = ",;\t"
NAMED_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t"}


class Reading(NamedTuple):
    """How tables are read."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    """What is between the cells of .csv and .tsv. None: the one of comma, semicolon and tab that fits the header; a tab
    in .tsv."""
    skip: Callable[[str], None] | None = None
    """Called with what is wrong with a row, which is left out then. None: an exception."""
    flag: str = "--data.encoding"
    """What names the encoding at the command line, for messages."""

    def bad(self, message: str) -> None:
        """Skips a row, or raises."""
        if self.skip is None:
            raise BadFile(message)
        self.skip(message)


def check_delimiter(delimiter: str | None) -> str | None:
    """The character that a delimiter's name stands for.

    Raises:
      ValueError: it is no single character.
    """
    found = NAMED_DELIMITERS.get(delimiter or "", delimiter)
    if found is not None and (len(found) != 1 or found in '"\r\n'):
        raise ValueError(
            f"--data.delimiter {delimiter!r}, expected a character, or one of {', '.join(list(NAMED_DELIMITERS)[:3])}"
        )
    return found


def read_rows(path: Path, name: str, how: Reading = Reading(), *, column: str | None = None) -> Iterator[Row]:
    """The rows of a table.

    Args:
      path: its format is that of its name, which a suffix of compression may follow.
      name: for messages.
      column: the only one that is wanted, where leaving out the others is cheaper.

    Raises:
      BadFile: it cannot be read; what is wrong is said with the line.
    """
    suffix = stem_and_suffix(path)[1]
    if suffix == ".parquet":
        yield from _parquet_rows(path, name, column)
        return
    try:
        newline = "" if suffix in (".csv", ".tsv") else "\n"
        with open_text(path, name, how.encoding, newline=newline, flag=how.flag) as file:
            if suffix in (".csv", ".tsv"):
                yield from _csv_rows(file, name, suffix, how)
            elif suffix in (".json", ".jsonl"):
                yield from _json_rows(file, name, how)
            else:
                yield from conll.read_sentences(file, name, how.bad, named=suffix == ".conllu")
    except csv.Error as error:
        raise BadFile(f"{name} cannot be read as {suffix[1:]} ({first_line(error)})") from error


def delimiter_of(sample: str) -> str:
    """Comma, semicolon or tab: what cuts the first row of a table into the most cells.

    The header is asked alone, unlike `csv.Sniffer` does it: texts below it hold any of them, any number of times.
    """

    def cells(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=cells)


def _csv_rows(file: IO[str], name: str, suffix: str, how: Reading) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    head = file.readline()
    delimiter = how.delimiter or ("\t" if suffix == ".tsv" else delimiter_of(head))

    def lines() -> Iterator[str]:
        yield head
        yield from file

    table = csv.DictReader(lines(), delimiter=delimiter)
    for row in table:
        more = row.pop(None, [])  # type: ignore[call-overload]
        if any(more):
            n_columns = len(table.fieldnames or ())
            how.bad(
                f"line {table.line_num} of {name} has {n_columns + len(more)} cells, expected at most the "
                f"{n_columns} of the first line; text that holds {delimiter!r} needs quotes"
            )
        else:
            yield {column: cell or None for column, cell in row.items()}


def _json_rows(file: Iterable[str], name: str, how: Reading) -> Iterator[Row]:
    """Objects, one a line; or a list of them; or one object that holds a table."""
    count = 0
    for record in _records(file, name, how):
        for row in record if isinstance(record, list) else [record]:
            count += 1
            if isinstance(row, dict):
                yield row
            else:
                how.bad(f"row {count} of {name} holds {row!r:.40}, expected an object of columns")


def _records(file: Iterable[str], name: str, how: Reading) -> Iterator[Any]:
    """What the lines of a file of JSON hold; or what they hold together, where the first is no record of its own."""
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    head = list(itertools.islice(lines, 2))
    whole = len(head) == 1 or (head and head[0][1].lstrip().startswith("["))
    if not whole and head and not _is_json(head[0][1]):
        head += lines  # one object over many lines, or a first line that is wrong
        whole = _is_json("".join(line for _, line in head))
    if whole:
        content = "".join(line for _, line in itertools.chain(head, lines))
        try:
            value = parse_json(content)
        except ValueError as error:
            where = f"line {head[0][0]} of {name}" if content.count("\n") <= 1 else name
            how.bad(f"{where} is not JSON ({error})")
            return
        try:
            yield from _unpacked(value)
        except ValueError as error:
            raise BadFile(f"{name} is not JSON as SQuAD has it: {error}") from error
        return
    for number, line in itertools.chain(head, lines):
        try:
            record = parse_json(line)
        except ValueError as error:
            how.bad(f"line {number} of {name} is not JSON ({error})")
        else:
            yield record


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _unpacked(content: Any) -> list[Any]:
    """The rows of a file that is one value: a list, SQuAD's articles or rows under "data", or one row."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        rows = content.get("data")
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return list(squad.questions(rows)) if squad.is_squad(rows) else rows
    return [content]


def _parquet_rows(path: Path, name: str, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = io.BytesIO(read_bytes(path, name)) if path.suffix != ".parquet" else path
        file = pyarrow.parquet.ParquetFile(source)
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(f"{name} cannot be read as parquet ({first_line(error)})") from error


def class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Column -> names of its integers, where a Parquet file says so as the library `datasets` does."""
    if path.suffix != ".parquet":
        return {}
    import pyarrow.parquet

    said = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface")
    try:
        features = parse_json(said)["info"]["features"] if said else {}
        return {column: names for column, feature in features.items() if (names := names_in(feature))}
    except (ValueError, KeyError, TypeError, AttributeError):  # it is not as the library writes it
        return {}


def names_in(feature: Any) -> tuple[str, ...]:
    """Names that the hub's description of a column, or of the lists in it, gives its integers."""
    while isinstance(feature, dict) and "names" not in feature and "feature" in feature:
        feature = feature["feature"]
    if isinstance(feature, list) and feature:
        return names_in(feature[0])
    return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()
