"""Where text comes from: files, tables, the hub or Python's standard library, as documents for training or validation.

    config -> source -> documents -> distinct ones -> train | validation

`tables` reads files of rows, `datasets` opens the hub. What the user can get wrong is one line that names the flag.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from experiments.data.data_source import datasets_library
from experiments.data.deep_json import refuse_deep_json
from experiments.data.inside import within
from experiments.data.left_out import LeftOut
from experiments.data.tables import Reading, check_delimiter, read_rows
from experiments.data.text_files import BadFile, check_encoding, read_text, stem_and_suffix
from experiments.data.tokenizers import TRAINERS, first_line, utf8
from experiments.loop.flags import alias

log = logging.getLogger(__name__)

# Files that hold a document a row.
TABLES = (".jsonl", ".json", ".csv", ".parquet")
# Below this many documents the tail of each is held out, since a draw of whole ones says little about the rest.
FEW_DOCUMENTS = 20


@dataclass(frozen=True)
class DataConfig:
    """Which text to model, in which tokens. Without path and hub: the source of Python's standard library."""

    # A file, a folder or a quoted glob: .jsonl, .json, .csv and .parquet hold a document a row, any other file is one.
    # .gz, .bz2, .xz or .zst may follow each of them.
    path: str | None = None
    # A data set of the Hugging Face hub: its name, or name:config (Salesforce/wikitext:wikitext-103-raw-v1).
    hub: str | None = None
    # The column that holds the text, in tables and hub data sets.
    text_column: str = "text"
    # Of text files and tables, as Python names it (cp1252, latin-1, utf-16, shift-jis, ...).
    encoding: str = field(default="utf-8", repr=False)
    # What is between the cells of .csv: a character, or comma, semicolon, tab. None: what fits the first line.
    delimiter: str | None = field(default=None, repr=False)
    # Leave out files and rows that cannot be read, name them and count them, instead of ending at the first.
    skip_bad: bool = field(default=False, repr=False)
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
    warn = _Complaints(flag)

    def documents() -> Iterator[Document]:
        return itertools.islice(_from_files(files, config, warn), config.max_documents)

    return Source(flag, version, documents)


