"""A block that some positions go through and the others around: mixture of depths, with any mixers.

Those that go through stand next to each other: a convolution or a state space sees them as a row without the others.
Attention's rotary embedding goes by the places that they had.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ssm import segment_runs
from ssm.absent import is_known
from ssm.checks import is_known_size
from zoo.layers.depth_router import Skippable, share
from zoo.stack.gaps import close_gaps

_OF_POSITIONS = ("segment_ids", "ahead", "embeddings", "positions")


class RoutedState(NamedTuple):
    """What a block carries from one position to the next."""

    mixer: Any
    """Its mixer's state."""
    n: Int[Array, "b"]
    """Positions so far, also those that went around it."""


def run_routed(block: Any, x: Any, given: dict[str, Any], *, key: Any = None, skip: Any = None) -> tuple[Any, Any]:
    """The block over whole rows: (y, what training adds to its loss).

    Args:
      block: a `Block` with a router.
      x: (b, l, d).
      given: what the mixers are called with; also skippable, a `Skippable` or None, and training, whether the choice
        may look at whole rows.
      key, skip: as in `Block`.
    """
    router, mask = block.router, given.get("mask")
    skippable = None if given.get("skippable") is None else given["skippable"].positions
    among = {"mask": mask, "skippable": skippable}
    kept = chosen = router.choose(x, segment_ids=given.get("segment_ids"), **among)
    loss = router.loss(x, chosen, **among)
    size = size_of(router.capacity, x.shape[1], given.get("skippable"))
    size = max(size, 1) if is_known_size(size) else size
    if router.foretells and not given.get("training"):
        kept, size = router.foretell(x, **among), x.shape[1]
    there = jnp.arange(size)[None] < jnp.sum(kept, axis=1, keepdims=True)
    source = jnp.argsort(~kept, axis=1, stable=True)[:, :size]
    inside = {**given, "mask": there, "positions": _numbered(mask, x)}
    if inside.get("segment_ids") is not None:
        inside["segment_ids"] = segment_runs(inside["segment_ids"])
    inside |= {name: _taken(inside.get(name), source) for name in _OF_POSITIONS}
    weights = _weights(block, x, skippable)

    def run(x, weight):
        return block.run_all(x, key=key, skip=skip, weight=weight, **inside)

    y, more = _weighed(block, _taken(x, source), _taken(weights, source), run)
    back = jnp.minimum(jnp.cumsum(kept, axis=1) - 1, size - 1)
    y = jnp.take_along_axis(y, jnp.maximum(back, 0)[..., None], axis=1)
    return jnp.where(kept[..., None], y, _around(block, x, weights)), loss + more


def size_of(capacity: float, length: Any, skippable: Skippable | None) -> Any:
    """The most positions of a row that go through a block of a capacity."""
    n = length if skippable is None else skippable.at_least
    return length - n + share(capacity, n)


def extend_routed(
    block: Any, x: Any, state: RoutedState, given: dict[str, Any], *, key: Any = None, skip: Any = None
) -> tuple[Any, RoutedState]:
    """The block from its state on; what goes through it is foretold. Arguments are those of `run_routed`."""
    router, mask = block.router, given.get("mask")
    skippable = None if given.get("skippable") is None else given["skippable"].positions
    if router.foretells:
        kept = router.foretell(x, mask=mask, skippable=skippable)
    else:
        kept = router.choose(x, mask=mask, segment_ids=given.get("segment_ids"), skippable=skippable)
    weights, positions = _weights(block, x, skippable), _numbered(mask, x, state.n)
    closed = close_gaps(kept, given.get("segment_ids"), goes_on=True)
    inside = {**given, "mask": closed.mask, "segment_ids": closed.segment_ids, "positions": positions}
    inside |= {name: _taken(inside.get(name), closed.source) for name in _OF_POSITIONS if name != "segment_ids"}

    def through(x, before):
        def extend(x, weight):
            return block.extend_all(x, before, key=key, skip=skip, weight=weight, **inside)

        y, after = _weighed(block, closed.close(x), _taken(weights, closed.source), extend)
        y = closed.open(y)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, before)
        return jnp.where(kept[..., None], y, _around(block, x, weights)), after

    def around(x, before):
        return _around(block, x, weights), before

    n = state.n + jnp.asarray(x.shape[1] if mask is None else jnp.sum(mask, axis=1), state.n.dtype)
    if not is_known_size(x.shape[1]) or x.shape[1] != 1:
        y, after = through(x, state.mixer)
    elif is_known(kept):
        y, after = (through if bool(kept.any()) else around)(x, state.mixer)
    else:  # a token that goes around in all rows costs nothing
        y, after = jax.lax.cond(jnp.any(kept), through, around, x, state.mixer)
    return y, RoutedState(after, n)


def _weights(block, x, skippable):
    """What the block counts at each position, (b, l, 1); 1 where none may be left out."""
    weights = block.router.weights(block.router.scores(x))
    weights = weights if skippable is None else jnp.where(skippable, weights, 1)
    return weights[..., None]


def _weighed(block, x, weights, run):
    """What a block makes of the positions that go through it, run(x, weight), as much as they count, and the rest."""
    if block.router.config.weighs == "symmetric":
        y, rest = run(x, weights)
        return y.astype(x.dtype), rest
    y, rest = run(x, None)
    wide = jnp.promote_types(x.dtype, weights.dtype)
    return (x + weights * (y.astype(wide) - x)).astype(x.dtype), rest


def _around(block, x, weights):
    """Positions that do not go through the block."""
    return (x * weights).astype(x.dtype) if block.router.config.weighs == "symmetric" else x


def _numbered(mask, x, n=0):
    """The place of each position in its row, from n (b), counting those that are there."""
    there = jnp.ones(x.shape[:2], jnp.int32) if mask is None else mask.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(there, axis=1) - 1, 0) + jnp.asarray(n, jnp.int32).reshape(-1, 1)


def _taken(values, source):
    """Some positions of values (b, l, ...), or None."""
    if values is None:
        return None
    return jnp.take_along_axis(values, source.reshape(*source.shape, *(1,) * (values.ndim - 2)), axis=1)
