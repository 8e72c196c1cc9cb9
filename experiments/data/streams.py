"""Documents as token ids, end to end: eot, document, eot, document, ..., eot, cut into rows.

Kept in a cache folder as memory-mapped arrays, so that only the first run over a text waits for its tokeniser.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from tqdm import tqdm

from experiments.data.documents import DataConfig, Source, digest, split
from experiments.data.inside import what_is_wrong
from experiments.data.tokenizers import Tokenizer, first_line, utf8
from experiments.loop.fingerprints import fingerprint
from experiments.loop.user_cache import user_cache

log = logging.getLogger(__name__)

# Characters that are tokenised at once.
CHUNK = 1 << 22
# Part of every cache key: raise it when the same text and tokenizer should give another stream.
CACHE_VERSION = 1
# Fields of the configuration that say how files are read, and are not in its `repr`.
_HOW = ("encoding", "delimiter", "skip_bad")


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Documents end to end, each opened by eot, one eot at the very end: every token but the first is a target."""

    name: str  # "train" or "validation"
    tokens: np.ndarray  # (n_tokens + 1,) uint16 where the vocabulary allows, otherwise int32
    starts: np.ndarray  # (n_documents,) int64, where each document's eot lies
    names: np.ndarray  # (n_documents,) UTF-8 bytes, see `document_name`
    n_bytes: int  # of the documents' text in UTF-8; bits per byte = nats per token / ln 2 * n_tokens / n_bytes

    @property
    def n_tokens(self) -> int:
        """How many targets there are: each document's tokens and the eot after it."""
        return len(self.tokens) - 1

    @property
    def n_documents(self) -> int:
        return len(self.starts)

    @functools.cached_property
    def digest(self) -> str:
        """The fingerprint of tokens, documents and bytes."""
        return fingerprint(self.tokens, self.starts, self.n_bytes)

    def document_name(self, index: int) -> str:
        return self.names[index].decode("utf-8", errors="replace")

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, without eot."""
        ends = self.starts[index + 1] if index + 1 < self.n_documents else self.n_tokens
        return self.tokens[self.starts[index] + 1 : ends]

    def longest(self) -> tuple[int, str]:
        """Tokens and name of the longest document, its eot counted."""
        lengths = np.diff(self.starts, append=self.n_tokens)
        index = int(np.argmax(lengths))
        return int(lengths[index]), self.document_name(index)

    def rows(self, seq_len: int, *, partial: bool = False) -> Rows:
        """The stream cut into rows; with `partial`, the tail that does not fill a row comes last, padded."""
        return Rows(self, seq_len, partial)


@dataclass(frozen=True, eq=False)
class Rows:
    """Random access to rows of a stream: row i predicts tokens i * seq_len + 1 to (i + 1) * seq_len.

    A row is a dict of (l,) arrays, int32 but for the weights: tokens; targets; segment_ids, 0 at first and one more at
    each document that opens in the row; positions, counted from the document's eot, or from the row's start if the
    document opened earlier; weights, float32, 1 where there is a token to predict.
    """

    stream: TokenStream
    seq_len: int
    partial: bool = False

    def __len__(self) -> int:
        n_tokens = self.stream.n_tokens
        return -(-n_tokens // self.seq_len) if self.partial else n_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = index * self.seq_len
        window = np.zeros(self.seq_len + 1, np.int32)
        present = self.stream.tokens[first : first + self.seq_len + 1]
        window[: len(present)] = present
        n_targets = len(present) - 1
        inside = slice(*np.searchsorted(self.stream.starts, (first + 1, first + n_targets)))
        boundaries = np.append(self.stream.starts[inside] - first, n_targets)  # padding is a segment of its own
        opens = np.zeros(self.seq_len, np.int32)
        opens[boundaries[boundaries < self.seq_len]] = 1
        offsets = np.arange(self.seq_len, dtype=np.int32)
        return {
            "tokens": window[:-1],
            "targets": window[1:],
            "segment_ids": np.cumsum(opens, dtype=np.int32),
            "positions": offsets - np.maximum.accumulate(offsets * opens),
            "weights": (offsets < n_targets).astype(np.float32),
        }


Streams = tuple[TokenStream, TokenStream]  # train, validation


def tokenise(config: DataConfig, source: Source, tokenizer: Tokenizer, into: Path | None) -> Streams:
    """Writes both streams, in files of the folder `into` or in memory."""
    writers = {side: _Writer(side, tokenizer, into) for side in ("train", "validation")}
    pieces: list[tuple[_Writer, str | None, str]] = []  # a name opens a document, None goes on with it

    def flush() -> None:
        encoded = tokenizer.encode_batch([text for _, _, text in pieces])
        for (writer, name, text), ids in zip(pieces, encoded, strict=True):
            writer.add(name, ids, len(utf8(text)))
        progress.update(sum(len(text) for _, _, text in pieces))
        pieces.clear()

    with tqdm(unit="chars", unit_scale=True, desc="tokenising", disable=None, delay=1) as progress:
        waiting = 0
        for document in split(config, source):
            name: str | None = document.name
            for text in tokenizer.pieces(document.text):
                pieces.append((writers[cast(str, document.side)], name, text))
                name = None
                waiting += len(text)
                if waiting > CHUNK:
                    flush()
                    waiting = 0
        flush()
    for side, writer in writers.items():
        if not writer.names:
            raise ValueError(
                f"--data.validation-fraction {config.validation_fraction} leaves no {side} text of {source.flag}"
            )
    return writers["train"].finish(), writers["validation"].finish()


class _Unwritable(Exception):
    """The cache cannot hold the streams: no permission, no space."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise _Unwritable(err.strerror) from err


