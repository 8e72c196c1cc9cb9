"""A model's folder of which some tokens stay: its tokenizer, and every id that its files name, are numbered anew."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from experiments.data.export_tokenizer import GENERATION_FILE
from experiments.data.fewer_tokens import with_tokens
from experiments.data.tokenizer_files import ADDED_FILE, CONFIG_FILE, FILE_NAME
from zoo.published.json_files import parse_json

# The same vocabulary in the forms of other libraries; tokenizer.json says all of it.
_OTHER_FORMS = ("vocab.json", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json")


def renumber_folder(folder: Path, ids: Sequence[int] | np.ndarray) -> None:
    """Writes a folder's files anew; the weights have the rows of these tokens already.

    Args:
      folder: as `write_model` writes it, with the ids of the model that it was made of.
      ids: those that stay, in the order of their new numbers.

    Raises:
      ValueError: a file names an id that does not stay.
    """
    now = {int(old): new for new, old in enumerate(ids)}
    whole = hf.Tokenizer.from_str((folder / FILE_NAME).read_text(encoding="utf-8"))
    (folder / FILE_NAME).write_text(with_tokens(whole, ids).to_str(pretty=True), encoding="utf-8")
    for name in _OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    for name in ("config.json", GENERATION_FILE, CONFIG_FILE, ADDED_FILE):
        if not (path := folder / name).is_file():
            continue
        said: dict[str, Any] = parse_json(path.read_bytes())
        for key, value in said.items():
            if key.endswith(("_token_id", "_token_ids")) or name == ADDED_FILE:
                said[key] = _renumbered(value, now, f"{name}: {key}")
        if "added_tokens_decoder" in said:
            marked = {int(i): token for i, token in said["added_tokens_decoder"].items()}
            said["added_tokens_decoder"] = {str(now[i]): token for i, token in marked.items() if i in now}
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renumbered(value: Any, now: dict[int, int], what: str) -> Any:
    if isinstance(value, list):
        return [_renumbered(one, now, what) for one in value]
    if not isinstance(value, int):
        return value
    if value not in now:
        raise ValueError(f"{what} is {value}, a token that does not stay")
    return now[value]
