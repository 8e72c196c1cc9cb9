"""Equal blocks compiled once: a folded pattern is loops in loops, over stacked parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.pattern import Folded, Repeat


def run_blocks(
    run: Callable,
    items: Folded,
    blocks: Sequence[tuple[nnx.GraphDef, Any]],
    noise: Any,
    carry: Any,
) -> Any:
    """Runs blocks one after another. What their pattern repeats is a loop whose body is compiled once.

        ((mamba2*3 attn/mlp)*4 mamba2)  ->  a loop of 4 steps, each a loop of 3 and a block, and then another block

    Args:
      run: run(graphdef, params, carry, noise) -> carry, for one block.
      items: the blocks' words, as `fold` gives them; or as they are, which makes no loops.
      blocks: graphdef and parameters of each block. Those of one word have equal graphdefs.
      noise: a pytree of arrays with a row for each block, or None.
      carry: what enters the first block, arrays in a pytree.
    """
    return _run(run, items, blocks, _stack(items, blocks, noise, np.array(0)), 0, carry)


def _stack(items: Folded, blocks, noise, depths: np.ndarray) -> list:
    """Parameters and noise of each item's blocks, with an axis for each loop that they are in, the outermost first.

    Blocks outside of loops, and those that share their parameters, have no stack of them, None.

    `depths` has these axes too: where in the stack the first block of the items is, each time that it comes.
    """
    stacked: list = []
    for item in items:
        if isinstance(item, Repeat):
            again = depths[..., None] + _length(item.items) * np.arange(item.times)
            stacked.append(_stack(item.items, blocks, noise, again))
        else:
            params = None
            if depths.ndim and not item.shared:
                shape = depths.shape
                several = (blocks[i][1] for i in depths.flat)
                params = jax.tree.map(lambda *a, shape=shape: jnp.stack(a).reshape(*shape, *a[0].shape), *several)
            stacked.append((params, jax.tree.map(lambda a, here=depths: a[here], noise)))
        depths = depths + _length((item,))
    return stacked


def _run(run, items: Folded, blocks, stacked: list, depth: int, carry):
    for item, given in zip(items, stacked, strict=True):
        if isinstance(item, Repeat):

            def step(carry, given, items=item.items, depth=depth):
                return _run(run, items, blocks, given, depth, carry), None

            carry, _ = jax.lax.scan(step, carry, given, length=item.times)
        else:
            params, noise = given
            graphdef, alone = blocks[depth]  # its parameters, if they are not one of a loop's
            carry = run(graphdef, alone if params is None else params, carry, noise)
        depth += _length((item,))
    return carry


def _length(items: Folded) -> int:
    """How many blocks the items stand for."""
    return sum(item.times * _length(item.items) if isinstance(item, Repeat) else 1 for item in items)
