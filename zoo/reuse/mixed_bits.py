"""How many bits each map of a model gets, under a budget of bytes: more where rounding costs more.

What rounding a map to b bits costs is the share of its output that is lost, in the mean over what it reads, for each of
its weights:

    cost(b) = n tr(D^T H D) / tr(W^T H W)      D what rounding to b bits changes of W, H the inputs' second moments

Without n, small maps would have more bits because they are small.

All maps begin with the fewest bits; then the step that saves most for a byte is taken, again and again, while it fits.

Source: Shen et al. 2019, arXiv:1909.05840, section 3.1 (bits by sensitivity, there by the loss's largest curvature);
the inputs' moments as curvature: Frantar et al. 2022, arXiv:2210.17323, section 2.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

Name = TypeVar("Name")


class Choice(NamedTuple):
    """A map in so many bits."""

    bits: int
    nbytes: int
    """Of codes and scales."""
    cost: float


def allocate(choices: Mapping[Name, list[Choice]], budget: int) -> dict[Name, int]:
    """Bits of each map, or of whatever has bits of its own, by name.

    Args:
      choices: what each map may be, bits rising.
      budget: bytes of all maps together.

    Raises:
      ValueError: not even the fewest bits fit.
    """
    at = dict.fromkeys(choices, 0)
    left = budget - sum(steps[0].nbytes for steps in choices.values())
    if left < 0:
        raise ValueError(f"mixed={budget}, expected at least {budget - left} bytes, what the fewest bits take")
    while True:
        best, saves = None, 0.0
        for name, steps in choices.items():
            now = steps[at[name]]
            # A step may leap over another that saves nothing, as one of more bits may save more for its bytes.
            for place in range(at[name] + 1, len(steps)):
                more, less = steps[place].nbytes - now.nbytes, now.cost - steps[place].cost
                if more <= left and less / max(more, 1) > saves:
                    best, saves = (name, place, more), less / max(more, 1)
        if best is None:
            return {name: steps[at[name]].bits for name, steps in choices.items()}
        at[best[0]], left = best[1], left - best[2]
