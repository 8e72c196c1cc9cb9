"""What is added to the residual stream before some blocks: more of an input than its positions hold.

DeepStack cuts the many tokens of an image into groups, lets the first enter as usual, and adds each further one before
a deeper block at the same positions: more is read, and the row is no longer for it.

Source: Meng et al. 2024, arXiv:2406.04334 (DeepStack).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LayerInputs = Mapping[int, Float[Array, "b l d"]]
"""By the number of a block, from 0, what is added before it."""


def groups_of(layer_inputs: LayerInputs | None, x: Float[Array, "b l d"], n_layers: int) -> list[Array] | None:
    """What is added, in the order of the blocks and in x's dtype, or None.

    Args:
      layer_inputs: as it is given.
      x: what it is added to.
      n_layers: blocks that there are.

    Raises:
      ValueError: of a block that there is not, or of another shape than x.
    """
    if not layer_inputs:
        return None
    for number, value in layer_inputs.items():
        if not 0 <= number < n_layers:
            raise ValueError(f"layer_inputs has {number}, expected numbers of blocks, 0 to {n_layers - 1}")
        if value.shape != x.shape:
            raise ValueError(f"layer_inputs[{number}] has shape {value.shape}, expected that of x, {x.shape}")
    return [layer_inputs[number].astype(x.dtype) for number in sorted(layer_inputs)]


def places_of(layer_inputs: LayerInputs | None, n_layers: int) -> np.ndarray | None:
    """Of each block, which of `groups_of` comes before it, -1 where none does; None where there are none."""
    if not layer_inputs:
        return None
    numbers = sorted(layer_inputs)
    return np.array([numbers.index(i) if i in numbers else -1 for i in range(n_layers)])


def plus(x: Float[Array, "b l d"], groups: Sequence[Array] | None, place: Any) -> Float[Array, "b l d"]:
    """The residual stream with the group of a block's place: x itself at -1, or where there are no groups.

    Args:
      place: a number; or one that is traced, where one program is that of several blocks.
    """
    if groups is None:
        return x
    if not isinstance(place, jax.core.Tracer):
        return x if place < 0 else x + groups[int(place)]
    group = jax.lax.dynamic_index_in_dim(jnp.stack(groups), jnp.maximum(place, 0), keepdims=False)
    return jnp.where(place < 0, x, x + group)
