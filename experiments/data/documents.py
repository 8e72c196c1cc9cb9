"""Where text comes from: files, tables, the hub or Python's standard library, as documents for training or validation.

    config -> source -> documents -> distinct ones -> train | validation

`datasets` opens tables and the hub. What the user can get wrong is one line that names the flag.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from experiments.data.tokenizers import TRAINERS, first_line, utf8
from experiments.loop.flags import alias

log = logging.getLogger(__name__)

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> builder in `datasets`
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
# Below this many documents the tail of each is held out, since a draw of whole ones says little about the rest.
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class DataConfig:
    """Which text to model, in which tokens. Without path and hub: the source of Python's standard library."""

    # A file, a folder or a quoted glob: .jsonl, .json, .csv and .parquet hold a document a row, any other file is one.
    path: str | None = None
    # A data set of the Hugging Face hub: its name, or name:config (Salesforce/wikitext:wikitext-103-raw-v1).
    hub: str | None = None
    # The column that holds the text, in tables and hub data sets.
    text_column: str = "text"
    # bytes; bpe or wordpiece (uncased), trained on the training text; a tokenizer.json, or a folder or hub repository
    # (gpt2) that holds one.
    tokenizer: str = "bytes"
    # At most this many ids in a BPE or WordPiece that is trained here.
    bpe_vocab_size: int = 8192
    # Tokens in a row.
    seq_len: Annotated[int, alias("--seq-len")] = 256
    # Share of the documents held out for evaluation, chosen by a hash; with under 20 documents, the tail of each.
    validation_fraction: float = 0.05
    # Read only the first so many documents; a hub data set is then streamed rather than downloaded.
    max_documents: int | None = None
    # Accept a seq_len that no single document fills: rows then hold several whole documents.
    allow_short_documents: bool = False
    # Where token arrays are kept; by default subquadratic-zoo in $XDG_CACHE_HOME or ~/.cache.
    cache_dir: str | None = None


class Document(NamedTuple):
    name: str
    text: str
    key: str  # what decides its side of the split: a file's name, so that an edit does not move it, or a row's text
    side: str | None = None  # "train" or "validation" where the source says so


class Source(NamedTuple):
    flag: str  # what the user asked for, for messages
    version: str | None  # changes when the text may have; None when that cannot be known now
    documents: Callable[[], Iterator[Document]]


def open_source(config: DataConfig) -> Source:
    """Finds the text that `config` names, and checks the rest of what it says; documents are read when asked for."""
    _check(config)
    if config.hub is not None:
        return _hub_source(config, config.hub)
    if config.path is None:
        root = Path(sysconfig.get_path("stdlib"))
        flag = f"the standard library's source in '{root}' (name another text with --data.path)"
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        files = [(name, file) for name, file in _walk(root, skipped) if name.endswith(".py")]
    else:
        flag = f"--data.path '{config.path}'"
        files = _find_files(config.path, flag)
    stats = [(name, file.stat()) for name, file in files]
    version = digest(json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]))

    def documents() -> Iterator[Document]:
        for name, file in files:
            suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
            if builder := TABLES.get(suffix):
                yield from _table_documents(name, file, builder, flag, config.text_column)
            else:
                yield Document(name, _read_text(name, file, flag, strict=config.path is not None), key=name)

    return Source(flag, version, lambda: itertools.islice(documents(), config.max_documents))


