"""Softmax attention over the keys that each query sees, by whichever way suits the sizes.

Axes: s keys, g key-value heads, r query heads of a group.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from ssm.apart import apart
from ssm.forward_mode import by_hand
from ssm.precision import exact
from ssm.sequence_cut import cut_of
from ssm.tensor_cut import pieces
from zoo.layers.block_attention import Rule, block_attention
from zoo.layers.cut_attention import cut_attention
from zoo.layers.seen import Pairs, Positions, distances, pairs, seen

Implementation = Literal["blocks", "dense", "cudnn"]
IMPLEMENTATIONS = ("blocks", "dense", "cudnn")

# Measured on one CPU core at head width 64: dense is ahead where few queries read many keys (one product reads them
# once), and up to 64 x 64; forward and backward alike.
DENSE_QUERIES, DENSE_SCORES = 8, 64 * 64


def softmax_attention(
    q: Float[Array, "b l h p"],
    k: Float[Array, "b s g p"],
    v: Float[Array, "b s g p"],
    q_at: Positions | None = None,
    k_at: Positions | None = None,
    *,
    causal: bool,
    window: int | None = None,
    slopes: Float[Array, "h"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
) -> Float[Array, "b l h p"]:
    """Softmax attention of queries over the keys that they see.

        y_i = sum_j w_ij v_j / sum_j w_ij        w_ij = exp(scale q_i . k_j - slope |i - j|)

    A query sees the keys of its segment that are there, with `causal` none of a larger index unless it looks ahead and
    they are seen ahead (`Positions.ahead`), with `window` those fewer than that many positions away. A query that sees
    nothing gives 0. Softmax and sums are in at least float32. Rows may be cut over devices
    (`zoo.layers.cut_attention`).

    Differentiable in q, k and v (reverse mode; "dense" in forward mode, too).

    Args:
      q: queries; head i reads the keys of head i // (h / g).
      k, v: keys and values.
      q_at, k_at: indices and segments. None: the positions 0, 1, 2 ... of one segment, l = s.
      causal: whether keys of a larger index are hidden.
      window: how many positions to a side are seen, itself included, or None for all.
      slopes: what a position of distance costs in each head (ALiBi), or None. Not differentiated.
      scale: multiplies the products. None: 1 / sqrt(p).
      implementation: "blocks" (linear memory), "dense" (all scores at once), or "cudnn" (its kernel, through
        `jax.nn.dot_product_attention`: an NVIDIA GPU, bfloat16 or float16). None takes dense where l or l s is small,
        else blocks, also where they are not known yet (`jax.export.symbolic_shape`).
      block_size: keys a block, and queries a block times the heads of a group. None takes the platform's.

    Returns:
      y in q's dtype.

    Raises:
      ValueError: an unknown implementation, a block_size below 1, heads that do not divide, one of q_at and k_at alone.
      RuntimeError: "cudnn" where there is none.

    Examples:
      >>> q = k = v = jnp.ones((2, 10, 4, 8))
      >>> zoo.softmax_attention(q, k, v, causal=True).shape
      (2, 10, 4, 8)

    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; ALiBi: Press et al. 2021,
      arXiv:2108.12409.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}, expected None or one of {IMPLEMENTATIONS}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size}, expected at least 1")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, expected a number that divides the {q.shape[2]} of q")
    numbered = q_at is not None
    if numbered != (k_at is not None) or not (numbered or q.shape[1] == k.shape[1]):
        raise ValueError("q_at and k_at must both be given, unless queries and keys are the same positions")
    if (cut := cut_of(q)) is not None:
        attend = functools.partial(
            softmax_attention,
            causal=causal,
            window=window,
            scale=scale,
            implementation=implementation,
            block_size=block_size,
        )
        return cut_attention(attend, cut, q, k, v, q_at, k_at, slopes)
    hides = causal or window is not None or numbered
    rule = Rule(causal, window, float(q.shape[-1] ** -0.5 if scale is None else scale), hides, block_size)
    lengths = q.shape[1], k.shape[1]
    if implementation is None:
        known = all(isinstance(n, int) for n in lengths)  # not a symbol (`jax.export`)
        few = known and (lengths[0] <= DENSE_QUERIES or math.prod(lengths) <= DENSE_SCORES)
        implementation = "dense" if few else "blocks"
    if 0 in (*q.shape, *k.shape):
        implementation = "dense"  # no blocks of nothing
    numbers = pairs(q.shape[1], q_at, k_at)
    if implementation == "cudnn":
        return _cudnn(q, k, v, numbers, slopes, rule, plain=not numbered)
    return (
        _dense(q, k, v, numbers, slopes, rule) if implementation == "dense" else _blocks(q, k, v, numbers, slopes, rule)
    )


def _blocks(q, k, v, numbers, slopes, rule):
    """A block of queries and keys at a time; each device of a mesh its own rows and heads."""
    n = pieces()
    if q.shape[2] % n == 0:  # heads of keys that several devices read are sent to each
        k, v = (jnp.repeat(x, math.lcm(x.shape[2], n) // x.shape[2], axis=2) for x in (k, v))

    def attend(q, k, v, slopes, *numbers):
        run = by_hand(block_attention, "zoo.softmax_attention by blocks", "zoo.forward_mode()")
        return run(q, k, v, Pairs(*numbers), slopes, rule)

    axes = ("b l h p", "b s h p", "b s h p", "h", *("b l", "b s") * 3)
    return apart(attend, (q, k, v, slopes, *numbers), axes, "b l h p", channels="h")


def _dense(q, k, v, numbers, slopes, rule):
    """All scores at once."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = rearrange(q, "b l (g r) p -> b l g r p", g=k.shape[2])
    product = functools.partial(jnp.einsum, precision=exact(q, k, v), preferred_element_type=dtype)
    scores = product("blgrp,bsgp->bgrls", grouped, k) * rule.scale
    if slopes is not None:
        by_head = slopes.astype(dtype).reshape(k.shape[2], -1, 1, 1)
        scores -= by_head * jnp.abs(distances(numbers))[:, None, None]
    if rule.hides:
        scores = jnp.where(seen(numbers, causal=rule.causal, window=rule.window)[:, None, None], scores, -jnp.inf)
    # Where a query sees nothing, the largest score is the least number and the sum is 0.
    most = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(dtype).min))
    weights = jnp.exp(scores - most)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(v.dtype)
    y = product("bgrls,bsgp->blgrp", weights, v)
    return y.reshape(q.shape).astype(q.dtype)


def _cudnn(q, k, v, numbers, slopes, rule, *, plain):
    attention = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=rule.scale, implementation="cudnn")
    if plain and slopes is None and (rule.causal or rule.window is None):
        return attention(is_causal=rule.causal, local_window_size=None if rule.window is None else (rule.window - 1, 0))
    bias = None if slopes is None else -slopes[:, None, None] * jnp.abs(distances(numbers))[:, None]
    mask = seen(numbers, causal=rule.causal, window=rule.window)[:, None]
    return attention(None if bias is None else bias.astype(q.dtype), mask)
