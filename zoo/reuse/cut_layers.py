"""A model of some of its blocks: those that turn the residual stream most.

Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2 (Minitron: block influence).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from zoo.reuse.grow import of_layers, pattern_of, require_own_blocks
from zoo.reuse.importance import block_influence, largest
from zoo.stack.pattern import parse_pattern


def with_layers(model: Any, batches: Sequence[Mapping[str, Array]], n_layers: int | Sequence[int]) -> Any:
    """A model of some of its blocks."""
    config = model.config
    words = parse_pattern(config.pattern, config.n_layers)
    require_own_blocks(config, words)
    if isinstance(n_layers, int):
        if not 0 < n_layers <= config.n_layers:
            raise ValueError(f"n_layers={n_layers}, expected 1 to the model's {config.n_layers}")
        stay = largest(block_influence(model, batches), n_layers)
    else:
        stay = np.asarray(n_layers)
        if not len(stay) or sorted(set(n_layers)) != list(n_layers) or stay[0] < 0 or stay[-1] >= config.n_layers:
            raise ValueError(f"n_layers={n_layers!r}, expected numbers of blocks, rising, below {config.n_layers}")
    if not config.first_norm and stay[0] != 0:
        raise ValueError(f"n_layers={stay.tolist()} with first_norm=False, expected the first block to stay")
    pattern = pattern_of(tuple(words[i] for i in stay), config.pattern)
    changed = dataclasses.replace(config, n_layers=len(stay), pattern=pattern)
    return of_layers(model, changed, [[int(i)] for i in stay], set())
