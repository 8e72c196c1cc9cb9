"""Causal language models from anywhere: a run of this project, a published folder, or a name on the hub."""

from pathlib import Path
from typing import Any, NamedTuple

import zoo
from experiments.data.tokenizers import FILE_NAME, Tokenizer, check_same, load_tokenizer, restore_tokenizer
from zoo.published import native_layout, ssm_layout
from zoo.published.pretrained import find_folder, read_config_file
from zoo.published.run_folder import MODEL_FILE, is_run, read_model_config

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
    spec: str
    """What `load_tokenizer` finds the tokenizer by."""


def load_causal(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    flag: str = "--tokenizer",
    masters: bool = False,
) -> Pretrained:
    """Loads a causal language model and its tokenizer. Changes nothing in the folder.

    Args:
      source: the folder of a run of experiments.causal_lm, a folder in our own or a published layout, or a name on the
        Hugging Face hub.
      tokenizer: for a model that has none beside its weights, as `load_tokenizer` takes it. None: the one that
        state-spaces' models were trained with.
      dtype: of a published model's parameters and computation. None: as stored. A run has its own.
      flag: what names a tokenizer, for errors.
      masters: of a run, see `zoo.from_pretrained`.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no causal language model, or has no tokenizer that fits it, or another one.
    """
    folder = Path(source)
    if is_run(folder):
        own = load_run(folder, masters=masters)
    else:
        folder = find_folder(source)
        has_one = (folder / FILE_NAME).is_file()
        own = load_published(source, tokenizer=None if has_one else tokenizer, dtype=dtype, flag=flag)
        if not has_one:
            return own
    if tokenizer is not None:
        check_same(tokenizer, own.tokenizer, flag=flag, source=source)
    return own


def load_run(folder: Path, *, step: Any = "latest", allow_nonfinite: bool = False, masters: bool = False) -> Pretrained:
    """Loads the model and the tokenizer of a run of experiments.causal_lm. Changes nothing in the folder.

    Args:
      folder: the run's.
      step: a checkpoint's step, "latest" or "best".
      allow_nonfinite: whether weights may be infinite or no numbers.
      masters: see `zoo.from_pretrained`.

    Raises:
      FileNotFoundError: no run, or no sound checkpoint, there.
      ValueError: a run of another kind of model, or a checkpoint that does not fit its configuration.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is no config.json in it")
    said = read_model_config(folder) if (folder / MODEL_FILE).is_file() else None
    if said is not None and not isinstance(said, zoo.CausalLMConfig):
        what = type(said).__name__.removesuffix("Config")
        raise ValueError(f"{folder} holds a {what}, expected a causal language model")
    how: dict[str, Any] = {"revision": step, "allow_nonfinite": allow_nonfinite, "masters": masters}
    model = zoo.from_pretrained(folder, kind=zoo.CausalLM, **how)
    return Pretrained(model, restore_tokenizer(folder), folder, str(folder))


def load_published(
    source: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    flag: str = "--tokenizer",
    allow_nonfinite: bool = False,
) -> Pretrained:
    """Loads a published model and its tokenizer.

    Args:
      source: a folder in our own or a published layout, or a name on the Hugging Face hub.
      tokenizer: another tokenizer than the model's, as `load_tokenizer` takes it. None: the one beside the weights, or
        the one that state-spaces' models were trained with and do not carry.
      dtype: of parameters and computation. None: as stored.
      flag: what names a tokenizer, for errors.
      allow_nonfinite: whether weights may be infinite or no numbers.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no causal language model, or has no tokenizer that fits it.
    """
    folder = find_folder(source)
    spec = tokenizer or _tokenizer_of(source, folder, flag)
    try:
        read = load_tokenizer(spec)
    except ValueError as error:
        if tokenizer or (folder / FILE_NAME).is_file():
            raise
        raise ValueError(f"{source} has no {FILE_NAME}, and {error}; name one with {flag}") from error
    model = zoo.from_pretrained(folder, dtype=dtype, allow_nonfinite=allow_nonfinite)
    if not isinstance(model, zoo.CausalLM):
        what = type(model).__name__
        raise ValueError(f"{source} is a {what}; only a causal language model goes on with a text")
    if read.vocab_size > model.config.vocab_size:
        raise ValueError(f"{flag} has {read.vocab_size} ids, {source} has only {model.config.vocab_size} tokens")
    return Pretrained(model, read, folder, spec)


def _tokenizer_of(source: str | Path, folder: Path, flag: str) -> str:
    """The folder, where a tokenizer lies beside the weights, or the hub's name of the one they were trained with."""
    if (folder / FILE_NAME).is_file():
        return str(folder)
    raw, _ = read_config_file(folder)
    read = native_layout.read_config if native_layout.is_native(raw) else ssm_layout.read_config
    vocab_size = getattr(read(raw), "vocab_size", 0)
    if vocab_size not in _TOKENIZERS:
        raise ValueError(f"{source} has no {FILE_NAME}; name one with {flag}")
    return _TOKENIZERS[vocab_size]