def _walk(root: Path, skipped: set[str]) -> list[tuple[str, Path]]:
    """Files below a folder by relative name, in the names' order; hidden ones are left out."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())


def _find_files(pattern: str, flag: str) -> list[tuple[str, Path]]:
    path = Path(pattern).expanduser()
    if path.is_file():
        files = [(path.name, path)]
    elif pattern and path.is_dir():  # "" is no name for the current folder
        files = _walk(path, {"__pycache__"})
    elif glob.has_magic(pattern):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = sorted((file.relative_to(root).as_posix(), file) for file in matches if file.is_file())
    else:
        raise FileNotFoundError(f"{flag} does not exist; expected a text file, a folder of them or a glob")
    if not files:
        what = "is an empty folder" if path.is_dir() else "matches no file"
        raise FileNotFoundError(f"{flag} {what}; expected text, .jsonl, .csv or .parquet files")
    return files


def _read_text(name: str, file: Path, flag: str, *, strict: bool) -> str:
    """A file's text as it stands, line ends included; `strict` refuses what looks like something else than text."""
    try:
        raw = file.read_bytes()
    except OSError as err:
        raise ValueError(f"{flag}: '{name}' cannot be read ({err.strerror})") from err
    encoding = "utf-8-sig"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif strict and (zero := raw[:8192].find(b"\0")) >= 0:
        raise ValueError(
            f"{flag}: '{name}' is not text (zero byte at offset {zero}); pick text files with a glob such as '**/*.txt'"
        )
    elif file.suffix == ".py":
        with contextlib.suppress(SyntaxError):  # it declares none, or one that Python does not know
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding, errors="replace")
    junk = text.count("\ufffd") - raw.count("\ufffd".encode())
    if strict and junk > len(text) / 100:
        raise ValueError(f"{flag}: '{name}' is not {encoding} text ({junk} of {len(text)} characters undecodable)")
    if strict and junk > 0:
        log.warning("%s: %d characters of '%s' are not %s and read as U+FFFD", flag, junk, name, encoding)
    return text


def _table_documents(name: str, file: Path, builder: str, flag: str, column: str) -> Iterator[Document]:
    if not file.stat().st_size:
        return

    def load() -> Any:
        return _datasets().load_dataset(builder, data_files=[str(file)], split="train", streaming=True)

    def complain(err: Exception) -> str:
        fault = _json_fault(file, column) if file.suffix in (".json", ".jsonl") else None
        return f"{flag}: '{name}' {fault or f'cannot be read as {builder} ({first_line(err)})'}"

    for index, text in enumerate(_texts(load, column, f"{flag}: '{name}'", complain)):
        yield Document(f"{name}:{index}", text, key=text)


def _hub_source(config: DataConfig, spec: str) -> Source:
    """A data set's split "train" and, if it has one, "validation"; from the hub or a folder laid out like one there."""
    flag = f"--data.hub '{spec}'"
    name, _, subset = spec.partition(":")
    revision, version, obstacle = None, None, None
    if Path(name).is_dir():
        version = digest(json.dumps([(file, path.stat().st_mtime_ns) for file, path in _walk(Path(name), set())]))
    else:
        import huggingface_hub.errors

        try:  # one quick question: without a network, `datasets` itself tries for half a minute
            revision = version = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
        except huggingface_hub.errors.OfflineModeIsEnabled:
            log.warning("%s: offline; looking for a copy downloaded earlier", flag)
        except Exception as err:  # no network, no such data set, no access to it
            obstacle = err

    def unreadable(err: Exception) -> str:
        return f"{flag} cannot be read ({first_line(err)})"

    def documents() -> Iterator[Document]:
        streaming = config.max_documents is not None
        try:
            if obstacle is not None:
                raise obstacle
            splits = _datasets().load_dataset(name, subset or None, revision=revision, streaming=streaming)
        except Exception as err:
            raise ValueError(
                f"{flag} cannot be loaded ({first_line(err)}); expected the name of a data set on the Hugging Face "
                "hub, or name:config. HF_HUB_OFFLINE=1 uses a copy downloaded earlier, --data.path reads local files"
            ) from err
        if "train" not in splits:
            raise ValueError(f"{flag} has no split 'train'; it has {', '.join(splits)}")
        given = "validation" in splits
        # Validation first, so that a text that is in both splits is dropped from train.
        for side in ("validation", "train") if given else ("train",):
            texts = _texts(functools.partial(splits.get, side), config.text_column, flag, unreadable)
            for index, text in enumerate(itertools.islice(texts, config.max_documents)):
                yield Document(f"{side}:{index}", text, key=text, side=side if given else None)

    return Source(flag, version, documents)


def _texts(load: Callable[[], Any], column: str, where: str, complain: Callable[[Exception], str]) -> Iterator[str]:
    """The strings of one column of a data set; `complain` words what goes wrong inside `datasets`."""

    def tables() -> Iterator[Any]:
        try:
            yield from load().with_format("arrow").iter(batch_size=1000)
        except Exception as err:
            raise ValueError(complain(err)) from err

    for table in tables():
        if column not in (names := table.column_names):
            raise ValueError(f"{where} has no column '{column}'; --data.text-column must be one of {', '.join(names)}")
        texts = table.column(column)
        if str(texts.type) not in ("string", "large_string", "string_view", "null"):
            raise ValueError(complain(TypeError(f"--data.text-column '{column}' holds {texts.type}; expected strings")))
        yield from (text for text in texts.to_pylist() if text is not None)


