"""What enters a model of text, checked: token ids that it has a vector for, or vectors in their place.

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


def check_one(ids: Any, vectors: Any, d_model: int) -> None:
    """Whether one of token ids and vectors is given, and the vectors are such.

    Args:
      vectors: (b, l, d) floats.
      d_model: their width.

    Raises:
      ValueError: both or none, or vectors of another shape.
    """
    if (ids is None) == (vectors is None):
        raise ValueError(
            f"ids and inputs_embeds are {'both' if ids is not None else 'not'} given, expected one of them"
        )
    if vectors is not None:
        shape: tuple = getattr(vectors, "shape", ())
        dtype = getattr(vectors, "dtype", jnp.int32)
        if len(shape) != 3 or shape[-1] != d_model or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"inputs_embeds is {dtype}{shape}, expected floats (b, l, {d_model})")
