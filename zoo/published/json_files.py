"""JSON out of files of others: in bounded memory and time, with errors of one line."""

import json
from pathlib import Path
from typing import Any

# The largest published tokenizer.json has 35 MB; objects take some ten times the bytes of their text.
MAX_BYTES = 200 * 10**6


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is none, or its brackets are nested deeper than Python follows, which is about 1000.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep to be followed") from None


def read_json(path: Path, kind: type | None = dict, *, max_bytes: int = MAX_BYTES) -> Any:
    """What a file of JSON holds.

    Args:
      path: the file.
      kind: what it has to hold, dict or list. None: anything.
      max_bytes: the longest file that is read.

    Raises:
      ValueError: no JSON, something else than expected, or a longer file: names the file.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes, too many for a file of JSON here")
    try:
        value = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if kind is not None and not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{path} holds {type(value).__name__}, expected {expected}")
    return value
