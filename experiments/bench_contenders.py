"""What a contender of the benchmark is: sizes in, calls to time out."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

Pass = Literal["forward", "backward", "decode"]
PASSES: dict[Pass, str] = {"forward": "forward", "backward": "forward + backward", "decode": "decode, a token"}

Call = Callable[[], Any]  # runs to the end and returns its arrays


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that all contenders of a row are built for."""

    batch: int
    length: int
    d_model: int
    d_inner: int
    """Of the scan; models have twice d_model."""
    d_state: int
    layers: int
    vocab_size: int
    tokens: int
    """Length of the prompt before decoding, and tokens decoded by one call."""


Contender = Callable[[Sizes], dict[Pass, Call]]


class Missing(Exception):
    """A contender that cannot run here, and what to do about it."""


def require(*packages: str) -> None:
    """Raises `Missing` unless the packages are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if absent:
        raise Missing(f"pip install {' '.join(absent)}")
