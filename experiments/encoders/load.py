"""Encoders from anywhere: a run of this project, a published folder, or a name on the hub; with their tokenizers."""

from pathlib import Path
from typing import Any, NamedTuple

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import FILE_NAME, Tokenizer, restore_tokenizer, wordpiece
from zoo.published.pretrained import find_folder
from zoo.published.run_folder import is_run

Encoder = zoo.MaskedLM | zoo.SequenceClassifier | zoo.TokenClassifier


class Pretrained(NamedTuple):
    """What there is of a model."""

    model: Any
    """A `zoo.MaskedLM`, `zoo.SequenceClassifier` or `zoo.TokenClassifier`."""
    tokenizer: Tokenizer
    folder: Path
    """Where both lie."""


def load_encoder(source: str | Path, *, step: Any = "latest") -> Pretrained:
    """Loads an encoder and its tokenizer. Changes nothing in the folder.

    Args:
      source: the folder of a run (of `pretrain`, `finetune` or `retrieve`), a folder in our own or a published layout,
        or a name on the Hugging Face hub.
      step: which checkpoint of a run: a step, "latest" or "best".

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no encoder, or has no tokenizer that fits it.
    """
    if is_run(folder := Path(source)):
        return _checked(Pretrained(zoo.from_pretrained(folder, revision=step), restore_tokenizer(folder), folder))
    folder = find_folder(source)
    return _checked(Pretrained(zoo.from_pretrained(folder), published_tokenizer(folder), folder))


def published_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a published folder: its tokenizer.json, or bert-base-uncased's kind with its vocab.txt.

    Raises:
      ValueError: neither is there.
    """
    if (folder / FILE_NAME).is_file() or not (folder / "vocab.txt").is_file():
        return restore_tokenizer(folder)
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return wordpiece({token: i for i, token in enumerate(tokens)})


def _checked(loaded: Pretrained) -> Pretrained:
    if not isinstance(loaded.model, Encoder):
        raise ValueError(f"{loaded.folder} holds a {type(loaded.model).__name__}, expected an encoder")
    needed, rows = special_tokens(loaded.tokenizer).vocab_size, loaded.model.config.padded_vocab_size
    if needed > rows:
        raise ValueError(f"{loaded.folder}: the tokenizer needs {needed} ids, the model has {rows} rows for them")
    return loaded
