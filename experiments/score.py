"""How likely a causal language model finds texts: perplexity a token, and bits a token and a byte.

    python -m experiments.score runs/causal_lm/tiny text.txt                        # the whole file is one document
    python -m experiments.score runs/causal_lm/tiny lines.txt --lines --out scores.jsonl
    python -m experiments.score state-spaces/mamba-130m documents.jsonl --text-column body
    cat text.txt | python -m experiments.score runs/causal_lm/tiny -

MODEL is a run, a published folder, or a name on the hub. Documents may have any length: the state is carried through
each, so that every token is guessed from all before it; a model with an m2 reads in windows as long as its filters, and
says how many. A run's documents begin with its end-of-text token, and a published model's with what its tokenizer puts
there, so that all their tokens are guessed; where it puts nothing, the first is not, unless --begin True says so. Bytes
are those of the tokens that are guessed.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from experiments.causal.load import load_published
from experiments.causal.scoring import Score, score_texts
from experiments.causal.text_ends import published_ends, run_ends
from experiments.causal_lm import Config as TrainingConfig
from experiments.causal_lm import load_run
from experiments.data.tables import TABLES, Reading, read_rows
from experiments.data.text_files import check_encoding, read_text, stem_and_suffix
from experiments.data.tokenizers import Tokenizer, utf8
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, on_mesh
from experiments.loop.row_files import STANDARD, check_out, write_rows
from zoo.published.run_folder import is_run

_TEXT = "text"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, and which texts."""

    model: Annotated[str, flags.Positional]
    """A run of causal_lm, a published folder, or a name on the hub."""
    file: Annotated[str, flags.Positional]
    """Texts: .jsonl, .json, .csv, .tsv and .parquet have a column of them; any other file is one. -: standard input."""
    out: str | None = None
    """A row for each document goes there: .jsonl, .csv or .tsv; -: JSON lines to standard output."""
    lines: bool = False
    """Whether each line of a plain text is a document; empty ones are none."""
    encoding: str = "utf-8"
    """Of the file, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...). It may be compressed."""
    text_column: str | None = None
    """The column that holds the texts. None: "text", or that of the run's training where it is there."""
    begin: bool | None = None
    """Whether what opens a text, or else the end-of-text token, stands before each document. None: of a run yes, of a
    published model where its tokenizer puts something there."""
    window: int | None = None
    """Read documents in windows of so many tokens, each by itself. None: as long as the model reads."""
    batch_size: int = 8
    """Documents that are read at the same time."""
    tokenizer: str | None = None
    """Of a published model: "bytes", a tokenizer.json or its folder, or a name on the hub. None: that of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of a published model: dtype of parameters and computation. None: as stored."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    overwrite: bool = False
    """Whether OUT may exist already."""

    def __post_init__(self):
        check_encoding(self.encoding, "--encoding")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}, expected at least 1")


def read_documents(config: Config) -> tuple[list[dict[str, Any]], str]:
    """Rows of the documents, and the column of their texts.

    Raises:
      FileNotFoundError, ValueError: one line that names the file and the row.
    """
    path = Path(config.file)
    if config.file != STANDARD and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file of texts")
    if config.file != STANDARD and stem_and_suffix(path)[1] in TABLES:
        rows = list(read_rows(path, config.file, Reading(config.encoding, flag="--encoding")))
        column = config.text_column or _trained_column(Path(config.model), rows) or _TEXT
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(column), str):
                there = ", ".join(map(str, row))
                raise ValueError(f"{path} row {number} has no text in {column!r}; --text-column may be one of {there}")
        return rows, column
    if config.file == STANDARD:
        raw = sys.stdin.read()
    else:
        raw = read_text(path, config.file, config.encoding, flag="--encoding")
    documents = [line for line in raw.split("\n") if line.strip()] if config.lines else [raw]
    return [{_TEXT: text} for text in documents], _TEXT


def _trained_column(folder: Path, rows: list[dict[str, Any]]) -> str | None:
    """The column that a run was trained on, where these rows have it."""
    if not is_run(folder):
        return None
    try:
        column = flags.load_config(TrainingConfig, folder / "config.json").data.text_column
    except (ValueError, FileNotFoundError):  # of another kind, which loading the model says
        return None
    return column if rows and column in rows[0] else None


def load(config: Config) -> tuple[Any, Tokenizer, tuple[int, ...]]:
    """The model, its tokenizer, and the ids that stand before each document."""
    if is_run(Path(config.model)):
        for name in ("tokenizer", "dtype"):
            if getattr(config, name) is not None:
                raise ValueError(f"--{name} belongs to a published model; a run has its own")
        model, tokenizer, *_ = load_run(config.model, step=config.checkpoint)
        return model, tokenizer, () if config.begin is False else run_ends(tokenizer).opening
    model, tokenizer, folder, _ = load_published(config.model, tokenizer=config.tokenizer, dtype=config.dtype)
    opening = published_ends(folder, tokenizer, model.config.vocab_size).opening
    return model, tokenizer, () if config.begin is False else opening or (tokenizer.eot,) * bool(config.begin)


def describe(score: Score, n_bytes: int) -> dict[str, Any]:
    """A score in the units people compare."""
    return {
        "tokens": score.tokens,
        "bytes": n_bytes,
        "nats": score.nats,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits(score.tokens),
        "bits_per_byte": score.bits(n_bytes),
        "windows": score.windows,
    }


def main() -> int:
    """Reads documents, says how likely they are."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.score", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        if config.out is not None:
            check_out(config.out, overwrite=config.overwrite)
        rows, column = read_documents(config)
        model, tokenizer, opening = load(config)
        texts = [row[column] for row in rows]
        encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(texts)]
        n_bytes = [len(utf8(text)) for text in texts]
        if opening:
            encoded = [np.concatenate([opening, ids]).astype(np.int32) for ids in encoded]
        else:
            n_bytes = [
                n - len(utf8(tokenizer.decode(ids[:1].tolist()))) for n, ids in zip(n_bytes, encoded, strict=True)
            ]
        scores = score_texts(model, encoded, batch_size=config.batch_size, window=config.window, progress=True)
        if config.out is not None:
            others = [{name: value for name, value in row.items() if name != column} for row in rows]
            records = [
                {"document": i, **other, **describe(score, n)}
                for i, (other, score, n) in enumerate(zip(others, scores, n_bytes, strict=True))
            ]
            write_rows(records, config.out)
    total = Score(sum(s.tokens for s in scores), sum(s.nats for s in scores), sum(s.windows for s in scores))
    said = describe(total, sum(n_bytes))
    how = "the state carried through each" if total.windows <= len(scores) else f"in {total.windows:,} windows"
    units = {
        "perplexity": "perplexity {:.4g}",
        "bits_per_token": "{:.4f} bits/token",
        "bits_per_byte": "{:.4f} bits/byte",
    }
    numbers = ", ".join(text.format(said[name]) for name, text in units.items() if said[name] is not None)
    line = f"{len(scores):,} documents of {total.tokens:,} tokens, {how}: {numbers or 'nothing to guess'}"
    print(line, file=sys.stderr if config.out == STANDARD else sys.stdout)
    return 0


if __name__ == "__main__":
    flags.run(main)
