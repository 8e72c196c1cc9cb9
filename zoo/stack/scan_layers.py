"""Equal blocks compiled once: a folded pattern is loops in loops, over stacked parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.stack.pattern import Folded, Repeat, Word


def run_blocks(
    run: Callable,
    items: Folded,
    blocks: Sequence[tuple[nnx.GraphDef, Any]],
    each: Any,
    carry: Any,
) -> Any:
    """Runs blocks one after another. What their pattern repeats is a loop whose body is compiled once.

        ((mamba2*3 attn/mlp)*4 mamba2)  ->  a loop of 4 steps, each a loop of 3 and a block, and then another block

    Args:
      run: run(graphdef, params, carry, own) -> carry, for one block.
      items: the blocks' words, as `fold` gives them; or as they are, which makes no loops.
      blocks: graphdef and parameters of each block. Those of one word have equal graphdefs.
      each: a pytree of arrays with a row for each block, its own, or None.
      carry: what enters the first block, arrays in a pytree.
    """
    return _run(run, items, blocks, _stack(items, blocks, each, np.array(0)), 0, carry)


def looped_blocks(items: Folded) -> tuple[tuple[int, ...], ...]:
    """Places of the blocks that `run_blocks` stacks the parameters of, those of one stack together, in its order."""
    return tuple(tuple(map(int, depths.flat)) for depths in _looped(items, np.array(0)))


def _looped(items: Folded, depths: np.ndarray) -> list[np.ndarray]:
    found: list = []
    for item in items:
        if isinstance(item, Repeat):
            found += _looped(item.items, _again(item, depths))
        elif _is_stacked(item, depths.ndim):
            found.append(depths)
        depths = np.asarray(depths + _length((item,)))
    return found


def _again(item: Repeat, depths: np.ndarray) -> np.ndarray:
    """Where the first block of what is repeated is, each time: another axis."""
    return depths[..., None] + _length(item.items) * np.arange(item.times)


def _is_stacked(item: Word, loops: int) -> bool:
    """Whether the parameters of a word's blocks are a stack: in so many loops, and each has its own."""
    return loops > 0 and not item.shared


def _stack(items: Folded, blocks, each, depths: np.ndarray) -> list:
    """Parameters and each block's own of every item, with an axis for each loop that they are in, the outermost first.

    Blocks outside of loops, and those that share their parameters, have no stack of them, None.

    `depths` has these axes too: where in the stack the first block of the items is, each time that it comes.
    """
    stacked: list = []
    for item in items:
        if isinstance(item, Repeat):
            stacked.append(_stack(item.items, blocks, each, _again(item, depths)))
        else:
            params = None
            if _is_stacked(item, depths.ndim):
                shape = depths.shape
                several = (blocks[i][1] for i in depths.flat)
                params = jax.tree.map(lambda *a, shape=shape: jnp.stack(a).reshape(*shape, *a[0].shape), *several)
            stacked.append((params, jax.tree.map(lambda a, here=depths: a[here], each)))
        depths = np.asarray(depths + _length((item,)))
    return stacked


def _run(run, items: Folded, blocks, stacked: list, depth: int, carry):
    for item, given in zip(items, stacked, strict=True):
        if isinstance(item, Repeat):

            def step(carry, given, items=item.items, depth=depth):
                return _run(run, items, blocks, given, depth, carry), None

            carry, _ = jax.lax.scan(step, carry, given, length=item.times)
        else:
            params, own = given
            graphdef, alone = blocks[depth]  # its parameters, if they are not one of a loop's
            carry = run(graphdef, alone if params is None else params, carry, own)
        depth += _length((item,))
    return carry


def _length(items: Folded) -> int:
    """How many blocks the items stand for."""
    return sum(item.times * _length(item.items) if isinstance(item, Repeat) else 1 for item in items)
