"""The pattern language: which mixers the blocks of a stack have, in words.

A pattern is words separated by blanks. A word is `mixer` or `mixer/channel` (a sequence mixer, then a channel mixer),
`*k` repeats it, `-` stands for none, and the list cycles until there are `n_layers` blocks:

    "mamba"              Mamba: no channel mixer
    "attn/mlp"           the Transformer
    "mamba2*3 attn/mlp"  three Mamba-2 blocks, then one Transformer block, and again
    "m2/monarch"         Monarch Mixer
    "mamba2+attn/mlp"    both mixers on one normed input, their outputs added, as in Falcon-H1

A mixer or channel mixer may carry options, which replace those of the config in its blocks:

    "attn/mlp attn[window=65,rope_base=10000]/mlp*2"   one block that sees all, two that see near
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from zoo.mixers import CHANNEL_MIXERS, MIXERS, Kind
from zoo.names import unknown_name
from zoo.options import read_options, write_options


class Word(NamedTuple):
    """One block of a pattern. Its mixers have their options in one spelling, whatever that of the pattern."""

    mixers: tuple[str, ...]
    """Sequence mixers side by side, mostly one; empty where there is none."""
    channel: str | None = None
    """Channel mixer behind them."""

    @property
    def plain(self) -> "Word":
        """The word without options."""
        return self._replace(mixers=tuple(map(mixer_name, self.mixers)), channel=mixer_name(self.channel or "") or None)


def parse_pattern(pattern: str, n_layers: int) -> tuple[Word, ...]:
    """Reads a pattern into one word a block.

        parse_pattern("mamba*2 attn/mlp", 3)  ->  (Word(("mamba",)), Word(("mamba",)), Word(("attn",), "mlp"))
        parse_pattern("attn[window=0064,bias=True]", 1)  ->  (Word(("attn[bias=true,window=64]",)),)

    Raises:
      ValueError: an empty pattern, a word that is not understood, an unknown mixer or option (naming the nearest known
        one), a value that an option does not take, or more words than layers.
    """
    words: list[Word] = []
    for text in pattern.split():
        match = re.fullmatch(_WORD, text)
        if not match:
            raise ValueError(
                f"pattern={pattern!r}: cannot read {text!r}, expected mixer, mixer/channel or either with +mixer or "
                "*count, each mixer perhaps with [option=value,...], without blanks"
            )
        count = int(match["count"] or 1)
        try:
            word = _read_word(match["mixers"], match["channel"] or "-")
        except ValueError as error:
            raise ValueError(f"pattern={pattern!r}: {error}") from error
        if word == Word(()) or count < 1:
            raise ValueError(f"pattern={pattern!r}: {text!r} is an empty block")
        words += [word] * count
    if not words:
        raise ValueError(f"pattern={pattern!r}, expected at least one word, e.g. 'mamba' or 'attn/mlp'")
    if len(words) > n_layers:
        raise ValueError(f"pattern={pattern!r} has {len(words)} blocks, more than n_layers={n_layers}")
    return tuple(words[i % len(words)] for i in range(n_layers))


def pattern_mixers(pattern: str, n_layers: int) -> set[str]:
    """The sequence mixers, with their options, of all words of a pattern."""
    return {mixer for word in parse_pattern(pattern, n_layers) for mixer in word.mixers}


# A name, and options in brackets.
_MIXER = r"[^/*+\s\[\]]+(?:\[[^/*\s\[\]]+\])?"
_WORD = rf"(?P<mixers>{_MIXER}(?:\+{_MIXER})*)(?:/(?P<channel>{_MIXER}))?(?:\*(?P<count>\d+))?"


def _read_word(mixers: str, channel: str) -> Word:
    names = () if mixers == "-" else re.findall(_MIXER, mixers)
    return Word(
        tuple(_read_mixer("mixer", text, MIXERS) for text in names),
        None if channel == "-" else _read_mixer("channel mixer", channel, CHANNEL_MIXERS),
    )


def _read_mixer(kind: str, text: str, known: Mapping[str, Kind]) -> str:
    """A mixer's text in its one spelling."""
    name = mixer_name(text)
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))
    return name + write_options(word_options(text))


def mixer_name(mixer: str) -> str:
    """A word's mixer or channel mixer without options: "attn[window=64]" -> "attn"."""
    return mixer.partition("[")[0]


def word_options(mixer: str) -> dict[str, Any]:
    """The options of a word's mixer or channel mixer: "attn[window=64]" -> {"window": 64}.

    Raises:
      ValueError: an option or value that the mixer does not have: names it.
    """
    name, _, text = mixer.partition("[")
    kind = MIXERS.get(name) or CHANNEL_MIXERS[name]
    return read_options(name, type(kind.options), text.removesuffix("]")) if text else {}
