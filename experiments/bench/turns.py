"""Calls timed in turns, so that a machine that slows down slows all of them."""

import time

import jax
import numpy as np
from tqdm import tqdm

from experiments.bench.contenders import Call

# A contender whose calls take longer than this many seconds has said enough after so many rounds.
SLOW_CALL, ROUNDS_IF_SLOW = 2.0, 3
# One whose calls take longer than this many is warm after the first.
VERY_SLOW_CALL = 10.0


def time_in_turns(calls: dict[str, Call], rounds: int, *, label: str = "rounds") -> dict[str, list[float]]:
    """Milliseconds of each call in each round; every round times every call once.

    Raises:
      FloatingPointError: a call gave something that is not finite.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with tqdm(total=len(calls) * (rounds + 2), desc=label, leave=False, disable=None) as bar:
        for name, call in calls.items():
            start = time.perf_counter()
            out = call()
            if time.perf_counter() - start < VERY_SLOW_CALL:
                out = call()
            bar.update(2)
            if not all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(out)):
                raise FloatingPointError(f"{name}, {label}: the result is not finite")
        for _ in range(rounds):
            for name, call in calls.items():
                bar.update()
                if len(times[name]) >= ROUNDS_IF_SLOW and min(times[name]) > 1e3 * SLOW_CALL:
                    continue
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
