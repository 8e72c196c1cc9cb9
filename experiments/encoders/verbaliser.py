"""Classes as words: the masked-language-model head says which of them belongs in place of [MASK].

    "{text} It was [MASK]."  with  negative -> bad, positive -> good        no new parameters

Source: Schick & Schütze 2020, arXiv:2001.07676 (patterns and verbalisers); Clavié et al. 2025, arXiv:2502.03793 (one
[MASK], letters for options).
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.encoder_inputs import CHUNK, Encoded

SINGLE = "{text} It was [MASK]."
PAIR = "{text}? [MASK], {second}"
OPTIONS = "{text} {options} Answer: [MASK]"
OPTIONS_PAIR = "{text} {second} {options} Answer: [MASK]"
_SLOT = re.compile(r"(\{text\}|\{second\}|\[MASK\])")


class Verbaliser(NamedTuple):
    """What stands for the classes."""

    words: tuple[str, ...]
    """A word for each class."""
    ids: tuple[int, ...]
    """The one token of each."""
    template: str
    """Where the texts and [MASK] go."""


def choose(
    tokenizer: Tokenizer,
    classes: Sequence[str],
    *,
    words: Sequence[str] | None = None,
    template: str | None = None,
    pairs: bool = False,
) -> Verbaliser:
    """A word of one token for each class.

    Args:
      words: in the order of the classes. None: their own names, where each is one token; else the first token of each
        name that no other has taken; else the letters A, B, C, the names listed as options before the answer.
      template: with {text}, [MASK] and, for pairs, {second}; {options} becomes that list. None: one that suits.

    Raises:
      ValueError: words that are not one token each, or too few, or alike; a template that lacks a slot.
    """
    named = f"({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''})"
    if words is not None:
        if len(words) != len(classes):
            raise ValueError(
                f"--verbaliser has {len(words)} words, expected {len(classes)}, one for each class {named}"
            )
        ids = [one_token(tokenizer, word) for word in words]
        for word, token in zip(words, ids, strict=True):
            if token is None:
                raise ValueError(f"--verbaliser: {word!r} is {len(tokenizer.encode(word))} tokens, expected one")
        chosen = tuple(words), tuple(token for token in ids if token is not None)
        if len(set(chosen[1])) < len(classes):
            raise ValueError(
                f"--verbaliser {' '.join(words)!r} uses a token twice, expected one of its own for each class"
            )
    else:
        chosen = _own_names(tokenizer, classes) or _letters(tokenizer, classes, named)
    listed = words is None and chosen[0] == tuple(string.ascii_uppercase[: len(classes)]) != tuple(classes)
    if template is None:
        template = {(0, 0): SINGLE, (0, 1): PAIR, (1, 0): OPTIONS, (1, 1): OPTIONS_PAIR}[(int(listed), int(pairs))]
    options = " ".join(f"{word}: {name}" for word, name in zip(chosen[0], classes, strict=True))
    template = template.replace("{options}", options)
    for slot in ("{text}", "[MASK]", *(["{second}"] if pairs else [])):
        if template.count(slot) != 1:
            raise ValueError(f"--template {template!r} has {template.count(slot)} {slot}, expected one")
    if not pairs and "{second}" in template:
        raise ValueError(f"--template {template!r} has {{second}}, but there is no --data.second-column")
    return Verbaliser(*chosen, template)


def one_token(tokenizer: Tokenizer, word: str) -> int | None:
    """The token that a word is behind a space, or at the beginning; None where it is several, or unknown."""
    special = special_tokens(tokenizer)
    refused = {*special.all, special.unknown}
    for text in (f" {word}", word):
        ids = tokenizer.encode(text)
        if len(ids) == 1 and int(ids[0]) not in refused:
            return int(ids[0])
    return None


def _own_names(tokenizer: Tokenizer, classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The classes' names, or a token of each, where there are enough different ones."""
    whole = [one_token(tokenizer, name) for name in classes]
    if None not in whole and len(set(whole)) == len(classes):
        return tuple(classes), tuple(token for token in whole if token is not None)
    taken: dict[int, str] = {}
    for name in classes:
        parts = re.findall(r"[^\W_]+", name)
        for token in (int(token) for part in parts for token in tokenizer.encode(f" {part}")):
            word = tokenizer.decode([token]).strip()
            if word and token not in taken and one_token(tokenizer, word) == token:  # a byte may be a space alone
                taken[token] = word
                break
        else:
            return None
    return tuple(taken.values()), tuple(taken)


def _letters(tokenizer: Tokenizer, classes: Sequence[str], named: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    letters = tuple(string.ascii_uppercase[: len(classes)])
    ids = tuple(token for letter in letters if (token := one_token(tokenizer, letter)) is not None)
    if len(set(ids)) < len(classes):
        raise ValueError(
            f"--head mlm finds no token of its own for each of the {len(classes)} classes {named}; name "
            "them with --verbaliser"
        )
    return letters, ids


class Prompts(NamedTuple):
    """Texts in their template."""

    rows: list[Encoded]
    positions: np.ndarray
    """(n,) int32: where [MASK] is in each."""


def encode_prompts(
    tokenizer: Tokenizer, template: str, texts: Sequence[str], seconds: Sequence[str] | None, *, max_len: int
) -> Prompts:
    """[CLS] template [SEP], the texts cut at their ends where it is longer than max_len: the longer one first.

    Raises:
      ValueError: the template itself leaves no room for the texts.
    """
    special = special_tokens(tokenizer)
    parts = [part for part in _SLOT.split(template) if part]
    fixed: list[np.ndarray | str] = []
    for number, part in enumerate(parts):
        if part == "[MASK]":
            fixed.append(np.array([special.mask], np.int32))
        elif _SLOT.fullmatch(part):
            fixed.append(part)
        else:  # the space before a word belongs to its token, and so to [MASK]
            before_mask = number + 1 < len(parts) and parts[number + 1] == "[MASK]"
            fixed.append(tokenizer.encode(part.rstrip(" ") if before_mask else part))
    room = max_len - special.around - sum(len(part) for part in fixed if not isinstance(part, str))
    if room < 1 + (seconds is not None):
        raise ValueError(
            f"--template takes {max_len - room} of --max-len {max_len} tokens, which leaves no room for the text"
        )
    rows, positions = [], []
    for start in range(0, len(texts), CHUNK):
        first = tokenizer.encode_batch(texts[start : start + CHUNK])
        second = first if seconds is None else tokenizer.encode_batch(seconds[start : start + CHUNK])
        for a, b in zip(first, second, strict=True):
            keep = 0 if seconds is None else min(len(b), max(room // 2, room - len(a)))
            put = {"{text}": a[: room - keep], "{second}": b[:keep]}
            pieces = [put[part] if isinstance(part, str) else part for part in fixed]
            tokens = special.row(*pieces)
            place = len(special.frame.opening)
            for part, piece in zip(parts, pieces, strict=True):
                if part == "[MASK]":
                    break
                place += len(piece)
            rows.append(Encoded(tokens, np.zeros_like(tokens)))
            positions.append(place)
    return Prompts(rows, np.array(positions, np.int32))