def _json_fault(file: Path, column: str) -> str | None:
    """Where a file of JSON is wrong, which `datasets` does not say; None if it looks right."""
    content = file.read_bytes()
    records = [content] if content.lstrip().startswith(b"[") else content.splitlines()
    for number, record in enumerate(records, start=1):
        where = f"line {number}" if len(records) > 1 else "it"
        try:
            rows = json.loads(record) if record.strip() else []
        except ValueError as err:
            return f"is not JSON: {where} fails with '{first_line(err)}'"
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, dict):
                return f"is not a table: {where} holds {type(row).__name__}; expected objects with '{column}'"
            if not isinstance(value := row.get(column), str | None):
                return f"has no text in column '{column}': {where} holds {type(value).__name__}; expected a string"
    return None


def _datasets() -> Any:
    """The `datasets` library, which takes seconds to import and is needed for tables only."""
    import datasets

    datasets.config.TORCH_AVAILABLE = False  # where torch is installed, streaming would import it to no use
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # its exceptions say the same
    if not sys.stderr.isatty():
        import huggingface_hub.utils

        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    return datasets


def split(config: DataConfig, source: Source) -> Iterator[Document]:
    """Every distinct text with its side of the split, which depends on the document and not on what else there is."""
    fraction = config.validation_fraction
    documents = _distinct(source.documents())
    head = list(itertools.islice(documents, FEW_DOCUMENTS))
    if not head:
        raise ValueError(f"{source.flag} holds no text")
    if head[0].side is not None:
        yield from itertools.chain(head, documents)
    elif len(head) < FEW_DOCUMENTS:
        for document in head:
            cut = _tail(document.text, fraction)
            yield document._replace(text=document.text[:cut], side="train")
            if cut < len(document.text):
                yield document._replace(text=document.text[cut:], side="validation")
    else:
        # The extremes of the first few are assigned in any case, so that neither side is empty.
        ordered = sorted(_place(document.key) for document in head)
        for document in itertools.chain(head, documents):
            place = _place(document.key)
            held_out = place == ordered[0] or (place < fraction and place != ordered[-1])
            yield document._replace(side="validation" if held_out else "train")


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Drops blank documents and all but the first of equal texts."""
    seen = set()
    for document in documents:
        fingerprint = hashlib.blake2b(utf8(document.text), digest_size=16).digest()
        if document.text.strip() and fingerprint not in seen:
            seen.add(fingerprint)
            yield document


def _place(key: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(utf8(key), digest_size=6).digest(), "big") / (1 << 48)


def _tail(text: str, fraction: float) -> int:
    """Where the held-out tail of a text begins: after a line or a word if one ends near by."""
    cut = max(1, round(len(text) * (1 - fraction)))
    near = min(2000, cut // 2, (len(text) - cut) // 2)
    for end in ("\n", " "):
        if (at := text.rfind(end, cut - near, cut + near)) >= 0:
            return at + 1
    return cut


def digest(text: str) -> str:
    """A short name for a text, the same on every machine."""
    return hashlib.blake2b(utf8(text), digest_size=10).hexdigest()


def _check(config: DataConfig) -> None:
    if config.path is not None and config.hub is not None:
        raise ValueError(f"--data.path '{config.path}' and --data.hub '{config.hub}' exclude each other; give one")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"--data.validation-fraction {config.validation_fraction} must be between 0 and 1")
    if config.tokenizer in TRAINERS and config.bpe_vocab_size < 257:
        raise ValueError(
            f"--data.bpe-vocab-size {config.bpe_vocab_size} must be at least 257: 256 bytes and a separator"
        )
    if config.seq_len < 1:
        raise ValueError(f"--data.seq-len {config.seq_len} must be at least 1")
    if config.max_documents is not None and config.max_documents < 1:
        raise ValueError(f"--data.max-documents {config.max_documents} must be at least 1")
