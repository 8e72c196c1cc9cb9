"""Text to token ids and back: raw bytes, a BPE or WordPiece trained here, or any published `tokenizer.json`.

Every tokenizer has one separator, `eot`, which opens each document of a stream and closes the one before it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers as hf

from experiments.data.hub_tokenizer import find_in_hub
from experiments.data.tokenizer_files import (
    CONFIG_FILE,
    FILE_NAME,
    VOCABULARY,
    Declared,
    Frame,
    read_files,
    read_frame,
)
from experiments.data.tokenizer_limits import check_growth, failures_are_errors
from experiments.loop.distributed import by_first
from zoo.published.json_files import parse_json

EOT = "<|endoftext|>"
# What published tokenizers call the end of a text, the likeliest meaning first.
EOT_NAMES = (EOT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "[SEP]")
# Special tokens of a WordPiece that is trained here, in the order of their ids.
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Characters in a piece, about: the BPE keeps some 100 bytes per token while it works, and works on pieces in parallel.
PIECE = 1 << 20
# Where GPT-2's pre-tokenizer (ByteLevel) cuts whatever else there is: after a lone newline, before the space of a word.
_SEAM = re.compile(r"(?<=[\w!-~])\n(?=[\w!-~])|(?<=\w)(?= \w)")


# Of one, two, three and four bytes.
_LETTERS = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000))))


class Tokenizer(Protocol):
    """What data, sampling and checkpoints need of a tokenizer."""

    kind: str  # "bytes", or the model inside a tokenizer.json: "bpe", "unigram", "wordpiece", "wordlevel"
    vocab_size: int  # every id is below it
    eot: int  # id of the one document separator
    frame: Frame | None  # what goes around texts for an encoder; None: nothing says it
    declared: Declared | None  # what files say besides; None: there are none

    def encode(self, text: str) -> np.ndarray: ...  # int32

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def encode_marked(self, text: str) -> np.ndarray: ...  # as encode, but special tokens are read where it spells them

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...

    def pieces(self, text: str) -> Iterator[str]: ...  # of bounded length where possible; their ids joined are encode's

    def decode(self, ids: Iterable[int]) -> str: ...

    def vocabulary(self) -> dict[str, int]: ...  # the tokens as the tokenizer writes them; empty where they are bytes

    def special_ids(self) -> set[int]: ...  # of tokens that are never read from text

    def to_json(self) -> str: ...

    def save(self, folder: Path | str) -> None: ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the text's UTF-8, 256 is eot."""

    kind = "bytes"
    vocab_size = 257
    eot = 256
    frame: Frame | None = None
    declared: Declared | None = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids, where "<|endoftext|>" is eot, as in the files that others load it from: int32."""
        first, *others = (self.encode(part) for part in text.split(EOT))
        return np.concatenate([first, *(ids for part in others for ids in (np.array([self.eot], np.int32), part))])

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and where each token begins and ends in the text: (n,) and (n, 2) int32, in characters."""
        owner = np.repeat(np.arange(len(text), dtype=np.int32), [len(utf8(character)) for character in text])
        return self.encode(text), np.stack([owner, owner + 1], axis=1)

    def pieces(self, text: str) -> Iterator[str]:
        return (text[start : start + PIECE] for start in range(0, len(text), PIECE))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; eot and ids of a padded vocabulary are skipped, broken UTF-8 reads as U+FFFD."""
        values = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64)
        kept = values[(values >= 0) & (values < self.eot)]
        return kept.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return {}

    def special_ids(self) -> set[int]:
        return {self.eot}

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})

    def save(self, folder: Path | str) -> None:
        save_tokenizer(self, folder)


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` (the content of a tokenizer.json) behind this module's interface.

    Special tokens are never read from text: a document that spells "<|endoftext|>" keeps those 13 characters. Only
    `encode_marked` reads them: a chat's template spells those that it puts around messages.

    Args:
      tokenizer: with its vocabulary.
      declared: what the files beside it say. None: nothing does, and special tokens go by their usual names.

    Raises:
      ValueError: there is no end of a text: none is declared, and none of EOT_NAMES is in the vocabulary; or its steps
        could make too much of a text.
    """

    def __init__(self, tokenizer: hf.Tokenizer, declared: Declared | None = None):
        description = json.loads(tokenizer.to_str())
        check_growth(description)
        # A published file may cut texts at the length its model was trained with.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.declared = declared
        with failures_are_errors():
            self.frame = None if declared is None else read_frame(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        roles = {} if declared is None else declared.roles
        names = [name for role in ("eos_token", "sep_token") for name in [roles.get(role)] if name]
        known = [*names[: "eos_token" in roles], *EOT_NAMES, *names]
        eot = next((vocabulary[name] for name in known if name in vocabulary), None)
        if eot is None and self.frame is not None and self.frame.closing:
            eot = self.frame.closing[-1]
        if eot is None:
            raise ValueError(f"the tokenizer has no end-of-text token; looked for {', '.join(EOT_NAMES)}")
        self.kind: str = description["model"].get("type", "subword").lower()
        self.vocab_size: int = max(vocabulary.values()) + 1  # published vocabularies have holes
        self.eot: int = eot
        gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        pre_tokenizer = description["pre_tokenizer"] or {}
        self._has_seams = description["normalizer"] is None and pre_tokenizer.items() >= gpt2.items()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [_clean(text) for text in texts]
        with failures_are_errors():
            encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def encode_marked(self, text: str) -> np.ndarray:
        """Ids, special tokens among them where the text spells one: int32. None are added."""
        self._tokenizer.encode_special_tokens = False
        try:
            return np.asarray(self._tokenizer.encode(_clean(text), add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def pieces(self, text: str) -> Iterator[str]:
        return _pieces(text) if self._has_seams else iter([text])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; eot, special tokens and ids of a padded vocabulary are skipped."""
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i != self.eot]
        with failures_are_errors():
            return self._tokenizer.decode(kept, skip_special_tokens=True)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and where each token begins and ends in the text: (n,) and (n, 2) int32, in characters."""
        with failures_are_errors():
            encoding = self._tokenizer.encode(_clean(text), add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int32).reshape(-1, 2)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def special_ids(self) -> set[int]:
        return {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def save(self, folder: Path | str) -> None:
        save_tokenizer(self, folder)


def utf8(text: str) -> bytes:
    """UTF-8 of any str: escaped bytes (U+DC80 to U+DCFF) as themselves, other lone surrogates as '?'."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace")


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Trains a byte-level BPE: any text round-trips, and equal texts give equal tokenizers.

    Args:
      texts: the documents to count pairs in.
      vocab_size: at most this many ids, eot and the 256 bytes among them; fewer when no pair is left that occurs twice.

    Raises:
      ValueError: vocab_size cannot hold the bytes and eot.

    Source: Radford et al. 2019 (GPT-2), section 2.2.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {EOT}")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((_clean(piece) for text in texts for piece in _pieces(text)), trainer)
    return SubwordTokenizer(tokenizer)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Trains BERT's uncased WordPiece: lower case without accents, words and punctuation, pieces after "##".

    Equal texts give equal tokenizers. The library numbers the letters inside words in an order of chance, and breaks
    ties by these numbers; so they are numbered beforehand, as if they were special tokens.

    Args:
      texts: the documents to count pairs in.
      vocab_size: at most this many ids, the special ones ([PAD] 0, [UNK], [CLS], [SEP], [MASK]) among them.

    Raises:
      ValueError: vocab_size cannot hold an alphabet.

    Source: Devlin et al. 2018, arXiv:1810.04805; the special tokens' names are those of bert-base-uncased.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: an alphabet and {', '.join(BERT_SPECIALS)}")
    normalizer, characters, clean = hf.normalizers.BertNormalizer(), Counter[str](), [_clean(text) for text in texts]
    for text in clean:
        characters.update(normalizer.normalize_str(text))
    ranked = sorted((c for c in characters if not c.isspace()), key=lambda c: (-characters[c], c))
    letters = sorted(ranked[: vocab_size // 4])
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*BERT_SPECIALS, *(f"##{letter}" for letter in letters)],
        show_progress=sys.stderr.isatty(),
    )
    trained = _wordpiece({})
    trained.train_from_iterator(clean, trainer)
    return wordpiece(trained.get_vocab())


def wordpiece(vocabulary: dict[str, int]) -> SubwordTokenizer:
    """BERT's uncased WordPiece with a vocabulary."""
    tokenizer = _wordpiece(vocabulary)
    tokenizer.add_special_tokens([name for name in BERT_SPECIALS if name in vocabulary])
    return SubwordTokenizer(tokenizer)


def _wordpiece(vocabulary: dict[str, int]) -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    return tokenizer


# Tokenizers that are trained on the text at hand, by name.
TRAINERS: dict[str, Callable[[Iterable[str], int], SubwordTokenizer]] = {
    "bpe": train_bpe,
    "wordpiece": train_wordpiece,
}


def load_tokenizer(
    spec: str,
    texts: Iterable[str] | None = None,
    vocab_size: int | None = None,
    folder: Path | str | None = None,
) -> Tokenizer:
    """Loads the tokenizer that `spec` names, or trains it.

    Args:
      spec: "bytes"; "bpe" or "wordpiece" (the one in `folder` when it holds one, otherwise trained on `texts` to
        `vocab_size`); a tokenizer.json or a folder with one; or the name of a repository on the Hugging Face hub.

    Raises:
      ValueError: nothing usable under that name.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec in TRAINERS:
        if folder is not None and (Path(folder) / FILE_NAME).exists():
            return restore_tokenizer(folder)
        if texts is None or vocab_size is None:
            raise ValueError(f"tokenizer {spec!r} is trained on texts to a vocab_size; neither may be None")
        return TRAINERS[spec](texts, vocab_size)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return restore_tokenizer(path) if (path / "checkpoints").is_dir() else published_tokenizer(path)
    if path.is_file():
        return _read(path, Declared({}, None))
    return published_tokenizer(find_in_hub(spec))


def reads_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids. The one of bytes may be written as it is, or as others load it."""
    if one.to_json() == other.to_json():
        return True
    if ByteTokenizer.kind not in (one.kind, other.kind) or (one.vocab_size, one.eot) != (other.vocab_size, other.eot):
        return False
    # All 256 ids are taken by bytes then, and letters stand for one to four of them: they say which.
    return np.array_equal(one.encode(_LETTERS), other.encode(_LETTERS))


def check_same(spec: str, tokenizer: Tokenizer, *, flag: str, source: str | Path) -> None:
    """Raises a ValueError where a flag names another tokenizer than a model has.

    Args:
      spec: what the flag says, as `load_tokenizer` takes it.
      tokenizer: the model's.
      flag, source: the flag, and what the model is called, for the error.
    """
    if spec in TRAINERS or not reads_alike(load_tokenizer(spec), tokenizer):
        said = f"{tokenizer.kind}, {tokenizer.vocab_size} ids"
        raise ValueError(f"{flag} {spec}, but {source} has a tokenizer of its own ({said}); leave the flag out")


@by_first
def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Writes `folder`/tokenizer.json, in one step: a reader finds the old file, the new one or none.

    What files have declared of it goes before, into a tokenizer_config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (declared := tokenizer.declared) is not None:
        length = {} if declared.max_length is None else {"model_max_length": declared.max_length}
        said = {"tokenizer_class": "PreTrainedTokenizerFast", **declared.roles, **length}
        _write(folder / CONFIG_FILE, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    _write(folder / FILE_NAME, tokenizer.to_json())


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def restore_tokenizer(folder: Path | str) -> Tokenizer:
    """Reads what `save_tokenizer` wrote. A tokenizer.json alone says nothing of special tokens but their names.

    Raises:
      ValueError: the file is missing or damaged.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no {FILE_NAME} in '{folder}'")
    if (path.parent / CONFIG_FILE).is_file():
        return published_tokenizer(path.parent)
    return _read(path, None)


def published_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a published folder, as all of its files say it.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if _is_bytes(folder / FILE_NAME):
        return ByteTokenizer()
    tokenizer, declared = read_files(folder)
    return _subword(folder / (FILE_NAME if (folder / FILE_NAME).is_file() else VOCABULARY), tokenizer, declared)


def _read(path: Path, declared: Declared | None) -> Tokenizer:
    if _is_bytes(path):
        return ByteTokenizer()
    try:
        tokenizer = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as err:  # the library raises bare Exception
        raise ValueError(f"'{path}' is not a readable tokenizer.json: {first_line(err)}") from err
    return _subword(path, tokenizer, declared)


def _is_bytes(path: Path) -> bool:
    """Whether a file is what `ByteTokenizer` saves."""
    try:
        return path.stat().st_size < 100 and parse_json(path.read_bytes()) == {"kind": "bytes"}
    except (OSError, ValueError):
        return False


def _subword(path: Path, tokenizer: hf.Tokenizer, declared: Declared | None) -> SubwordTokenizer:
    try:
        return SubwordTokenizer(tokenizer, declared)
    except ValueError as err:
        raise ValueError(f"'{path}': {err}") from err


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text where the pre-tokenizer cuts it anyway, so that the tokens are those of the whole."""
    start = 0
    while len(text) - start > PIECE and (seam := _SEAM.search(text, start + PIECE)):
        yield text[start : seam.end()]
        start = seam.end()
    yield text[start:]


def _clean(text: str) -> str:
    """The text without what is no Unicode: the library refuses lone surrogates."""
    return utf8(text).decode("utf-8", errors="replace")


def first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
