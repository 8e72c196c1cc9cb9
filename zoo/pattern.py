"""The pattern language: which mixers the blocks of a stack have, in words.

A pattern is words separated by blanks. A word is `mixer` or `mixer/channel` (a sequence mixer, then a channel mixer),
`*k` repeats it, `-` stands for none, and the list cycles until there are `n_layers` blocks:

    "mamba"              Mamba: no channel mixer
    "attn/mlp"           the Transformer
    "mamba2*3 attn/mlp"  three Mamba-2 blocks, then one Transformer block, and again
    "m2/monarch"         Monarch Mixer

A mixer or channel mixer may carry options, which replace those of the config in its blocks:

    "attn/mlp attn[window=65,rope_base=10000]/mlp*2"   one block that sees all, two that see near
"""

import re
from collections.abc import Iterable
from typing import Any

from zoo.mixers import CHANNEL_MIXERS, MIXERS
from zoo.names import unknown_name
from zoo.options import read_options, write_options

Word = tuple[str | None, str | None]


def parse_pattern(pattern: str, n_layers: int) -> tuple[Word, ...]:
    """Reads a pattern into one (mixer, channel mixer) a block; None where there is none.

        parse_pattern("mamba*2 attn/mlp", 4)  ->  (("mamba", None), ("mamba", None), ("attn", "mlp"), ("mamba", None))

    Options stay with their mixer, in one spelling whatever that of the pattern; `mixer_name` leaves them out:

        parse_pattern("attn[window=0064,bias=True]", 1)  ->  (("attn[bias=true,window=64]", None),)

    Raises:
      ValueError: an empty pattern, a word that is not understood, an unknown mixer or option (naming the nearest known
        one), a value that an option does not take, or more words than layers.
    """
    words: list[Word] = []
    for text in pattern.split():
        match = re.fullmatch(rf"({_MIXER})(?:/({_MIXER}))?(?:\*(\d+))?", text)
        if not match:
            raise ValueError(
                f"pattern={pattern!r}: cannot read {text!r}, expected mixer, mixer/channel or mixer*count, each mixer "
                "perhaps with [option=value,...], without blanks"
            )
        mixer, channel, count = match[1], match[2] or "-", int(match[3] or 1)
        if mixer == channel == "-" or count < 1:
            raise ValueError(f"pattern={pattern!r}: {text!r} is an empty block")
        try:
            block = (_read_word("mixer", mixer, MIXERS), _read_word("channel mixer", channel, CHANNEL_MIXERS))
        except ValueError as error:
            raise ValueError(f"pattern={pattern!r}: {error}") from error
        words += [block] * count
    if not words:
        raise ValueError(f"pattern={pattern!r}, expected at least one word, e.g. 'mamba' or 'attn/mlp'")
    if len(words) > n_layers:
        raise ValueError(f"pattern={pattern!r} has {len(words)} blocks, more than n_layers={n_layers}")
    return tuple(words[i % len(words)] for i in range(n_layers))


# A name, and options in brackets.
_MIXER = r"[^/*\s\[\]]+(?:\[[^/*\s\[\]]+\])?"


def _read_word(kind: str, text: str, known: Iterable[str]) -> str | None:
    """A word as `parse_pattern` gives it, out of a pattern."""
    name = mixer_name(text)
    if text == "-" or name is None:
        return None
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))
    return name + write_options(word_options(text))


def mixer_name(word: str | None) -> str | None:
    """The mixer of a pattern's word, or its channel mixer, without options: "attn[window=64]" -> "attn"."""
    return None if word is None else word.partition("[")[0]


def word_options(word: str) -> dict[str, Any]:
    """The options in a pattern's word: "attn[window=64]" -> {"window": 64}.

    Raises:
      ValueError: an option or value that the mixer does not have: names it.
    """
    name, _, text = word.partition("[")
    kind = MIXERS.get(name) or CHANNEL_MIXERS[name]
    return read_options(name, type(kind.options), text.removesuffix("]")) if text else {}
