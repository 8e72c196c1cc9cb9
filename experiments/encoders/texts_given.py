"""What a person gives a model to read, checked: what is no text is refused in one line that says what was expected."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.data.labelled import Examples
from experiments.encoders.objectives import Target

_FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def check_texts(texts: Any, seconds: Any, target: Target) -> Examples:
    """The examples that are given, without labels.

    Args:
      texts: strings, or for tags lists of words; a string for tags is split at white space.
      seconds: second texts, or contexts.
      target: what the model was tuned for.

    Raises:
      ValueError: names the argument, and the first that is wrong.
    """
    texts = _as_list(texts, "texts")
    if target.kind == "tagging":
        texts = [_words(words, f"texts[{i}]") for i, words in enumerate(texts)]
    else:
        _check_strings(texts, "texts")
    if seconds is None:
        if target.kind == "span-qa":
            raise ValueError("seconds=None, expected the contexts that the answers are in")
        if target.pairs or "{second}" in target.template:
            raise ValueError("seconds=None, expected the second text of each: the model was tuned on pairs")
        return Examples(texts, None, None)
    if target.kind == "tagging" or (target.pairs is False and target.kind != "span-qa"):
        raise ValueError("seconds are given, expected None: the model was tuned on single texts")
    seconds = _as_list(seconds, "seconds")
    if len(seconds) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(seconds)} seconds, expected as many")
    _check_strings(seconds, "seconds")
    return Examples(texts, seconds, None)


def _as_list(texts: Any, name: str) -> list[Any]:
    if isinstance(texts, str | bytes | Path | Mapping) or not hasattr(texts, "__iter__"):
        what = "string" if isinstance(texts, str) else type(texts).__name__
        raise ValueError(f"{name} is the {what} {str(texts)!r:.60}, expected a list of texts")
    return list(texts)


def _words(words: Any, where: str) -> list[str]:
    if isinstance(words, str):
        _check_no_file(words, where)
        return words.split()
    if isinstance(words, Sequence) and all(isinstance(word, str) and word for word in words):
        return list(words)
    raise ValueError(f"{where} is {words!r:.60}, expected a list of words, or a string of them")


def _check_strings(texts: Sequence[Any], name: str) -> None:
    for i, text in enumerate(texts):
        if isinstance(text, Path):
            raise ValueError(f"{name}[{i}] is the path {text}, expected a text; read the file first")
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] is {text!r:.60}, expected a string")
        _check_no_file(text, f"{name}[{i}]")


def _check_no_file(text: str, where: str) -> None:
    if len(text) < 256 and text.endswith(_FILES) and "\n" not in text and Path(text).is_file():
        raise ValueError(f"{where} names the file {text}, expected a text; read the file first, or use the command")
