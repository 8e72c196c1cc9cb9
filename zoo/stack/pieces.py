"""A block run on a part of its rows at a time, so that a step over a long row fits.

A mixer whose state is of one size goes through a row piece by piece, each from the state that the one before has left,
and the channel mixer with it. One that takes whole rows is run on some of its channels at a time where it can be, and
the channel mixer on some positions. Either is the whole row in every number; what a part makes is recomputed on the way
back, and a step keeps the residual stream, a state for each piece, and of all else one part.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssm.absent import blank
from ssm.sequence_cut import cut_of
from zoo.layers.needs import has
from zoo.stack.block import Block


def takes_pieces(block: Block, x: jax.Array, size: int | None) -> bool:
    """Whether a block runs rows such as x in pieces of `size`: longer ones, whole here, of a mixer that `carries`."""
    return _is_longer(block, x, size) and (block.mixer is None or has(block.mixer, "carries"))


def takes_halves(block: Block, x: jax.Array, size: int | None) -> bool:
    """Whether a block whose mixer takes whole rows runs rows such as x in parts, see `run_halves`."""
    return _is_longer(block, x, size)


def _is_longer(block, x, size):
    if size is None or x.shape[1] <= size or cut_of(x) is not None:
        return False
    if block.has_auxiliary_loss or block.router is not None:
        return False
    return not block.mlp_needs and not block.needs


def run_in_pieces(block: Block, x: jax.Array, size: int, *, mask: Any = None, segment_ids: Any = None) -> jax.Array:
    """block(x, mask=mask, segment_ids=segment_ids), `size` positions at a time."""
    b, length = x.shape[:2]
    missing = -length % size
    if missing:
        mask = jnp.pad(jnp.ones((b, length), bool) if mask is None else mask, ((0, 0), (0, missing)))
    start = block.init_state(b)
    ids, goes_on = _cut(segment_ids, size, "edge"), None
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

    _, y = jax.lax.scan(jax.checkpoint(step), start, (_cut(x, size), _cut(mask, size), ids, goes_on))
    return _joined(y, length)


def run_halves(block: Block, x: jax.Array, size: int, *, mask: Any = None, segment_ids: Any = None) -> jax.Array:
    """The same of a mixer that takes whole rows: its half of the block, then that of the channel mixer, by positions.

    The mixer runs on some channels at a time, as many numbers as `size` positions have, where it has `in_groups`.
    """

    def mixer(x):
        if hasattr(block.mixer, "in_groups"):
            width = max(1, size * x.shape[2] // x.shape[1])
            return block.mixer.in_groups(x, width, mask=mask, segment_ids=segment_ids)
        return block.mixer(x, mask=mask, segment_ids=segment_ids)

    x = jax.checkpoint(lambda x: block.mix(blank(mask, x), mixer))(x)
    return _joined(jax.lax.map(jax.checkpoint(block.feed), _cut(x, size)), x.shape[1])


def _cut(m, size, mode: Any = "constant"):
    """m (b, l, ...), or None, as pieces (l / size, b, size, ...), filled up at the end."""
    if m is None:
        return None
    m = jnp.pad(m, [(0, 0), (0, -m.shape[1] % size)] + [(0, 0)] * (m.ndim - 2), mode=mode)
    return jnp.moveaxis(m.reshape(m.shape[0], -1, size, *m.shape[2:]), 1, 0)


def _joined(pieces, length):
    """The inverse, of rows of a length."""
    pieces = jnp.moveaxis(pieces, 0, 1)
    return pieces.reshape(pieces.shape[0], -1, *pieces.shape[3:])[:, :length]
