"""A model of some of its tokens: rows of its embedding, columns of its head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.models.build import abstract
from zoo.reuse.grow import filled


def with_vocabulary(model: Any, ids: Sequence[int]) -> Any:
    """A model of some of its tokens."""
    config, rows = model.config, np.asarray(ids)
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"vocabulary={ids!r}, but a {type(model).__name__} reads no tokens")
    if rows.ndim != 1 or not len(rows) or len(set(rows.tolist())) < len(rows):
        raise ValueError(f"vocabulary={ids!r}, expected ids, each once")
    if rows.min() < 0 or rows.max() >= config.vocab_size:
        raise ValueError(
            f"vocabulary has the id {rows[np.argmax(np.abs(rows))]}, expected 0 to {config.vocab_size - 1}"
        )

    def shaped(n: int) -> Any:
        return abstract(dataclasses.replace(config, vocab_size=n, pad_vocab_multiple=1))

    # The axes of a vocabulary are those that are longer where there are more tokens than here with all padding.
    more = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(shaped(2 * config.padded_vocab_size)))}
    values = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = param[...]
        for number, (n, longer) in enumerate(zip(value.shape, more[path], strict=True)):
            value = jnp.take(value, rows, axis=number) if n != longer else value
        values[path] = value
    return filled(shaped(len(rows)), values, model)
