"""The Monarch Mixer run on some of its channels at a time: rows so long that all of them do not fit.

Between its two projections a channel sees no other. So channels go through the mixer group by group, each from the
mixer's input to what the output projection adds for them; with a group's insides recomputed on the way back, a step
keeps input, output and filters of all channels, and of all else those of one group.

Letters besides those of the style guide: r groups · t taps of the short convolution · m of the long ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from m2.tensor_cut import pieces

# Fewer channels than these are not taken by themselves: they lie side by side in memory, and products get narrow.
LEAST = 8
# Positions whose taps are computed at a time: the network inside is wider than what it gives.
POSITIONS = 1 << 14


def groups_of(d: int, width: int) -> int:
    """In how many equal groups d channels are taken, each of `width` or fewer where `LEAST` allows."""
    return next(r for r in range(1, d + 1) if d % r == 0 and (d // r <= max(LEAST, width) or r == d))


def is_plain(*maps: Any) -> bool:
    """Whether linear maps are weights alone, no adapters, and whole on this device: only these can be taken apart."""
    return all(type(linear) is nnx.Linear for linear in maps) and pieces() == 1


def by_groups(
    x: Float[Array, "b l d"],
    r: int,
    in_linear: nnx.Linear,
    out_linear: nnx.Linear,
    run: Callable[[tuple, Any, jax.Array], jax.Array],
    channels: Any,
) -> Float[Array, "b l d"]:
    """out_linear(run(split(in_linear(x), 3), channels)), r groups of channels one after another.

    Args:
      x: the mixer's input.
      r: groups; divides the channels.
      in_linear: gives 3 d channels, three parts side by side.
      out_linear: takes d.
      run: run(p, channels, i) of group number i: p (b, l, 3 d / r), its three parts side by side, and what `channels`
        has of the group; gives (b, l, d / r).
      channels: tree of arrays (d, ...), or of (3 d, ...) of three parts.
    """
    d = out_linear.in_features

    def of_group(leaf):
        parts = len(leaf) // d
        return rearrange(leaf, "(parts r d) ... -> r (parts d) ...", parts=parts, r=r)

    kernel = rearrange(in_linear.kernel[...], "i (parts r d) -> r i (parts d)", parts=3, r=r)
    bias = None if in_linear.bias is None else of_group(in_linear.bias[...])
    out = rearrange(out_linear.kernel[...], "(r d) o -> r d o", r=r)

    @jax.checkpoint
    def mixed(x, kernel, bias, channels, out, i):
        y = run(_apply(in_linear, x, kernel, bias), channels, i)
        return _apply(out_linear, y, out, None)

    def add(total, group):
        return total + mixed(x, *group).astype(total.dtype), None

    dtype = jnp.result_type(jax.eval_shape(out_linear, x))
    start = jnp.zeros((*x.shape[:2], out_linear.out_features), jnp.promote_types(dtype, jnp.float32))
    total, _ = jax.lax.scan(add, start, (kernel, bias, jax.tree.map(of_group, channels), out, jnp.arange(r)))
    return (total if out_linear.bias is None else total + out_linear.bias[...]).astype(dtype)


def _apply(linear, x, kernel, bias):
    """A linear map, as `nnx.Linear` computes it, with some columns or rows of its weight."""
    x, kernel, bias = linear.promote_dtype((x, kernel, bias), dtype=linear.dtype)
    y = linear.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=linear.precision)
    return y if bias is None else y + bias
