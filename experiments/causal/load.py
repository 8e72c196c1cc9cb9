"""Causal language models from anywhere: a run of this project, a published folder, or a name on the hub."""

from pathlib import Path
from typing import NamedTuple

import zoo
from experiments.data.tokenizers import FILE_NAME, Tokenizer, load_tokenizer, restore_tokenizer
from zoo.published.pretrained import find_folder, read_config_file
from zoo.published.ssm_layout import read_config

# Published models that carry no tokenizer, by the size of their vocabulary: the one that they were trained with.
_TOKENIZERS = {
    **dict.fromkeys((50_277, 50_280, 50_288), "EleutherAI/gpt-neox-20b"),
    128_256: "meta-llama/Llama-3.1-8B",
}


class Pretrained(NamedTuple):
    """What there is of a model."""

    model: zoo.CausalLM
    tokenizer: Tokenizer
    folder: Path
    """Where the model lies."""


def load_published(source: str | Path, *, tokenizer: str | None = None, dtype: str | None = None) -> Pretrained:
    """Loads a published model and its tokenizer.

    Args:
      source: a folder in a published layout, or a name on the Hugging Face hub.
      tokenizer: another tokenizer than the model's, as `load_tokenizer` takes it. None: the one beside the weights, or
        the one that state-spaces' models were trained with and do not carry.
      dtype: of parameters and computation. None: as stored.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no causal language model, or has no tokenizer that fits it.
    """
    folder = find_folder(source)
    read = load_tokenizer(tokenizer) if tokenizer else published_tokenizer(source, folder)
    model = zoo.from_pretrained(folder, dtype=dtype)
    if not isinstance(model, zoo.CausalLM):
        what = type(model).__name__
        raise ValueError(f"{source} is a {what}; only a causal language model goes on with a text")
    if read.vocab_size > model.config.vocab_size:
        raise ValueError(f"--tokenizer has {read.vocab_size} ids, {source} has only {model.config.vocab_size} tokens")
    return Pretrained(model, read, folder)


def published_tokenizer(source: str | Path, folder: Path) -> Tokenizer:
    """The tokenizer beside the weights, or the one that state-spaces' models were trained with and do not carry.

    Args:
      source: what the model is called, for errors.
      folder: where it lies.

    Raises:
      ValueError: there is none, or it is out of reach.
    """
    if (folder / FILE_NAME).exists():
        return restore_tokenizer(folder)
    vocab_size = read_config(read_config_file(folder)[0]).vocab_size
    if vocab_size not in _TOKENIZERS:
        raise ValueError(f"{source} has no {FILE_NAME}; name one with --tokenizer")
    try:
        return load_tokenizer(_TOKENIZERS[vocab_size])
    except ValueError as error:
        raise ValueError(f"{source} has no {FILE_NAME}, and {error}; name one with --tokenizer") from error
