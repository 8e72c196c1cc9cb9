"""What a tuned encoder says of texts: a file of them in, the same rows with predictions out.

    python -m experiments.bert predict runs/finetune/tiny texts.csv out.csv       # every column, and what is predicted
    python -m experiments.bert predict FOLDER texts.jsonl out.jsonl --text-column body
    python -m experiments.bert predict FOLDER pairs.csv out.csv --text-column question --second-column answer
    python -m experiments.bert predict FOLDER texts.csv --out out.csv             # OUT as a flag
    cut -f 2 texts.tsv | python -m experiments.bert predict FOLDER -              # a text a line -> JSON lines

MODEL is a run of `finetune`, a published folder, or a name on the hub. A row of the output has what it had, so that it
can be joined with the data, and `predicted`: a class, a number, a list of tags, or an answer; `score`: its probability,
one for each word's tag, or how much likelier than no answer; and the `probabilities` of all classes by their names, in
a CSV a column p(NAME) each. Taggers take lists of words, or split strings at white space.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.data.labelled import LAYOUTS
from experiments.data.tables import Reading, check_delimiter, read_rows
from experiments.data.text_files import check_encoding, read_text, stem_and_suffix
from experiments.encoders.objectives import Target
from experiments.encoders.predictor import Predictor
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, on_mesh
from experiments.loop.row_files import STANDARD, check_out, one_out, write_rows


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, which texts, and where predictions go."""

    model: Annotated[str, flags.Positional]
    """A run of finetune, a published folder, or a name on the hub."""
    file: Annotated[str, flags.Positional]
    """Texts: .txt has one a line; .csv, .tsv, .jsonl, .json and .parquet have columns. -: standard input."""
    out: Annotated[str, flags.Positional] = STANDARD
    """.csv, .tsv or .jsonl. -: JSON lines to standard output."""
    out_file: Annotated[str | None, flags.named("out")] = None
    """The same as OUT, as a flag."""
    text_column: str | None = None
    """The column that holds the texts. None: that of the model's training, or a usual name."""
    second_column: str | None = None
    """The column of second texts, or of the contexts that answers are in. None: that of the model's training."""
    format: Literal["txt", "csv", "tsv", "jsonl"] = "txt"
    """What standard input holds."""
    encoding: str = "utf-8"
    """Of the file, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...). It may be compressed."""
    delimiter: str | None = None
    """What is between the cells of .csv and .tsv: a character, or comma, semicolon, tab. None: what fits the header."""
    probabilities: bool = True
    """Whether the probability of every class is written, or that of the predicted one alone."""
    batch_size: int = 32
    """Rows in a batch."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    max_len: int | None = None
    """Tokens of a row. None: what the model was tuned with; of a published one, what it reads, at most 512."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    overwrite: bool = False
    """Whether OUT may exist already."""

    def __post_init__(self):
        object.__setattr__(self, "out", one_out(self.out, self.out_file))
        check_encoding(self.encoding, "--encoding")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}, expected at least 1")


def read_file(config: Config) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file or of standard input, and what errors call it; a line of plain text is a row with "text".

    Raises:
      FileNotFoundError, ValueError: one line that names the file, and the row.
    """
    file, format = config.file, config.format
    if file == STANDARD:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"input.{format}"
            path.write_text(sys.stdin.read(), encoding="utf-8")
            return _rows(path, "standard input", config), "standard input"
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a file of texts")
    return _rows(Path(file), file, config), file


def is_plain(config: Config) -> bool:
    """Whether the texts have no columns: a line of the file is one."""
    return (f".{config.format}" if config.file == STANDARD else stem_and_suffix(Path(config.file))[1]) == ".txt"


def _rows(path: Path, where: str, config: Config) -> list[dict[str, Any]]:
    encoding = "utf-8" if config.file == STANDARD else config.encoding
    if not is_plain(config):
        how = Reading(encoding, check_delimiter(config.delimiter), flag="--encoding")
        return list(read_rows(path, where, how))
    # Lines end in "\n" alone: a form feed or U+2028 inside one is text.
    lines = read_text(path, where, encoding, flag="--encoding").split("\n")
    return [{"text": line} for line in (lines if lines[-1] else lines[:-1])]


def columns(rows: list[dict[str, Any]], config: Config, target: Target, where: str) -> tuple[str, str | None]:
    """The columns of texts and of second texts.

    Raises:
      ValueError: they are not there.
    """
    there = list(dict.fromkeys(name for row in rows[:1000] for name in row))
    text, second = ("text", None) if is_plain(config) else (target.text_column, target.second_column)
    text, second = config.text_column or text, config.second_column or second
    paired = target.kind == "span-qa" or target.pairs
    usual = [(first, other) for first, other, _ in LAYOUTS if not paired or other]
    if text is None:
        found = [first for first, _ in usual if first in there] or (there if len(there) == 1 else ["text"])
        text = found[0]
    if second is None and paired:
        second = next((other for first, other in usual if first == text), "second")
    if target.pairs is False and target.kind != "span-qa" and config.second_column is None:
        second = None
    for flag, name in (("text", text), ("second", second)):
        if name is not None and name not in there:
            raise ValueError(f"{where} has no column '{name}'; --{flag}-column must be one of {', '.join(there)}")
    return text, second


def predicted_rows(
    ask: Predictor, rows: list[dict[str, Any]], text: str, second: str | None, config: Config
) -> Iterable[dict[str, Any]]:
    """The rows with what is predicted of them."""
    texts = [row.get(text) for row in rows]
    seconds = None if second is None else [row.get(second) for row in rows]
    said = ask(texts, seconds, batch_size=config.batch_size, progress=True)  # type: ignore[arg-type]
    for row, one in zip(rows, said, strict=True):
        record = row | {"predicted": one.label}
        if one.score is not None:
            record["score"] = one.score
        if one.probabilities is not None and config.probabilities:
            record["probabilities"] = one.probabilities
        yield record


def main() -> int:
    """Reads texts, writes predictions."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bert predict", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        check_out(config.out, overwrite=config.overwrite)
        rows, where = read_file(config)
        ask = Predictor.from_pretrained(config.model, step=config.checkpoint, max_len=config.max_len)
        if rows:
            rows = list(predicted_rows(ask, rows, *columns(rows, config, ask.target, where), config))
        write_rows(rows, config.out)
    if config.out != STANDARD:
        print(f"{len(rows):,} predictions in {config.out}")
    return 0


if __name__ == "__main__":
    flags.run(main)
