"""The files of a tokenizer out of a repository on the Hugging Face hub: from its cache, or from the network."""

import re
from pathlib import Path

from experiments.data.tokenizer_files import CONFIG_FILE, FILE_NAME, FILES, VOCABULARY

_KNOWN = (
    "expected 'bytes', 'bpe', 'wordpiece', a tokenizer.json, a folder that holds one, or a repository on the hub "
    "that does"
)


def find_in_hub(name: str) -> Path:
    """The folder that holds the files of a repository's tokenizer.

    What is in the cache is taken as it is, where it holds a tokenizer_config.json; otherwise the hub is asked once what
    there is, and where it does not answer, a tokenizer.json in the cache has to do.

    Raises:
      ValueError: no such repository, no access to it, or no tokenizer in it.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".json"):
        raise ValueError(f"tokenizer '{name}' does not exist; {_KNOWN}")
    try:
        if _cached(name, CONFIG_FILE) is None:
            _download(name)
        found = [path for file in (FILE_NAME, VOCABULARY) if (path := _cached(name, file)) is not None]
        if not found:
            raise ValueError(f"it has neither {FILE_NAME} nor {VOCABULARY}")
    except Exception as error:  # a dozen kinds, from no network to a gated repository
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tokenizer '{name}' cannot be loaded from the hub ({said}); {_KNOWN}") from error
    return found[0].parent


def _download(name: str) -> None:
    import huggingface_hub

    try:
        # One quick question first: a download without a network is retried for half a minute.
        there = huggingface_hub.HfApi().model_info(name, timeout=10).siblings or ()
        for file in sorted({one.rfilename for one in there} & {*FILES, "config.json"}):
            huggingface_hub.hf_hub_download(name, file)
    except Exception:
        if _cached(name, FILE_NAME) is None:
            raise


def _cached(name: str, file: str) -> Path | None:
    import huggingface_hub.errors

    try:
        return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=True))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return None
