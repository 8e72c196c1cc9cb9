"""Encoders from anywhere: a run of this project, a published folder, or a name on the hub; with their tokenizers."""

from pathlib import Path
from typing import Any, NamedTuple

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import Tokenizer, published_tokenizer, restore_tokenizer
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


def load_encoder(
    source: str | Path, *, step: Any = "latest", leave_dense: bool = False, masters: bool = False
) -> Pretrained:
    """Loads an encoder and its tokenizer. Changes nothing in the folder.

    Args:
      source: the folder of a run (of `pretrain`, `finetune` or `retrieve`), a folder in our own or a published layout,
        or a name on the Hugging Face hub.
      step: which checkpoint of a run: a step, "latest" or "best".
      leave_dense, masters: as in `zoo.from_pretrained`.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no encoder, or has no tokenizer that fits it.
    """
    if is_run(folder := Path(source)):
        model: Any = zoo.from_pretrained(folder, revision=step, masters=masters)
        return _checked(Pretrained(model, restore_tokenizer(folder), folder))
    folder = find_folder(source)
    return _checked(
        Pretrained(zoo.from_pretrained(folder, leave_dense=leave_dense), published_tokenizer(folder), folder)
    )


def _checked(loaded: Pretrained) -> Pretrained:
    if not isinstance(loaded.model, Encoder):
        raise ValueError(f"{loaded.folder} holds a {type(loaded.model).__name__}, expected an encoder")
    special, rows = special_tokens(loaded.tokenizer), loaded.model.config.padded_vocab_size
    # [MASK] may be lacking: not every model is asked to guess.
    in_rows = (*special.frame.opening, *special.frame.between, *special.frame.closing, special.pad)
    needed = max(loaded.tokenizer.vocab_size - 1, *in_rows) + 1
    if needed > rows:
        raise ValueError(f"{loaded.folder}: the tokenizer needs {needed} ids, the model has {rows} rows for them")
    return loaded
