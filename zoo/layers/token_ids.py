"""Token ids that a model has no vector for are refused, where their values can be seen.

An embedding takes -1 for its last row, and gives NaN for a row beyond it. Under `jax.jit` values cannot raise errors:
there ids outside the vocabulary are what they were, and whoever makes the batches checks them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def check_ids(ids: Any, table: nnx.Embed, name: str = "ids") -> None:
    """Whether ids are rows of a table.

    Costs a copy of concrete ids to the host; nothing while a function is traced, or where no host holds them all.

    Args:
      ids: (b, l) integers.
      table: has a row for each.
      name: what errors call them.

    Raises:
      ValueError: no integers (b, l), or one that there is no row for.
    """
    if isinstance(ids, str) or not hasattr(ids, "dtype"):
        raise ValueError(f"{name} is {ids!r:.60}, expected an array of token ids (b, l)")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} holds {ids.dtype}, expected integers: token ids")
    if ids.ndim != 2:
        hint = f"; one row of {len(ids)} is {name}[None]" if ids.ndim == 1 else ""
        raise ValueError(f"{name} has shape {ids.shape}, expected (b, l): rows of token ids{hint}")
    traced = isinstance(ids, jax.core.Tracer) or isinstance(table.embedding[...], jax.core.Tracer)
    if traced or not getattr(ids, "is_fully_addressable", True):
        return
    values, n = np.asarray(ids), len(table.embedding[...])
    if values.size and (values.min() < 0 or values.max() >= n):
        raise ValueError(
            f"{name} holds {values.min()} to {values.max()}, expected 0 to {n - 1}, the vocabulary as stored"
        )
