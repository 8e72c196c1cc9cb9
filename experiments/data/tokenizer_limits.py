"""What the steps of a tokenizer.json may do to a text: its library knows no limit, and ends the process.

Forty steps that put "aa" for "a" make a terabyte of each letter; the allocation that fails cannot be caught.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

# Published ones put three bytes (U+2581) for a space, and before a text.
MOST_GROWTH = 1000


def check_growth(description: Mapping[str, Any]) -> None:
    """Raises a ValueError where a tokenizer's steps could make more than `MOST_GROWTH` bytes of one.

    Args:
      description: the content of a tokenizer.json.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _growth(description.get(part))
        if growth > MOST_GROWTH:
            raise ValueError(
                f"the tokenizer's {part} could make {growth:.3g} bytes of one, expected at most {MOST_GROWTH:,}"
            )


def _growth(step: Any) -> float:
    """The most bytes that a step, and those in it, make of one byte."""
    if not isinstance(step, Mapping):
        return 1.0
    growth = 1.0
    for inner in ("normalizers", "pretokenizers", "decoders"):
        for one in step.get(inner) or ():
            growth *= _growth(one)
    if step.get("type") == "Replace":
        pattern = step.get("pattern") or {}
        found = len(pattern.get("String", "").encode()) or 1  # a regular expression may find a byte, or none
        growth *= max(1.0, len(step.get("content", "").encode()) / found)
    elif step.get("type") in ("Prepend", "Metaspace"):
        growth *= 1 + len((step.get("prepend") or step.get("replacement") or "").encode())
    return growth


@contextlib.contextmanager
def failures_are_errors() -> Iterator[None]:
    """Turns what the library makes of a text that it cannot read into a ValueError.

    That is a bare Exception, where a vocabulary lacks the token for what is unknown, or a panic, where a regular
    expression finds no end.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # its class has no public name, and is no Exception
        if not panic and type(error) is not Exception:
            raise
        raise ValueError(f"the tokenizer fails on a text: {' '.join(str(error).split())}") from error
