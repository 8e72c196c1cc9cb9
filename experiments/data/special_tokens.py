"""What an encoder adds to a text, whatever its tokenizer: [CLS], [SEP], [MASK] and padding; and where words begin.

The tokenizer's files say what these are: its post-processor what stands around one text and between two,
tokenizer_config.json and special_tokens_map.json which tokens hide and fill up. A tokenizer without such files, or of
which they do not say it, has them by their usual names; and what it has no name for is put behind its vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.tokenizer_files import Frame
from experiments.data.tokenizers import ByteTokenizer, Tokenizer

# What tokenizers usually call each of them.
_NAMES = {
    "cls": ("[CLS]", "<s>", "<|begin_of_text|>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
}
_UNKNOWN = ("[UNK]", "<unk>")


class SpecialTokens(NamedTuple):
    """Ids of the tokens that are not text."""

    cls: int
    """Opens a row, of most tokenizers."""
    sep: int
    """Ends each text of a row, of most tokenizers."""
    mask: int
    """Stands where a token is to be guessed."""
    pad: int
    """Fills a row up."""
    vocab_size: int
    """Ids that a model needs: the tokenizer's, and one more for each token that it lacks."""
    all: frozenset[int]
    """Every id that is not text, the tokenizer's own others (the unknown token apart) included."""
    frame: Frame
    """What stands before a text, between two, and behind: (cls,), (sep,), (sep,) of most tokenizers."""
    unknown: int | None
    """Stands for text that the vocabulary lacks; None where there is no such token."""

    @property
    def around(self) -> int:
        """How many tokens a row has besides those of its one text."""
        return len(self.frame.opening) + len(self.frame.closing)

    def row(self, *parts: Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens of a text, in one part or several, between its special ones: (n,) int32."""
        whole = (self.frame.opening, *parts, self.frame.closing)
        return np.concatenate([np.asarray(part, np.int32) for part in whole])


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of a tokenizer. Those that it has no name for get the ids behind its vocabulary."""
    vocabulary, size = tokenizer.vocabulary(), tokenizer.vocab_size
    roles = {} if tokenizer.declared is None else tokenizer.declared.roles
    frame, sep, ids = tokenizer.frame, tokenizer.eot, {}
    if frame is not None:
        ends = frame.closing or frame.between or frame.opening
        sep, ids["cls"] = ends[-1], (frame.opening or ends)[0]
    elif tokenizer.declared is not None:
        sep = next((vocabulary[name] for name in _named(roles, "sep") if name in vocabulary), sep)
    for role, names in _NAMES.items():
        if role not in ids:
            known = [*_named(roles, role), *names, *(_named(roles, "bos") if role == "cls" else ())]
            # What fills up is not looked at, so that a row's last token can do it as well as one of its own.
            lacking = sep if role == "pad" and frame is not None else size
            ids[role] = next((vocabulary[name] for name in known if name in vocabulary), lacking)
            size += ids[role] == size
    unknown = next((vocabulary[name] for name in (*_named(roles, "unk"), *_UNKNOWN) if name in vocabulary), None)
    others = {i for name, i in vocabulary.items() if name[:1] + name[-1:] in ("[]", "<>") and _is_special(name)}
    if tokenizer.declared is not None:
        others |= tokenizer.special_ids() - {unknown}
    if frame is None:
        frame = Frame((ids["cls"],), (sep,), (sep,), 1)
    around = {*frame.opening, *frame.between, *frame.closing}
    return SpecialTokens(
        **ids,
        sep=sep,
        vocab_size=size,
        all=frozenset({*ids.values(), tokenizer.eot, sep, *around, *others}),
        frame=frame,
        unknown=unknown,
    )


def _named(roles: Mapping[str, str], role: str) -> list[str]:
    """How the files name a token, by what it is for."""
    return [roles[name] for name in [f"{role}_token"] if name in roles]


def _is_special(name: str) -> bool:
    """Whether a token in brackets is one of the usual markers, rather than text such as "<b>" or "[1]"."""
    inner = name[1:-1].strip("|")
    known = {"s", "/s", "pad", "mask", "eos", "bos", "endoftext", "begin_of_text", "end_of_text"}
    return inner in known or inner in {"CLS", "SEP", "MASK", "PAD", "EOS", "BOS"} or inner.startswith("unused")


def text_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Every id that is text, for random replacements: (n,) int32."""
    known = sorted(set(tokenizer.vocabulary().values())) or range(tokenizer.vocab_size)
    special = special_tokens(tokenizer).all
    return np.array([i for i in known if i not in special], np.int32)


def whole_words(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are parts of one word: t belongs to the word of the token s before it where inner[t] & open[s].

    Returns:
      (inner, open), each (vocab_size,) bool: inner, what begins inside a word ("##ing"; a letter); open, what does not
      end one.
    """
    special = special_tokens(tokenizer)
    inner, open_ = np.zeros((2, special.vocab_size), bool)
    if isinstance(tokenizer, ByteTokenizer):
        of_word = np.array([i >= 128 or chr(i).isalnum() or chr(i) == "_" for i in range(256)])
        inner[:256] = open_[:256] = of_word
        return inner, open_
    for token, i in tokenizer.vocabulary().items():
        if i in special.all or not token:
            continue
        if tokenizer.kind == "wordpiece":
            inner[i], open_[i] = token.startswith("##"), True
        elif tokenizer.kind == "unigram" or token.startswith("▁"):
            inner[i], open_[i] = not token.startswith("▁") and token[0].isalnum(), token[-1].isalnum()
        else:
            inner[i], open_[i] = _of_word(token[0]), _of_word(token[-1])
    return inner, open_


def _of_word(character: str) -> bool:
    """Whether the byte that a byte-level BPE writes as this character is a letter's, a digit's or beyond ASCII."""
    if character.isascii():
        return character.isalnum() or character == "_"
    # Bytes without a printable character are written as U+0100 and up: 0 to 32, then 127, then those from 128 on.
    return not 0x100 <= ord(character) <= 0x121
