"""What `bench peers` compares: one thing of ours with one of a peer's, and whether both give the same numbers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench.contenders import Call

# What their results are in our layout: arrays in the order of our leaves.
AsOurs = Callable[[Any], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Calls by pass ("forward", "backward", "prefill", "decode"); passes that both have are timed."""

    ours: Mapping[Any, Call]
    theirs: Mapping[Any, Call]
    alike: Mapping[str, AsOurs] = dataclasses.field(default_factory=dict)
    """Passes whose results are the same numbers, since both have the same inputs and parameters."""
    units: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many units (tokens) a call of a pass takes, where not one: times are divided by it."""


class Row(NamedTuple):
    """A line of the table; `build` raises `Missing` where the peer is not installed."""

    what: str
    shape: str
    peer: str
    build: Callable[[], Pair]

    @property
    def name(self) -> str:
        return f"{self.what} {self.shape}, {self.peer}"


def disagreement(ours: Any, theirs: Sequence[np.ndarray]) -> float:
    """The largest error of theirs in any array, RMS over the RMS of ours; ours may go on behind them, with a state.

    Raises:
      ValueError: fewer arrays of ours, or other shapes.
    """
    mine = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(ours)[: len(theirs)]]
    others = [np.asarray(array, np.float64) for array in theirs]
    if [array.shape for array in mine] != [array.shape for array in others]:
        raise ValueError(f"shapes {[a.shape for a in mine]} and {[a.shape for a in others]} are to be compared")
    rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
    return max(float(rms(a - b) / max(rms(a), 1e-30)) for a, b in zip(mine, others, strict=True))
