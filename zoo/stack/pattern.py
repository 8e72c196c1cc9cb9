"""The pattern language: which mixers the blocks of a stack have, in words.

A pattern is words separated by blanks, and the list of them cycles until there are `n_layers` blocks. A word is
`mixer` or `mixer/channel` (a sequence mixer, then a channel mixer), and `-` stands for none:

    "mamba"                        Mamba: no channel mixer
    "attn/mlp"                     the Transformer
    "m2/monarch"                   Monarch Mixer
    "mamba2+attn/mlp"              both mixers on one normed input, their outputs added, as in Falcon-H1

`*k` repeats a word, or several in parentheses:

    "mamba2*3 attn/mlp"            three Mamba-2 blocks, then one Transformer block, and again
    "(mamba2*3 attn/mlp)*4 mamba2" the same four times, and one more

Blocks of words with the same `@name` are one block: it has its parameters once, and a state at each depth:

    "mamba*6 attn/mlp@a"           every seventh block is the same Transformer block, as in Zamba
    "attn/mlp@a"                   ALBERT

A mixer or channel mixer may carry options, which replace those of the config in its blocks:

    "attn/mlp attn[window=65,rope_base=10000]/mlp*2"   one block that sees all, two that see near

A number behind a block is the share of the positions that go through it, the others go around (mixture of depths); with
`cosine` it is that of the block's depth, fewer with depth (p-MoD), and all in the first blocks:

    "attn/mlp attn/mlp:0.125"      every second block takes an eighth of the positions
    "mamba:cosine"                 of 8 blocks the first two take all, the others 0.8117 to 0.15

Megatron's letters are read too, without blanks, each a block of its own: M is `mamba2`, * is `attn`, - is `-/mlp` and E
is `-/moe`.

    "M-M-M-M*-"                    Nemotron-H's: four times Mamba-2 and an MLP, and attention before the last MLP

Source of the letters: megatron/core/ssm/mamba_hybrid_layer_allocation.py in NVIDIA/Megatron-LM; Waleffe et al. 2024,
arXiv:2406.07887.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from zoo.layers.depth_router import check_capacity
from zoo.layers.names import unknown_name
from zoo.stack.capacities import cosine_capacities
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, Kind, find_kind
from zoo.stack.options import read_options, write_options

Style = Literal["words", "megatron"]

# Megatron's letters for what is one residual layer there, and a block here.
LETTERS = {"M": "mamba2", "*": "attn", "-": "-/mlp", "E": "-/moe"}


class Word(NamedTuple):
    """One block of a pattern. Its mixers have their options in one spelling, whatever that of the pattern.

    Examples:
      >>> zoo.parse_pattern("attn/mlp", 1)
      (Word(mixers=('attn',), channel='mlp', shared=None, capacity=None),)
    """

    mixers: tuple[str, ...]
    """Sequence mixers side by side, mostly one; empty where there is none."""
    channel: str | None = None
    """Channel mixer behind them."""
    shared: str | None = None
    """Name of the block that all words with this name are."""
    capacity: float | None = None
    """The share of the positions that go through it, as a router says. None: all, without a router."""

    @property
    def plain(self) -> "Word":
        """The word without options."""
        return self._replace(mixers=tuple(map(mixer_name, self.mixers)), channel=mixer_name(self.channel or "") or None)

    def __str__(self) -> str:
        """The word as a pattern spells it."""
        capacity = None if self.capacity is None else f"{self.capacity:g}"
        parts = ("/", self.channel), (":", capacity), ("@", self.shared)
        return ("+".join(self.mixers) or "-") + "".join(before + text for before, text in parts if text)


class Repeat(NamedTuple):
    """A part of a pattern that comes several times in a row."""

    items: "tuple[Word | Repeat, ...]"
    times: int


Folded = tuple[Word | Repeat, ...]


def parse_pattern(pattern: str, n_layers: int) -> tuple[Word, ...]:
    """Reads a pattern into one word a block.

        parse_pattern("mamba*2 attn/mlp", 3)  ->  (Word(("mamba",)), Word(("mamba",)), Word(("attn",), "mlp"))
        parse_pattern("attn[window=0064,bias=True]", 1)  ->  (Word(("attn[bias=true,window=64]",)),)

    Raises:
      ValueError: an empty pattern, a word that is not understood, an unknown mixer, option or letter (naming the known,
        and the nearest), a value that an option does not take, or more words than layers.

    Examples:
      >>> [word.mixers for word in zoo.parse_pattern("mamba2*2 attn/mlp", 4)]
      [('mamba2',), ('mamba2',), ('attn',), ('mamba2',)]
    """
    try:
        words = _read(_spell_out(pattern.strip()), n_layers)
    except ValueError as error:
        raise ValueError(f"pattern={pattern!r}: {error}") from error
    if not words:
        raise ValueError(f"pattern={pattern!r}, expected at least one word, e.g. 'mamba' or 'attn/mlp'")
    if len(words) > n_layers:
        raise ValueError(f"pattern={pattern!r} has {len(words)} blocks, more than n_layers={n_layers}")
    by_depth = cosine_capacities(n_layers)
    cycled = [words[i % len(words)] for i in range(n_layers)]
    for i, word in enumerate(cycled):
        if word.capacity == _BY_DEPTH:
            if word.shared:
                raise ValueError(f"pattern={pattern!r}: {word.shared!r} is one block, expected a number for cosine")
            cycled[i] = word._replace(capacity=by_depth[i])
    return tuple(cycled)


def pattern_mixers(pattern: str, n_layers: int) -> set[str]:
    """The sequence mixers, with their options, of all words of a pattern."""
    return {mixer for word in parse_pattern(pattern, n_layers) for mixer in word.mixers}


def format_pattern(words: tuple[Word, ...], style: Style = "words") -> str:
    """The canonical pattern of some words: with as few written as can be, or in Megatron's letters.

        format_pattern(parse_pattern("mamba*2 attn/mlp", 7))  ->  "(mamba*2 attn/mlp)*2 mamba"

    Raises:
      ValueError: an unknown style, or a word that has no letter.

    Examples:
      >>> zoo.format_pattern(zoo.parse_pattern("mamba*2 attn/mlp", 7))
      '(mamba*2 attn/mlp)*2 mamba'
    """
    if style not in get_args(Style):
        raise ValueError(f"style={style!r}, expected 'words' or 'megatron'")
    if style == "words":
        return _write(fold(words))
    letters = {word: letter for letter, word in LETTERS.items()}
    if unwritten := [word for word in map(str, words) if word not in letters]:
        raise ValueError(f"{unwritten[0]!r} has no letter in Megatron's patterns, only {', '.join(letters)}")
    return "".join(letters[str(word)] for word in words)


def canonical_pattern(pattern: str, n_layers: int, style: Style = "words") -> str:
    """What `format_pattern` makes of a pattern: one spelling for all that say the same, which tells every layer.

        canonical_pattern("M-M-M-M*-", 9)  ->  "(mamba2 -/mlp)*3 mamba2 attn -/mlp"

    Raises:
      ValueError: as `parse_pattern` and `format_pattern`.

    Examples:
      >>> zoo.canonical_pattern("mamba mamba attn/mlp", 3)
      'mamba*2 attn/mlp'
    """
    return format_pattern(parse_pattern(pattern, n_layers), style)


# Up to so many words the shortest way to write them is searched for, and in longer ones periods up to half of it.
_SEARCHED = 128


@functools.lru_cache
def fold(words: tuple[Word, ...]) -> Folded:
    """Words with what comes several times in a row written once: of all ways, one that writes the fewest words.

    That takes the time of the cube of their number, 0.4 s for 128 words. Of more, from the first word on, each time the
    period that saves the most is taken, in the time of their number.
    """
    if len(words) <= _SEARCHED:
        return _fewest(words)
    items: list[Word | Repeat] = []
    i = 0
    while i < len(words):
        period = max(range(1, _SEARCHED // 2 + 1), key=lambda p: (_repeated(words, i, p), -p))
        saved = _repeated(words, i, period)
        items += [Repeat(_fewest(words[i : i + period]), 1 + saved // period)] if saved else [words[i]]
        i += saved + period if saved else 1
    return tuple(items)


def _repeated(words: tuple[Word, ...], start: int, period: int) -> int:
    """How many words after the first `period` from a start are only these again, in whole periods."""
    once, end = words[start : start + period], start + period
    while len(once) == period and words[end : end + period] == once:
        end += period
    return end - start - period


def _fewest(words: tuple[Word, ...]) -> Folded:
    # (i, j) -> how many words the best way writes for words i to j, and that way; shorter stretches come first.
    best: dict[tuple[int, int], tuple[int, Folded]] = {(i, i + 1): (1, (word,)) for i, word in enumerate(words)}
    for length in range(2, len(words) + 1):
        for i in range(len(words) - length + 1):
            j = i + length
            written, back = min((best[i, k][0] + best[k, j][0], j - k) for k in range(i + 1, j))
            items = best[i, j - back][1] + best[j - back, j][1]
            periods = (p for p in range(1, length) if length % p == 0 and words[i : j - p] == words[i + p : j])
            period = next(periods, None)
            if period and best[i, i + period][0] <= written:
                written, once = best[i, i + period]
                items = (Repeat(once, length // period),)
            best[i, j] = written, items
    return best[0, len(words)][1] if words else ()


def _write(items: Folded) -> str:
    texts = []
    for item in items:
        if isinstance(item, Repeat):
            once = _write(item.items)
            texts.append(f"({once})*{item.times}" if len(item.items) > 1 else f"{once}*{item.times}")
        else:
            texts.append(str(item))
    return " ".join(texts)


def _spell_out(pattern: str) -> str:
    """A pattern in words, where it is in letters. No word consists of their characters but "-", which is none."""
    if pattern == "-" or not re.fullmatch(r"[A-Z*|-]+", pattern):
        return pattern
    for letter in pattern:
        if letter not in LETTERS:
            raise ValueError(unknown_name("letter", letter, LETTERS))
    return " ".join(LETTERS[letter] for letter in pattern)


# A name, and options in brackets.
_MIXER = r"[^/*+@:\s\[\]]+(?:\[[^/*\s\[\]]+\])?"
# What a word that has its capacity by its depth has until that is known.
_BY_DEPTH = 0.0
_COUNT = r"(?:\*(?P<count>\d+))?"
_CAPACITY = r"(?::(?P<capacity>[\w.+-]+))?"
_WORD = rf"(?P<mixers>{_MIXER}(?:\+{_MIXER})*)(?:/(?P<channel>{_MIXER}))?{_CAPACITY}(?:@(?P<shared>\w+))?{_COUNT}"
# Of a pattern with too many blocks so many are counted one by one.
_MOST_SPELT = 100_000
_EXPECTED = (
    "expected mixer or mixer+mixer, perhaps with /channel, :share, @name and *count, in this order and without blanks, "
    "each mixer perhaps with [option=value,...]; several words as (...)*count"
)


def _read(pattern: str, most: int) -> list[Word]:
    """The words of a pattern, each as often as it says; `most` blocks have a place."""
    groups: list[list[Word]] = [[]]  # one for each open parenthesis, and that of all
    shared: dict[str, Word] = {}
    for text in re.findall(r"\(|\)[^\s()]*|[^\s()]+", pattern):
        if text == "(":
            groups.append([])
            continue
        closes = text.startswith(")")
        match = re.fullmatch(rf"\){_COUNT}" if closes else _WORD, text)
        if not match:
            raise ValueError(f"cannot read {text!r}, {_EXPECTED}")
        if closes and len(groups) == 1:
            raise ValueError(f"{text!r} closes no parenthesis")
        words = groups.pop() if closes else [_read_word(match)]
        count = int(match["count"] or 1)
        if not words or not any(words[0][:2]) or count < 1:
            raise ValueError(f"{text!r} is an empty {'group' if closes else 'block'}")
        if (name := words[0].shared) and (first := shared.setdefault(name, words[0])) != words[0]:
            raise ValueError(f"{str(first)!r} and {str(words[0])!r}, expected @{name} to be one block")
        if (n := len(groups[-1]) + len(words) * count) > max(most, _MOST_SPELT):
            raise ValueError(f"{text!r:.60} makes {n:,} blocks, more than n_layers={most}")
        groups[-1] += words * count
    if len(groups) > 1:
        raise ValueError("'(' is not closed")
    return groups[0]


def _read_word(match: re.Match[str]) -> Word:
    names = () if match["mixers"] == "-" else re.findall(_MIXER, match["mixers"])
    channel = match["channel"] or "-"
    return Word(
        tuple(_read_mixer("mixer", text, MIXERS) for text in names),
        None if channel == "-" else _read_mixer("channel mixer", channel, CHANNEL_MIXERS),
        match["shared"],
        _read_capacity(match["capacity"]),
    )


def _read_capacity(text: str | None) -> float | None:
    if text is None or text == "cosine":
        return None if text is None else _BY_DEPTH
    try:
        capacity = float(text)
    except ValueError as error:
        raise ValueError(f"capacity={text!r}, expected a number or cosine") from error
    check_capacity(capacity)
    return capacity


def _read_mixer(kind: str, text: str, known: Mapping[str, Kind]) -> str:
    """A mixer's text in its one spelling."""
    name = mixer_name(text)
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))
    return name + write_options(word_options(text))


def mixer_name(mixer: str) -> str:
    """A word's mixer or channel mixer without options: "attn[window=64]" -> "attn".

    Examples:
      >>> zoo.mixer_name("attn[window=64]")
      'attn'
    """
    return mixer.partition("[")[0]


def word_options(mixer: str) -> dict[str, Any]:
    """The options of a word's mixer or channel mixer: "attn[window=64]" -> {"window": 64}.

    Raises:
      ValueError: an option or value that the mixer does not have: names it.
    """
    name, _, text = mixer.partition("[")
    return read_options(name, type(find_kind(name).config_default), text.removesuffix("]")) if text else {}
