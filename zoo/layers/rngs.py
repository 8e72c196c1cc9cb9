"""Where the keys of fresh parameters come from: nnx.Rngs, or a seed in their place."""

from typing import Any

import jax
import numpy as np
from flax import nnx

Seed = nnx.Rngs | int


def as_rngs(rngs: Any) -> nnx.Rngs:
    """Streams of keys, out of themselves, of a seed or of a key.

    Raises:
      ValueError: anything else.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    if isinstance(rngs, bool) or not isinstance(rngs, int | np.integer | jax.Array):
        raise ValueError(f"rngs={rngs!r:.60}, expected nnx.Rngs(0), or a seed")
    return nnx.Rngs(rngs if isinstance(rngs, jax.Array) else int(rngs))


def require_rngs(rngs: Any) -> None:
    """Raises a ValueError unless it is None or streams of keys: what a call draws, it must not draw again."""
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs={rngs!r:.60}, expected None or nnx.Rngs(dropout=key), another key at each call")
