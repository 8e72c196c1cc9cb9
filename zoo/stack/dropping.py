"""Positions that an encoder is done with: behind each block only the more important ones go on, the others stay.

How important a position is, is how much all others look at it in attention's heads together; to blocks of other mixers,
how much the block has changed it. Which share goes on is said for each block, and may be another in a trained model.

Source: Goyal et al. 2020, arXiv:2001.08950 (PoWER-BERT), section 3.2; Kachuee & Sharifkhani 2022, arXiv:2201.10936
(latency-adjustable transformer): the score is attention received, summed over heads and queries.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.layers.attention import Attention
from zoo.stack.depths import put_back, take_some


def run_kept(
    block: Any,
    x: Float[Array, "b l d"],
    kept: Bool[Array, "b l"],
    size: Any,
    given: dict[str, Any],
    *,
    key: Any = None,
    skip: Any = None,
) -> tuple[Float[Array, "b l d"], Float[Array, ""], Float[Array, "b l"]]:
    """A block over the positions that are left: (y, what training adds to its loss, how important each one is).

    Args:
      block: a `Block`.
      x: all positions.
      kept: those that are left.
      size: the most of a row that are.
      given: what the mixers are called with.
      key, skip: as in `Block`.
    """
    some = take_some(x, kept, size, given)
    y, loss = block.run_all(some.x, key=key, skip=skip, **some.given)
    scores = importance(block, some.x, y, some.given)
    least = jnp.full(kept.shape, -jnp.inf, scores.dtype)
    return put_back(y, some, kept, x), loss, put_back(scores, some, kept, least)


def importance(block: Any, x: Any, y: Any, given: dict[str, Any]) -> Float[Array, "b l"]:
    """How important the positions of a block are that makes y of x."""
    if isinstance(block.mixer, Attention):
        read = block.norm(x) if block.norm_first and block.norm is not None else x
        return block.mixer.received(read, **{name: given[name] for name in ("mask", "segment_ids", "positions")})
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.linalg.norm(y.astype(wide) - x.astype(wide), axis=-1)
