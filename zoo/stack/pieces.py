"""A block run on some positions of its rows at a time, each piece from the state that the one before has left.

That is the whole row in every number, and with what a piece makes recomputed on the way back, a step over a long row
keeps the residual stream and a state for each piece, and of all else one piece.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssm.sequence_cut import cut_of
from zoo.layers.needs import has
from zoo.stack.block import Block


def takes_pieces(block: Block, x: jax.Array, size: int | None) -> bool:
    """Whether a block runs rows such as x in pieces of `size`: longer ones, whole here, of a mixer that `carries`."""
    if size is None or x.shape[1] <= size or cut_of(x) is not None or block.has_auxiliary_loss:
        return False
    return (block.mixer is None or has(block.mixer, "carries")) and not block.mlp_needs and not block.needs


def run_in_pieces(block: Block, x: jax.Array, size: int, *, mask: Any = None, segment_ids: Any = None) -> jax.Array:
    """block(x, mask=mask, segment_ids=segment_ids), `size` positions at a time."""
    b, length = x.shape[:2]
    missing = -length % size
    if missing:
        mask = jnp.pad(jnp.ones((b, length), bool) if mask is None else mask, ((0, 0), (0, missing)))

    def cut(m, mode: Any = "constant"):
        if m is None:
            return None
        m = jnp.pad(m, [(0, 0), (0, -m.shape[1] % size)] + [(0, 0)] * (m.ndim - 2), mode=mode)
        return jnp.moveaxis(m.reshape(b, -1, size, *m.shape[2:]), 1, 0)

    start = block.init_state(b)
    ids, goes_on = cut(segment_ids, "edge"), None
    if ids is not None:  # a piece goes on from its first position's segment, which may be another than the last one's
        goes_on = jnp.concatenate([jnp.ones((1, b), bool), ids[1:, :, 0] == ids[:-1, :, -1]])

    def step(state, piece):
        x, mask, ids, goes_on = piece
        if goes_on is not None:
            state = jax.tree.map(
                lambda old, new: jnp.where(goes_on.reshape(-1, *(1,) * (new.ndim - 1)), old, new), state, start
            )
        y, after = block.extend(x, state, mask=mask, segment_ids=ids)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), y

    _, y = jax.lax.scan(jax.checkpoint(step), start, (cut(x), cut(mask), ids, goes_on))
    return jnp.moveaxis(y, 0, 1).reshape(b, length + missing, x.shape[2])[:, :length]
