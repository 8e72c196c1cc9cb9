"""Documents in rows of one length: packed side by side, or one a row, in rows of similar length.

An encoder reads [CLS] piece [SEP], where a piece is a document or, of a longer one, what fits a row. Padding costs as
much as text does, so rows hold several pieces (`packed`), or are cut to the power of two that their piece needs
(`buckets`); `padded` is the plain form. Which is which is decided once; every epoch has an order of its own.

Source: Krell et al. 2021, arXiv:2107.02027 (packing, documents kept apart); for kernels that take rows without padding
instead, Zeng et al. 2022, arXiv:2208.08124.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments.data.special_tokens import SpecialTokens
from experiments.data.streams import TokenStream
from experiments.loop.mesh import current_mesh, own_rows

if TYPE_CHECKING:
    import grain

Layout = Literal["packed", "padded", "buckets"]
Batch = dict[str, np.ndarray]


class Pieces(NamedTuple):
    """Parts of documents that fit a row, all of them in order."""

    starts: np.ndarray
    """(n,) int64: where each begins in the stream's tokens."""
    sizes: np.ndarray
    """(n,) int64: tokens in each, without special ones."""


def cut(stream: TokenStream, seq_len: int, around: int = 2) -> Pieces:
    """Cuts every document into pieces of seq_len - around tokens; the last one is what is left."""
    room = seq_len - around
    begins = stream.starts + 1
    lengths = np.diff(stream.starts, append=stream.n_tokens) - 1
    counts = -(-lengths // room)
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pieces(begins[owner] + number * room, np.minimum(lengths[owner] - number * room, room))


def pack(sizes: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Which pieces go into which row: best fit, the longest first.

    Args:
      sizes: of each piece, at most `capacity`.
      capacity: of a row.

    Returns:
      for each row the indices of its pieces.

    Source: best-fit-decreasing bin packing; at most 11/9 of the fewest rows possible (Johnson 1973).
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys, ascending
    for piece in np.argsort(-sizes, kind="stable"):
        size = int(sizes[piece])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(int(piece))
        if left := room - size:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(rooms, left)
            open_rows[left].append(row)
    return [np.array(row) for row in rows]


def bucket_lengths(seq_len: int, shortest: int = 32) -> list[int]:
    """Lengths of rows: powers of two from `shortest` on, and seq_len."""
    lengths = []
    while shortest < seq_len:
        lengths.append(shortest)
        shortest *= 2
    return [*lengths, seq_len]


class Rows:
    """A stream as rows for an encoder.

    A batch of them is a dict of (b, l) arrays: tokens; mask, False at padding; and, where a row may hold several
    pieces, segment_ids, 0, 1, ... from its beginning on. With "buckets", l differs from batch to batch and b with it,
    so that b * l is about the same.

    Args:
      stream: documents as tokens.
      special: what to put around them.
      seq_len: longest row.
      layout: see the module.
    """

    def __init__(self, stream: TokenStream, special: SpecialTokens, *, seq_len: int, layout: Layout):
        if seq_len < 3:
            raise ValueError(f"seq_len={seq_len}, expected at least 3: [CLS], a token, [SEP]")
        self.stream, self.special, self.seq_len, self.layout = stream, special, seq_len, layout
        self.pieces = cut(stream, seq_len, special.around)
        sizes = self.pieces.sizes + special.around
        self.members = pack(sizes, seq_len) if layout == "packed" else list(np.arange(len(sizes))[:, None])
        self.lengths = np.array(bucket_lengths(seq_len) if layout == "buckets" else [seq_len])
        filled = np.array([sizes[row].sum() for row in self.members])
        self.bucket = np.searchsorted(self.lengths, filled)
        self.n_tokens = int(filled.sum())
        """Tokens of an epoch, [CLS] and [SEP] included."""
        self.fill = float(np.divide(filled.sum(), self.lengths[self.bucket].sum()))
        """Share of the positions that are not padding, over an epoch."""

    def __len__(self) -> int:
        return len(self.members)

    def rows_per_batch(self, batch_size: int, multiple: int = 1) -> list[int]:
        """How many rows of each bucket, a multiple of `multiple`, have the positions of batch_size of seq_len."""
        positions = batch_size * self.seq_len
        return [max(1, positions // int(length) // multiple) * multiple for length in self.lengths]

    def __call__(self, rows: np.ndarray) -> Batch:
        """The batch of some rows of one bucket; row -1 is empty."""
        length = int(self.lengths[max((self.bucket[row] for row in rows if row >= 0), default=0)])
        tokens = np.full((len(rows), length), self.special.pad, np.int32)
        segment_ids = np.full((len(rows), length), -1, np.int32)
        for i, row in enumerate(rows):
            end = 0
            for number, piece in enumerate(self.members[row] if row >= 0 else ()):
                start, size = self.pieces.starts[piece], self.pieces.sizes[piece]
                row_of_piece = self.special.row(self.stream.tokens[start : start + size])
                part = slice(end, end + len(row_of_piece))
                tokens[i, part], segment_ids[i, part] = row_of_piece, number
                end = part.stop
        batch = {"tokens": tokens, "mask": segment_ids >= 0}
        return batch | {"segment_ids": segment_ids} if self.layout == "packed" else batch


class Epochs:
    """The rows of each step: every row once an epoch, in an order of its own, those of one bucket together.

    Args:
      bucket: (n,) the bucket of each row.
      sizes: rows in a batch, of each bucket. The last batch of a bucket is filled up with -1: no row.
      seed: of the orders.
    """

    def __init__(self, bucket: np.ndarray, sizes: Sequence[int], *, seed: int):
        self.bucket, self.sizes, self.seed = bucket, sizes, seed % (1 << 64)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.n_batches = len(self._plan(0))
        """Steps of an epoch."""

    def __call__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.n_batches)
        return self._plan(epoch)[place]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self.seed, epoch))
        batches: list[np.ndarray] = []
        for number, size in enumerate(self.sizes):
            mine = random.permutation(np.flatnonzero(self.bucket == number))
            mine = np.pad(mine, (0, -len(mine) % size), constant_values=-1)
            batches += np.split(mine, len(mine) // size) if len(mine) else []
        return [batches[i] for i in random.permutation(len(batches))]


def make_batches(
    make: Callable[[int], dict[str, Any]],
    *,
    n_batches: int = 1 << 62,
    prefetch: int = 8,
    threads: int = 1,
    shard: tuple[int, int] | None = None,
) -> grain.IterDataset:
    """Batches make(0), make(1), ..., prepared ahead; `iter` of it has a state, a small dict.

    Args:
      make: the batch of a step, as all hosts together see it: a function of the step alone.
      n_batches: how many there are.
      prefetch: how many are made ahead.
      threads: how many are made at the same time, each by a thread.
      shard: (index, count): of each batch the block of this index, of so many. None: the rows that this process's
        devices hold.
    """
    import grain  # half a second, with orbax, which `--help` should not wait for

    own = own_rows(current_mesh(), shard)

    def rows_of(step: int) -> Batch:
        return {name: values[own(len(values))] for name, values in make(int(step)).items()}

    return (
        grain.MapDataset.range(n_batches)
        .map(rows_of)
        .to_iter_dataset(grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch))
    )
