"""A stack cut into runs of blocks, each a stack of its own that shares the whole's arrays.

A part run on what enters its first block gives what comes behind its last; one after the other they are the whole,
before its final norm. No part reads anything else of the others.
"""

import dataclasses
import itertools
from typing import Any

from flax import nnx

from zoo.stack.backbone import Backbone
from zoo.stack.backbone_config import mixer_needs
from zoo.stack.pattern import format_pattern


def cut_in_parts(backbone: Backbone, n_parts: int) -> list[Backbone]:
    """As many stacks, of as equal numbers of blocks as can be, the more of them the later; without the final norm.

    Raises:
      ValueError: no part, or more than there are blocks; a stack that cannot be cut: depths share a block or a module
        of one, a block reads what entered the first, or fewer positions go on with depth.
    """
    n = len(backbone.words)
    if not 1 <= n_parts <= n:
        raise ValueError(f"n_parts={n_parts}, expected 1 to {n}, the number of blocks")
    _check_apart(backbone)
    ends = [n * i // n_parts for i in range(n_parts + 1)]
    return [_part(backbone, first, end) for first, end in itertools.pairwise(ends)]


def _part(backbone: Backbone, first: int, end: int) -> Backbone:
    config, words = backbone.config, backbone.words[first:end]
    part = nnx.merge(*nnx.split(backbone))
    part.words, part.order, part.norm_f = words, tuple(range(len(words))), None
    part.layers = nnx.List(list(part.layers)[first:end])
    shape: dict[str, Any] = {"n_layers": len(words), "pattern": format_pattern(words)}
    part.config = dataclasses.replace(config, **shape, first_norm=config.first_norm or first > 0)
    return part


def _check_apart(backbone: Backbone) -> None:
    """Raises a ValueError where blocks are not apart from each other."""
    pattern = backbone.config.pattern
    if len(backbone.layers) < len(backbone.words) or backbone.shared_names:
        raise ValueError(f"pattern={pattern!r} has blocks that depths share, expected each block by itself")
    for mixer in (mixer for word in backbone.words for mixer in (*word.mixers, word.channel) if mixer):
        if "embeddings" in mixer_needs(backbone.config, mixer):
            raise ValueError(f"pattern={pattern!r}: {mixer} reads what entered the first block, expected none that do")
    if backbone.config.keep is not None:
        raise ValueError(f"keep={backbone.config.keep}: later blocks go by what earlier ones say, expected None")