def _walk(root: Path, skipped: set[str], say: Callable[[str], None] | None = None) -> list[tuple[str, Path]]:
    """Files below a folder by relative name, in the names' order; hidden ones are left out."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    if say is not None:  # of others: see `inside`
        files = within(sorted(files), root, say)
    files = [file for file in files if file.is_file()]
    return sorted((file.relative_to(root).as_posix(), file) for file in files)


def _find_files(pattern: str, flag: str) -> list[tuple[str, Path]]:
    path = Path(pattern).expanduser()
    say = LeftOut(functools.partial(log.warning, "%s: %s", flag), "files were")
    if path.is_file():
        files = [(path.name, path)]
    elif pattern and path.is_dir():  # "" is no name for the current folder
        files = _walk(path, {"__pycache__"}, say)
    elif glob.has_magic(pattern):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        matches = [file for file in within(sorted(matches), root, say) if file.is_file()]
        files = sorted((file.relative_to(root).as_posix(), file) for file in matches)
    elif pattern and path.exists():
        raise ValueError(f"{flag} is a pipe, a socket or a device; expected a text file, a folder of them or a glob")
    else:
        raise FileNotFoundError(f"{flag} does not exist; expected a text file, a folder of them or a glob")
    if not files:
        what = "is an empty folder" if path.is_dir() else "matches no file"
        raise FileNotFoundError(f"{flag} {what}; expected text, .jsonl, .csv or .parquet files")
    return files


class _Complaints:
    """Warnings, each said once however often a source is read."""

    def __init__(self, flag: str):
        self.flag, self.said = flag, set[str]()

    def __call__(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            log.warning("%s: %s", self.flag, message)

    def absent(self, where: str, n: int, total: int, column: str) -> None:
        if n:
            self(f"{where}{n} of {total} rows have no text in '{column}' and are left out")


def _from_files(files: list[tuple[str, Path]], config: DataConfig, warn: _Complaints) -> Iterator[Document]:
    """The documents of files, each of which is one or a table of them."""
    bad = LeftOut(warn, "files were", limit=100)
    for name, file in files:
        try:
            if stem_and_suffix(file)[1] in TABLES:
                yield from _table_documents(name, file, config, warn)
            else:
                text = read_text(file, f"'{name}'", config.encoding, strict=config.path is not None)
                yield Document(name, text, key=name)
        except BadFile as error:
            if not config.skip_bad:
                more = len(files) > 1 and "--data.skip-bad" not in str(error)
                hint = "; --data.skip-bad leaves such files out" if more else ""
                raise BadFile(f"{warn.flag}: {error}{hint}") from error
            bad(str(error))
    bad.summary(len(files) - bad.n)


def _table_documents(name: str, file: Path, config: DataConfig, warn: _Complaints) -> Iterator[Document]:
    bad = LeftOut(warn, f"rows of '{name}' were")
    how = Reading(config.encoding, check_delimiter(config.delimiter), bad if config.skip_bad else None)
    column, index, absent, said = config.text_column, 0, 0, f"'{name}'"
    there: dict[str, None] = {}
    for number, row in enumerate(read_rows(file, said, how, column=column), start=1):
        value = row.get(column)
        if column not in row:
            # A row of JSON may do without; all of a CSV or Parquet table have the same columns.
            there |= dict.fromkeys(map(str, row))
        if value is None:
            absent += 1
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            how.bad(
                f"row {number} of {said} holds {type(value).__name__} in --data.text-column '{column}'; expected text"
            )
        else:
            text = str(value)
            yield Document(f"{name}:{index}", text, key=text)
            index += 1
    if there and not index:
        raise BadFile(f"{said} has no column '{column}'; --data.text-column must be one of {', '.join(there)}")
    bad.summary(index + absent)
    warn.absent(f"{said}: ", absent, index + absent, column)


def _hub_source(config: DataConfig, spec: str) -> Source:
    """A data set's split "train" and, if it has one, "validation"; from the hub or a folder laid out like one there."""
    flag = f"--data.hub '{spec}'"
    name, _, subset = spec.partition(":")
    revision, version, obstacle = None, None, None
    if Path(name).is_dir():
        try:
            refuse_deep_json(Path(name))
        except BadFile as error:
            raise ValueError(f"{flag}: {error}") from error
        version = digest(json.dumps([(file, path.stat().st_mtime_ns) for file, path in _walk(Path(name), set())]))
    else:
        import huggingface_hub.errors

        try:  # one quick question: without a network, `datasets` itself tries for half a minute
            revision = version = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
        except huggingface_hub.errors.OfflineModeIsEnabled:
            log.warning("%s: offline; looking for a copy downloaded earlier", flag)
        except Exception as err:  # no network, no such data set, no access to it
            obstacle = err

    warn = _Complaints(flag)

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
            texts = _texts(functools.partial(splits.get, side), config.text_column, warn)
            for index, text in enumerate(itertools.islice(texts, config.max_documents)):
                yield Document(f"{side}:{index}", text, key=text, side=side if given else None)

    return Source(flag, version, documents)


def _texts(load: Callable[[], Any], column: str, warn: _Complaints) -> Iterator[str]:
    """The strings of one column of a data set of the library `datasets`."""

    def tables() -> Iterator[Any]:
        try:
            yield from load().with_format("arrow").iter(batch_size=1000)
        except Exception as err:
            raise ValueError(f"{warn.flag} cannot be read ({first_line(err)})") from err

    absent = total = 0
    for table in tables():
        if column not in (names := table.column_names):
            raise ValueError(
                f"{warn.flag} has no column '{column}'; --data.text-column must be one of {', '.join(names)}"
            )
        texts = table.column(column)
        if str(texts.type).startswith(("int", "uint", "float", "double", "decimal")):
            texts = texts.cast("string")
        if str(texts.type) not in ("string", "large_string", "string_view", "null"):
            raise ValueError(f"{warn.flag}: --data.text-column '{column}' holds {texts.type}; expected strings")
        absent, total = absent + texts.null_count, total + len(texts)
        yield from (text for text in texts.to_pylist() if text is not None)
    warn.absent("", absent, total, column)


def _datasets() -> Any:
    """The `datasets` library, which takes seconds to import and is needed for the hub only."""
    datasets = datasets_library()
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
    check_encoding(config.encoding)
    check_delimiter(config.delimiter)
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
