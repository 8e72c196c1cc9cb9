"""What a run has learned from, as fingerprints in its folder: it goes on with nothing else unless it is told to.

    run/inputs.json     {"version": "0.3.0", "tokenizer": "9f2c...", "data train": "51aa...", "data validation": ...}

A fingerprint is a SHA-256 of the content: of a tokenizer, of texts and labels, of streams of tokens. Of an array or a
file of more than 1 GiB it is that of its size and of 64 blocks of 1 MiB, evenly spread over it. Runs of earlier
versions have none, and get those of what they go on with.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

import zoo
from experiments.loop import distributed
from experiments.loop.json_files import write_json
from zoo.published.checkpoint_files import checkpoint_steps, checkpoints_root

INPUTS_FILE = "inputs.json"
Changeable = Literal["data", "tokenizer", "code"]
_VERSION = "version"
# Bytes that are read whole, and the blocks of what is larger.
_WHOLE = 1 << 30
_BLOCK, _BLOCKS = 1 << 20, 64


def fingerprint(*values: Any) -> str:
    """A digest of texts, numbers, arrays, and lists, tuples, dicts and dataclasses of them, the same on every machine.

    Of anything else it is the type that counts.
    """
    digest = hashlib.sha256()
    _feed(digest, values)
    return digest.hexdigest()


def check_inputs(folder: Path, inputs: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Compares what a run goes on with with what it has learned from, and writes it to the run's folder.

    Args:
      folder: the run's.
      inputs: name to content, names beginning with "data" or "tokenizer": {"data train": texts, "tokenizer": text}.
      allowed: what may have changed, of "data", "tokenizer" and "code". Another version of the code is said, no more.

    Raises:
      ValueError: something else has changed; nothing has been written.
    """
    distributed.agreed(lambda: _check_inputs(folder, inputs, allowed))


def _check_inputs(folder: Path, inputs: Mapping[str, Any], allowed: Collection[str]) -> None:
    now = {name: fingerprint(value) for name, value in inputs.items()}
    try:
        before = json.loads((folder / INPUTS_FILE).read_text())
    except FileNotFoundError:
        before = {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / INPUTS_FILE} makes no sense; without it, {folder} goes on unchecked") from error
    learned = bool(checkpoint_steps(checkpoints_root(folder)))  # without a checkpoint it begins anew
    for name, digest in now.items():
        if before.get(name, digest) == digest or not learned:
            continue
        kind, _, which = name.partition(" ")
        what = f"the {kind}{f' ({which})' if which else ''}"
        if kind not in allowed:
            raise ValueError(
                f"{what} changed since {folder} has learned from it; --allow-changed {kind} goes on all the same, "
                "another --run-dir begins anew"
            )
        print(f"{what} changed since the last start, as --allow-changed {kind} says it may", flush=True)
    version = before.get(_VERSION, zoo.__version__)
    if version != zoo.__version__ and "code" not in allowed:
        print(f"{folder} was last trained by version {version} of this library, now by {zoo.__version__}", flush=True)
    write_json(before | {_VERSION: zoo.__version__} | now, folder / INPUTS_FILE)


def _feed(digest: Any, value: Any) -> None:
    """Adds a value to a digest, with what keeps ("ab", "c") and ("a", "bc") apart."""
    if isinstance(value, str):
        value = value.encode("utf-8", errors="surrogatepass")
    if isinstance(value, bytes):
        digest.update(b"s%d:" % len(value))
        digest.update(value)
    elif isinstance(value, np.ndarray):
        digest.update(f"a{value.dtype.str}{value.shape}".encode())
        _feed_array(digest, value)
    elif value is None or isinstance(value, bool | int | float | np.generic):
        digest.update(f"{value.item() if isinstance(value, np.generic) else value!r},".encode())
    elif isinstance(value, Mapping):
        _feed(digest, list(value.items()))
    elif dataclasses.is_dataclass(value):
        _feed(digest, [getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, list | tuple):
        digest.update(b"l%d:" % len(value))
        for one in value:
            _feed(digest, one)
    else:
        _feed(digest, type(value).__name__)


def _feed_array(digest: Any, array: np.ndarray) -> None:
    if array.dtype == object:
        _feed(digest, array.tolist())
        return
    if not array.nbytes:
        return
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if len(flat) <= _WHOLE:
        digest.update(flat)
        return
    for start in np.linspace(0, len(flat) - _BLOCK, _BLOCKS).astype(int):
        digest.update(flat[start : start + _BLOCK])
