"""Positions that an encoder is done with: behind each block only the more important ones go on, the others stay.

How important a position is, is how much all others look at it in attention's heads together; to blocks of other mixers,
how much the block has changed it. Which share goes on is said for each block, and may be another in a trained model.

Source: Goyal et al. 2020, arXiv:2001.08950 (PoWER-BERT), section 3.2; Kachuee & Sharifkhani 2022, arXiv:2201.10936
(latency-adjustable transformer): the score is attention received, summed over heads and queries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zoo.layers.attention import Attention
from zoo.layers.depth_router import Skippable, kept_positions
from zoo.stack.depths import put_back, size_of, take_some
from zoo.stack.gaps import close_all


def run_dropping(
    backbone: Any,
    x: Float[Array, "b l d"],
    rngs: Any,
    causal_inputs: tuple[Any, ...],
    *,
    mask: Bool[Array, "b l"] | None,
    segment_ids: Int[Array, "b l"] | None,
    skippable: Skippable | None,
    task: Int[Array, "*b"] | None,
) -> tuple[list[Array], Float[Array, ""]]:
    """The stream before the first block and behind each, and the loss, where fewer positions go on each time.

    Args:
      backbone: with `keep`.
      causal_inputs: what an encoder is not given.
      x, rngs, mask, segment_ids, skippable, task: as in `Backbone`.
    """
    keep = backbone.config.keep
    backbone._check_cut(x)
    if any(given is not None for given in causal_inputs):
        raise ValueError(f"ahead or layer_inputs given with keep={keep}, expected none in an encoder")
    entered, noise = backbone._enter(x), backbone._noise(rngs)
    x, mask, segment_ids, _, _, skippable, leave = close_all(entered, mask, segment_ids, None, None, skippable)
    may_stop = None if skippable is None else skippable.positions
    given = {"mask": mask, "segment_ids": segment_ids, "embeddings": x, "shared": backbone._shared, "task": task}
    kept, total = jnp.ones(x.shape[:2], bool) if mask is None else mask, jnp.float32(0)
    states: list[Array] = []
    shares, scores = (1.0, *keep), jnp.zeros(x.shape[:2])
    for i, block in enumerate(backbone.blocks):
        if i:
            positions = {"mask": mask, "segment_ids": segment_ids, "skippable": may_stop}
            kept = kept_positions(scores, shares[i], **positions)
        size = size_of(shares[i], x.shape[1], skippable)

        def run(graphdef, params, x, kept, own, size=size):
            (key, skip), norms = own[0] or (None, None), own[1]
            return run_kept(backbone._block(graphdef, params, norms), x, kept, size, given, key=key, skip=skip)

        own = jax.tree.map(lambda a, i=i: a[i], (noise, backbone._norms))
        x, loss, scores = backbone._recomputed(run)(*nnx.split(block), x, kept, own)
        states, total = [*states, x], total + loss
    return [entered, *map(leave, (*states[:-1], backbone._normed(states[-1])))], total


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
