"""Texts as vectors: a file of them by one command, a list of them by one function.

    python -m experiments.bert embed runs/retrieve/tiny texts.txt vectors.npy         # a text a line -> (n, d) float32
    python -m experiments.bert embed runs/retrieve/tiny corpus.jsonl vectors.parquet  # columns id, text, vector
    python -m experiments.bert embed MODEL texts.csv out.npy --text-column body --pool mean --normalize

MODEL is a run (`pretrain`, `finetune`, `retrieve`), a published folder, or a name on the hub. Texts are sorted by
length, so that short ones cost little, and come out in the file's order. M2-BERT's published retrieval models want
their rows filled up to the full length; they get that. What a folder of sentence-transformers says counts: its pooling,
the Dense and Normalize modules behind it, the longest text, and its prompts, of which --prompt-name takes another.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

import zoo
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.text_files import check_encoding, read_text, stem_and_suffix
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.encoder_inputs import Encoded, Texts, encode
from experiments.encoders.lengths import longest
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, current_mesh, gathered, on_mesh, placed, row_groups, spread_whole
from experiments.retrieval.beir import records
from experiments.retrieval.embedder import as_embedder, load_embedder
from experiments.retrieval.sentence_modules import SentenceModules, normalized
from zoo.layers.pooling import Pool

# Longest text, in tokens, for models that read any length.
DEFAULT_LENGTH = 512
ID_COLUMNS = ("_id", "id")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, which texts, and where the vectors go."""

    model: Annotated[str, flags.Positional]
    """A run's folder, a published folder, or a name on the hub."""
    file: Annotated[str, flags.Positional]
    """Texts: .txt has one a line; .jsonl, .csv and .parquet have a column of them; .gz, .bz2, .xz or .zst may
    follow."""
    out: Annotated[str, flags.Positional]
    """.npy for the vectors alone, .parquet for ids, texts and vectors."""
    text_column: str = "text"
    """The column that holds the texts."""
    encoding: str = "utf-8"
    """Of the file, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...)."""
    pool: Pool | None = None
    """What of a row becomes its vector. None: what the model was trained with, or the mean. An encoder without a head
    (a BERT, a ModernBERT) was trained with none, so that its vectors are means."""
    normalize: bool = False
    """Whether vectors are scaled to length 1, so that dot products are cosines. Models with a Normalize module do so
    unasked."""
    prompt: str | None = None
    """Stands before each text, "query: " for example. None: the folder's default prompt, or nothing."""
    prompt_name: str | None = None
    """Takes the prompt of this name that the folder has, instead."""
    max_len: int | None = None
    """Most tokens of a text, the rest is cut. None: what the model's folder says and the model reads, or 512 where it
    reads any length."""
    batch_tokens: int = 16384
    """Positions in a batch, padding included."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    overwrite: bool = False
    """Whether OUT may exist already."""

    def __post_init__(self):
        check_encoding(self.encoding, "--encoding")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens}, expected at least 1")
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError(
                f"--prompt {self.prompt!r} and --prompt-name {self.prompt_name} exclude each other; give one"
            )


def embed_texts(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pool: Pool | None = None,
    normalize: bool = False,
    max_len: int | None = None,
    batch_tokens: int = 16384,
    progress: bool = False,
    prompt: str | None = None,
    modules: SentenceModules | None = None,
) -> Float[np.ndarray, "n d"]:
    """The vectors of texts, in their order, float32.

        model, tokenizer, _ = load_encoder("runs/retrieve/tiny")
        embed_texts(model, tokenizer, ["a text", "another"], normalize=True)

    Args:
      model: an encoder; without a pooling of its own, the mean of its positions is taken.
      tokenizer: the model's.
      texts: the texts.
      pool: another pooling than the model's.
      normalize: whether vectors have length 1.
      max_len: most tokens of a text, [CLS] and [SEP] included. None: what the modules, the tokenizer and the model say,
        or 512.
      batch_tokens: positions in a batch.
      progress: whether to show a bar on stderr, where that is a terminal.
      prompt: stands before each text. None: the modules' default prompt.
      modules: what a folder of sentence-transformers says, see `read_modules`. None: nothing.

    Raises:
      ValueError: max_len is more than the model reads.
    """
    modules = SentenceModules() if modules is None else modules
    model, reach = as_embedder(model, pool), longest(model.config)
    if max_len is not None and reach is not None and max_len > reach:
        raise ValueError(f"max_len={max_len}, expected at most {reach}: the model reads no more")
    max_len = max_len or longest_text(model.config, tokenizer, modules)
    prompt, special = modules.prompt(prompt), special_tokens(tokenizer)
    skip = 0
    if prompt and not modules.include_prompt:
        only = encode(tokenizer, modules.read([prompt], ""), max_len=max_len)[0].tokens
        skip = len(only) - bool(special.frame.closing)
    vectors = embed_encoded(
        model,
        encode(tokenizer, modules.read(list(texts), prompt), max_len=max_len),
        special,
        max_len=max_len,
        batch_tokens=batch_tokens,
        progress=progress,
        skip=skip,
    )
    vectors = modules.finish(vectors)
    return normalized(vectors) if normalize else vectors


def longest_text(config: zoo.EncoderConfig, tokenizer: Tokenizer, modules: SentenceModules) -> int:
    """The most tokens of a text that a model with a tokenizer is meant to read, or 512 where nothing says so."""
    declared = None if tokenizer.declared is None else tokenizer.declared.max_length
    said = modules.max_length or declared
    return min((length for length in (said, longest(config)) if length is not None), default=DEFAULT_LENGTH)


def embed_encoded(
    model: zoo.SequenceClassifier,
    encoded: Sequence[Encoded],
    special: SpecialTokens,
    *,
    max_len: int,
    normalize: bool = False,
    batch_tokens: int = 16384,
    progress: bool = False,
    skip: int = 0,
) -> Float[np.ndarray, "n d"]:
    """`embed_texts` of texts in tokens, by a model with a pooling that leaves out the first `skip` tokens of a row."""
    texts = make_rows(encoded, special, model.config, max_len)
    graphdef, variables = nnx.split(model)
    mesh = current_mesh()
    variables = placed(variables, mesh)
    vectors = np.zeros((len(texts), model.config.d_model), np.float32)
    hidden = not (progress and sys.stderr.isatty())
    bar = tqdm(total=len(texts), unit="text", dynamic_ncols=True, disable=hidden)
    with bar, jax.set_mesh(mesh):
        waiting: list[tuple[np.ndarray, Any]] = []
        for rows in _batches(texts, batch_tokens, row_groups(mesh)):
            batch = texts(rows)
            arrays = spread_whole((batch["tokens"], batch["mask"]), mesh)
            waiting.append((rows, _embed(graphdef, skip, variables, *arrays)))
            if len(waiting) > 2:  # the device works while the next batches are made
                _keep(vectors, *waiting.pop(0), bar)
        for rows, values in waiting:
            _keep(vectors, rows, values, bar)
    return normalized(vectors) if normalize else vectors


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(graphdef, skip, variables, tokens, mask):
    model = nnx.merge(graphdef, variables)
    if not skip:
        return model.embed(tokens, mask)
    # A row that is all prompt keeps its last position, which ends it.
    last = jnp.sum(mask, axis=1, keepdims=True) - 1
    kept = mask & (jnp.arange(tokens.shape[1]) >= jnp.minimum(skip, last))
    hidden = model.hidden(tokens, mask)
    if model.config.pool == "first":
        first = jnp.argmax(kept, axis=1)[:, None, None]
        hidden = jnp.take_along_axis(hidden, first, axis=1)
        kept = jnp.ones_like(kept[:, :1])
    return model.vectors(hidden, kept)


def _keep(vectors: np.ndarray, rows: np.ndarray, values: jax.Array, bar: tqdm) -> None:
    there = rows >= 0
    vectors[rows[there]] = gathered(values).astype(np.float32)[there]
    bar.update(int(there.sum()))


def _batches(texts: Texts, batch_tokens: int, multiple: int) -> Iterator[np.ndarray]:
    """The rows of batches of about batch_tokens positions, once over all texts; filled up with -1."""
    for number, length in enumerate(texts.lengths):
        mine = np.flatnonzero(texts.bucket == number)
        size = max(1, batch_tokens // length // multiple) * multiple
        # A bucket with few texts has a smaller batch, of a power of two rows.
        while size % (2 * multiple) == 0 and size // 2 >= len(mine):
            size //= 2
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            yield np.pad(rows, (0, size - len(rows)), constant_values=-1)


def make_rows(encoded: Sequence[Encoded], special: SpecialTokens, config: zoo.EncoderConfig, max_len: int) -> Texts:
    """Rows as a model reads them: as short as their texts, or filled up to its own length where it counts on that."""
    if config.mask_padding:
        return Texts(encoded, special, max_len=max_len)
    return Texts(encoded, special, max_len=longest(config) or max_len, pad_to_max=True)


def read_texts(path: Path, column: str, encoding: str = "utf-8") -> tuple[list[str], list[str]]:
    """The ids (of a column "_id" or "id", else numbers from 0) and texts of a file.

    Raises:
      FileNotFoundError, ValueError: one line that names the file and the line.
    """
    if stem_and_suffix(path)[1] == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        # Lines end in "\n" alone: a form feed or U+2028 inside one is text.
        lines = (
            read_text(path, str(path), encoding, flag="--encoding")
            .replace("\r\n", "\n")
            .replace("\r", "\n")
            .split("\n")
        )
        texts = lines[:-1] if lines and not lines[-1] else lines
        ids = [str(i) for i in range(len(texts))]
    else:
        ids, texts = [], []
        for number, row in records(path, encoding, flag="--encoding"):
            if column not in row:
                raise ValueError(
                    f"{path} line {number} has no {column!r}; --text-column may be {', '.join(map(str, row))}"
                )
            if not isinstance(row[column], str):
                raise ValueError(f"{path} line {number}: {column!r} is {str(row[column])[:40]}, expected a string")
            ids.append(next((str(row[name]) for name in ID_COLUMNS if name in row), str(len(ids))))
            texts.append(row[column])
    if not texts:
        raise ValueError(f"{path} has no texts")
    return ids, texts


def save_vectors(path: Path, ids: Sequence[str], texts: Sequence[str], vectors: Float[np.ndarray, "n d"]) -> None:
    """Writes vectors, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, vectors)
            else:
                import pyarrow
                import pyarrow.parquet

                flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
                columns = {"id": pyarrow.array(ids), "text": pyarrow.array(texts), "vector": flat}
                pyarrow.parquet.write_table(pyarrow.table(columns), file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    """Reads texts, writes vectors."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bert embed", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        out = Path(config.out)
        if out.suffix not in (".npy", ".parquet"):
            raise ValueError(f"{out}, expected a name that ends in .npy or .parquet")
        if out.exists() and not config.overwrite:
            raise ValueError(f"{out} is there already; --overwrite replaces it")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"{out.parent} is no folder")
        ids, texts = read_texts(Path(config.file), config.text_column, config.encoding)
        model, tokenizer, modules = load_embedder(config.model, config.pool)
        vectors = embed_texts(
            model,
            tokenizer,
            texts,
            prompt=modules.prompt(config.prompt, config.prompt_name),
            modules=modules,
            normalize=config.normalize,
            max_len=config.max_len,
            batch_tokens=config.batch_tokens,
            progress=True,
        )
        save_vectors(out, ids, texts, vectors)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} numbers in {out}")
    return 0


if __name__ == "__main__":
    flags.run(main)