class _Writer:
    """Appends documents to one stream; the tokens go to a file straight away, since they may not fit in memory."""

    def __init__(self, side: str, tokenizer: Tokenizer, folder: Path | None):
        self.side, self.folder = side, folder
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self.eot = np.array([tokenizer.eot], self.dtype)
        self.n_bytes = self.n_tokens = 0
        self.starts = array("q")
        self.names: list[bytes] = []
        with _writing():
            self.file: BinaryIO = io.BytesIO() if folder is None else (folder / f"{side}.tokens.npy").open("wb")
            self._write_header()

    def add(self, name: str | None, ids: np.ndarray, n_bytes: int) -> None:
        if name is not None:
            self.starts.append(self.n_tokens)
            self.names.append(utf8(name))
            self._write(self.eot)
        self._write(ids)
        self.n_bytes += n_bytes

    def finish(self) -> TokenStream:
        self._write(self.eot)
        starts = np.array(self.starts, np.int64)
        names = np.array(self.names, np.bytes_)
        with _writing():
            self._write_header()
            if self.folder is None:
                self.file.seek(0)
                return TokenStream(self.side, np.load(self.file), starts, names, self.n_bytes)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            np.save(self.folder / f"{self.side}.starts.npy", starts)
            np.save(self.folder / f"{self.side}.names.npy", names)
        stream = _map_stream(self.side, self.folder, self.n_bytes)
        said = {"n_bytes": self.n_bytes, "digest": stream.digest, "names": fingerprint(stream.names)}
        with _writing():
            (self.folder / f"{self.side}.json").write_text(json.dumps(said))
        return stream

    def _write(self, ids: np.ndarray) -> None:
        self.n_tokens += len(ids)
        with _writing():
            self.file.write(ids.astype(self.dtype).tobytes())

    def _write_header(self) -> None:
        """The .npy header; numpy leaves room in it for the length to grow, so it can be written again."""
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.n_tokens,)}
        np.lib.format.write_array_header_1_0(self.file, header)


class _Unsigned(Exception):
    """An earlier version has kept the streams, without the digests that tell whether they are as they were."""


def _map_stream(side: str, folder: Path, n_bytes: int) -> TokenStream:
    """A stream in files, its arrays mapped rather than read."""
    mapped = [np.load(folder / f"{side}.{part}.npy", mmap_mode="r") for part in ("tokens", "starts", "names")]
    tokens, starts, names = (values.view(np.ndarray) for values in mapped)  # the memmap subclass is slow to index
    return TokenStream(side, tokens, starts, names, n_bytes)


