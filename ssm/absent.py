"""Positions that are not there: what lies at them, and a gap that they leave.

A mask is False where a position is not there. Whatever lies there, NaN and infinity too, has no part in what is
computed, nor in a gradient: 0 times NaN is NaN, so what takes a mask selects before it computes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped


def blank(mask: Bool[Array, "..."] | None, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x, 0 at the positions that are not there; the axes of a mask are the first ones of x."""
    return x if mask is None else jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, 0)


def is_known(x: Any) -> bool:
    """Whether a check can look at values: not while a function is traced, nor where no host holds all of them."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_no_gaps(mask: Any) -> None:
    """Refuses a gap, for mixers whose convolutions count places: they would see one. See `ssm.mixer`.

    Costs a copy of a mask that is known to the host, and nothing where it is not.

    Raises:
      ValueError: a row with a position that is not there between two that are.
    """
    if mask is None or not is_known(mask):
        return
    there = np.asarray(mask, bool)
    before, after = np.logical_or.accumulate(there, axis=1), np.logical_or.accumulate(there[:, ::-1], axis=1)[:, ::-1]
    gaps = np.argwhere(~there & before & after)
    if len(gaps):
        row, position = gaps[0].tolist()
        raise ValueError(
            f"mask[{row}, {position}] is False between positions that are there, expected padding at the ends alone: "
            "the mixer's convolution would see a gap, which zoo.Backbone closes"
        )
