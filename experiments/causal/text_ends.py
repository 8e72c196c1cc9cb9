"""What stands before a prompt and what ends a text, as a causal model's folder says it."""

from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.tokenizers import Tokenizer
from zoo.published.json_files import read_json

# The first that says something is believed, as in transformers.
_FILES = ("generation_config.json", "config.json", "params.json")


class TextEnds(NamedTuple):
    """Token ids around the texts of a model."""

    opening: tuple[int, ...]
    """Stand before every prompt."""
    closing: tuple[int, ...]
    """Each of them ends a text."""


def run_ends(tokenizer: Tokenizer) -> TextEnds:
    """Those of a run: its documents all begin with eot, and end where the next begins."""
    return TextEnds((tokenizer.eot,), (tokenizer.eot,))


def chat_ends(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> TextEnds:
    """Those of a run in a chat: its template opens a text, which also ends where the model it was begun from ends one.

    Arguments and errors are those of `published_ends`.
    """
    theirs = published_ends(folder, tokenizer, vocab_size).closing
    return TextEnds((), tuple(dict.fromkeys((tokenizer.eot, *theirs))))


def published_ends(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> TextEnds:
    """Those of a published model.

    What opens a text is what its tokenizer puts there; what ends it, `eos_token_id` of generation_config.json or
    config.json, one id or several, or else the tokenizer's own token for it.

    Args:
      folder: where the files are.
      tokenizer: the model's.
      vocab_size: ids that the model knows.

    Raises:
      ValueError: an id that is none: names the file.
    """
    opening = () if tokenizer.frame is None else tokenizer.frame.opening
    for name in _FILES:
        said = _said(folder / name)
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocab_size:
                raise ValueError(f"{folder / name}: eos_token_id={said!r}, expected ids from 0 to {vocab_size - 1}")
        if ids:
            return TextEnds(tuple(opening), tuple(ids))
    return TextEnds(tuple(opening), (tokenizer.eot,))


def _said(path: Path) -> Any:
    """`eos_token_id` of a file, or None."""
    if not path.is_file():
        return None
    content = read_json(path, kind=None)
    return content.get("eos_token_id") if isinstance(content, dict) else None