def _read_stream(side: str, folder: Path, eot: int) -> TokenStream:
    """A stream that is kept, as it was written. Anything may be raised if it is not, `_Unsigned` if nothing tells."""
    for path in (folder / f"{side}.json", *(folder / f"{side}.{part}.npy" for part in ("tokens", "starts", "names"))):
        if wrong := what_is_wrong(path, folder):
            raise ValueError(f"{path.name} {wrong}")
    said = json.loads((folder / f"{side}.json").read_text())
    if not {"digest", "names"} <= said.keys():
        raise _Unsigned
    stream = _map_stream(side, folder, said["n_bytes"])
    if (stream.digest, fingerprint(stream.names)) != (said["digest"], said["names"]):
        raise ValueError(f"the {side} tokens are not those that were written")
    sample = stream.starts[:: max(1, stream.n_documents // 1000)]
    if len(stream.names) != stream.n_documents or (stream.tokens[[*sample, -1]] != eot).any():
        raise ValueError("starts and tokens do not belong together")
    return stream


class Cache:
    """Folders named after all that a stream depends on, which appear whole or not at all."""

    def __init__(self, config: DataConfig, source: Source):
        self.root = Path(config.cache_dir).expanduser() if config.cache_dir else user_cache()
        text = replace(config, tokenizer="", bpe_vocab_size=0, seq_len=0, allow_short_documents=False, cache_dir=None)
        # How files are read counts where it is not as by default: what was kept before it could be said is found then.
        asked = {name: value for name in _HOW if (value := getattr(config, name)) != getattr(DataConfig, name, None)}
        self.flag, self.version = source.flag, source.version
        self.text = f"{CACHE_VERSION} {text}" + (f" {asked}" if asked else "")

    def folder(self, tokenizer: str) -> Path | None:
        """Where things of this text and tokenizer belong; None when the text's version is unknown and none is kept."""
        prefix = digest(f"{self.text} {tokenizer}")
        if self.version is not None:
            return self.root / f"{prefix}-{digest(self.version)}"
        return max(self.root.glob(f"{prefix}-*"), key=lambda folder: folder.stat().st_mtime, default=None)

    def streams(self, tokenizer: Tokenizer, build: Callable[[Path | None], Streams]) -> Streams:
        """The streams that are kept, or those that `build` makes: in a folder to keep, or in memory if that fails."""
        folder = self.folder(digest(tokenizer.to_json()))
        if folder is None:
            return build(None)
        if folder.is_dir():
            try:
                train, validation = (_read_stream(side, folder, tokenizer.eot) for side in ("train", "validation"))
            except _Unsigned:
                log.warning("'%s' is of an earlier version, without digests to check it by; it is built again", folder)
            except Exception as err:  # whatever a damaged file makes numpy or json say
                log.warning("'%s' is damaged (%s) and is built again", folder, first_line(err))
            else:
                if self.version is None:
                    log.warning("%s cannot be reached; the tokens kept from an earlier run are used", self.flag)
                return train, validation
        try:
            return self._build(folder, build, replaces=os.path.lexists(folder))
        except _Unwritable as err:
            log.warning("tokens cannot be kept in '%s' (%s) and stay in memory; see --data.cache-dir", self.root, err)
            return build(None)

    def _build(self, folder: Path, build: Callable[[Path | None], Streams], *, replaces: bool) -> Streams:
        with _writing():
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix="partial-", dir=self.root, ignore_cleanup_errors=True)
        with temporary as partial:
            streams = build(Path(partial))
            if replaces:  # only now: what it is built from may be out of reach
                _discard(folder)
            with contextlib.suppress(OSError):  # another process was first: its folder holds the same
                os.rename(partial, folder)
            return streams


def _discard(path: Path) -> None:
    """Deletes a folder, or a link or a file in its place, as far as that is allowed."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
