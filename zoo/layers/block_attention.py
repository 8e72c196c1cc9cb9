"""Softmax attention a block of queries and a block of keys at a time: nothing of size l s ever exists.

    y_i = sum_j w_ij v_j / sum_j w_ij        w_ij = exp(scale q_i . k_j - slope |i - j|)        over the j that i sees

How it is computed. The scores of one block of queries against one block of keys are a matrix that stays in cache. The
blocks of keys come one after the other; what was summed up before is rescaled whenever a larger score is met (the
online softmax), so one pass gives the exact result. Only blocks that hold a seen pair are visited: what lies above the
diagonal, outside a window, in another document or in an empty part of a cache costs nothing. Which those are follows
from the smallest and the largest index and segment in a block, at run time.

The gradient is written by hand: the forward pass keeps its inputs, its output and one number a query, the logarithm of
its sum; the backward pass rebuilds a block's scores from them. So memory is linear in the length, both ways.

The query heads that read one head of keys are rows of one matrix: keys are never copied. Two drivers run the same
blocks. On a CPU rows and heads are a loop, so that a head's numbers stay in cache; elsewhere they are batch axes of the
products.

Axes: s keys, g key-value heads, r query heads of a group, m rows of a block of queries (its positions times r), c
blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ssm.checks import is_known_size
from ssm.platform import by_platform
from ssm.precision import exact
from zoo.layers.seen import ABSENT, LOOKS_AHEAD, SEEN_AHEAD, Pairs, distances, seen

# Measured on one CPU core at head width 64, forward and backward: ahead of 128 and 512 from 197 to 4,096 positions.
CPU_BLOCK_SIZE = 256
# Not yet measured on GPU and TPU. Up to this length all scores of a head are one block.
BLOCK_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for all pairs: which are seen, and what their products are multiplied by."""

    causal: bool
    window: int | None
    scale: float
    hides: bool
    """Whether some query may not see some key."""
    block_size: int | None
    """None: the platform's."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def block_attention(
    q: Float[Array, "b l h p"],
    k: Float[Array, "b s g p"],
    v: Float[Array, "b s g p"],
    numbers: Pairs,
    slopes: Float[Array, "h"] | None,
    rule: Rule,
) -> Float[Array, "b l h p"]:
    """`zoo.layers.softmax_attention.softmax_attention` by blocks; differentiable in q, k and v (reverse mode).

    Source: online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; backward from the logarithm of the sum: Dao
      2023, arXiv:2307.08691, algorithms 1 and 2.
    """
    return _forward(q, k, v, numbers, slopes, rule)[0]


def _forward(q, k, v, numbers, slopes, rule):
    y, log_sum = _each_head(_head_forward, (q,), (k, v), numbers, slopes, rule, axis=2)
    y = y.astype(q.dtype)
    return y, (q, k, v, numbers, slopes, y, log_sum)


def _backward(rule, kept, dy):
    q, k, v, numbers, slopes, y, log_sum = kept
    gradients = _each_head(_head_backward, (q, y, log_sum, dy), (k, v), numbers, slopes, rule, axis=1)
    return *(dx.astype(x.dtype) for dx, x in zip(gradients, (q, k, v), strict=True)), None, None


block_attention.defvjp(_forward, _backward)


def _each_head(function, by_query, by_key, numbers, slopes, rule, axis):
    """`function` for each row and each head of keys, in the way of the platform that the program is compiled for.

    It takes the row's and the head's part of everything, (l r ...) of the queries and (s 1 ...) of the keys, and the
    range of blocks to visit along `axis` for each block of the other: 2 from queries to keys, 1 from keys to queries.
    """
    group = by_query[0].shape[2] // by_key[0].shape[2]
    lengths = by_query[0].shape[1], by_key[0].shape[1]

    def run(over_heads, size, by_row):
        size = rule.block_size or size
        sizes = _even(lengths[0], max(1, size // group)), _even(lengths[1], size)
        visited = _visited(numbers, sizes, rule, axis, by_row)
        one = functools.partial(function, rule=rule, sizes=sizes)
        return over_heads(one, by_query, by_key, (numbers, visited), slopes)

    return by_platform(
        lambda: run(_loop_over_heads, CPU_BLOCK_SIZE, True), lambda: run(_batch_of_heads, BLOCK_SIZE, False)
    )


def _even(length, most):
    """The size of blocks that a length is cut into: at most `most`, and if it is known with little to fill up."""
    return -(-length // -(-length // most)) if is_known_size(length) else most


def _loop_over_heads(function, by_query, by_key, by_row, slopes):
    b, h, g = by_key[0].shape[0], by_query[0].shape[2], by_key[0].shape[2]

    def part(x, row, head):
        # Products of narrower numbers are widened on a CPU anyway, each time.
        x = lax.dynamic_index_in_dim(x, row, keepdims=False)
        size = x.shape[1] // g
        return _wide(lax.dynamic_slice_in_dim(x, head * size, size, axis=1))

    def put(whole, x, row, head):
        zero = jnp.zeros_like(row)
        return lax.dynamic_update_slice(whole, x[None], [row, zero, head * x.shape[1], *[zero] * (x.ndim - 2)])

    def run(row, head):
        numbers = jax.tree.map(
            lambda x: x[0] if x.shape[0] == 1 else lax.dynamic_index_in_dim(x, row, 0, False), by_row
        )
        size = h // g
        slope = None if slopes is None else lax.dynamic_slice_in_dim(slopes, head * size, size)
        return function(*(part(x, row, head) for x in (*by_query, *by_key)), *numbers, slope)

    def step(n, wholes):
        row, head = n // g, n % g
        return [put(whole, x, row, head) for whole, x in zip(wholes, run(row, head), strict=True)]

    shapes = jax.eval_shape(run, 0, 0)
    wholes = [jnp.zeros((b, x.shape[0], g * x.shape[1], *x.shape[2:]), x.dtype) for x in shapes]
    return lax.fori_loop(0, jnp.asarray(b * g), step, wholes)  # an array: b may be a symbol (`jax.export`)


def _batch_of_heads(function, by_query, by_key, by_row, slopes):
    g = by_key[0].shape[2]
    heads = [x.reshape(*x.shape[:2], g, -1, *x.shape[3:]) for x in (*by_query, *by_key)]
    slopes = None if slopes is None else slopes.reshape(g, -1)
    of_row = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, by_row)
    row_axes = jax.tree.map(lambda x: None if x.shape[0] == 1 else 0, by_row)

    def run(of_row, slopes, *heads):
        return function(*heads, *of_row, slopes)

    over_heads = jax.vmap(run, in_axes=(None, 0, *[1] * len(heads)), out_axes=1)
    outputs = jax.vmap(over_heads, in_axes=(row_axes, None, *[0] * len(heads)))(of_row, slopes, *heads)
    return [x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in outputs]


def _visited(numbers, sizes, rule, axis, by_row):
    """The blocks that each block has to do with, as (first, one behind the last) along `axis`.

    Without `by_row`, one range holds for all rows.
    """
    there = numbers.k_index != ABSENT
    q_low, q_high = _bounds(numbers.q_index, sizes[0], 2)
    k_low, k_high = _bounds(numbers.k_index, sizes[1], 1, there)
    needed = jnp.broadcast_to(k_low <= k_high, (k_low.shape[0], q_low.shape[1], k_low.shape[2]))
    if rule.causal:
        reached = k_low <= q_high
        if numbers.q_ahead is not None:
            looks = _bounds(numbers.q_ahead == LOOKS_AHEAD, sizes[0], 2)[1] > 0
            reached |= looks & (_bounds(numbers.k_ahead == SEEN_AHEAD, sizes[1], 1, there)[1] > 0)
        needed &= reached
    if rule.window is not None:
        needed &= q_low - k_high < rule.window
        if not rule.causal or numbers.q_ahead is not None:
            needed &= k_low - q_high < rule.window
    if numbers.q_segment is not None:
        q_low, q_high = _bounds(numbers.q_segment, sizes[0], 2)
        k_low, k_high = _bounds(numbers.k_segment, sizes[1], 1, there)
        needed &= (k_low <= q_high) & (q_low <= k_high)
    if not by_row:
        needed = jnp.any(needed, axis=0, keepdims=True)
    block = lax.broadcasted_iota(jnp.int32, needed.shape, axis)
    first = jnp.min(jnp.where(needed, block, needed.shape[axis]), axis=axis)
    return first, jnp.max(jnp.where(needed, block + 1, 0), axis=axis)


def _bounds(x, size, axis, there=True):
    """The smallest and the largest of each block, of those that are there, with a new axis."""
    bounds = []
    for reduce, value in ((jnp.min, ABSENT), (jnp.max, -ABSENT)):
        count = -(-x.shape[1] // size)
        ends = ((0, 0), (0, count * size - x.shape[1]))
        padded = jnp.pad(jnp.where(there, x, value), ends, constant_values=value)
        bounds.append(jnp.expand_dims(reduce(padded.reshape(x.shape[0], count, size), axis=2), axis))
    return bounds


# One head -------------------------------------------------------------------------------------------------------------


def _head_forward(q, k, v, numbers, visited, slopes, *, rule, sizes):
    """(y, logarithm of the sum of exponentials): (l r p) and (l r), at least float32."""
    length, group, _ = q.shape
    q, k, v = _rows(q, sizes[0]), _rows(k, sizes[1]), _rows(v, sizes[1])
    scores_of = _block_scores(q, k, numbers, slopes, rule, sizes, group)
    m, dtype = sizes[0] * group, jnp.promote_types(q.dtype, jnp.float32)

    def queries(i):
        def keys(j, before):
            most, total, y = before
            scores = scores_of(i, j)
            larger = jnp.maximum(most, jnp.max(scores, axis=1))
            weights, shrink = jnp.exp(scores - larger[:, None]), jnp.exp(most - larger)
            here = _product(weights.astype(v.dtype), _block(v, j, sizes[1]), (1, 0))
            return larger, total * shrink + jnp.sum(weights, axis=1), y * shrink[:, None] + here

        least = jnp.full((m,), jnp.finfo(dtype).min / 2, dtype)
        start = least, jnp.zeros_like(least), jnp.zeros((m, v.shape[1]), dtype)
        most, total, y = lax.fori_loop(visited[0][i], visited[1][i], keys, start)
        # Of a query that sees nothing y and the logarithm are 0.
        log_sum = jnp.where(total > 0, most + jnp.log(jnp.where(total > 0, total, 1)), 0)
        return y / jnp.where(total > 0, total, 1)[:, None], log_sum

    count = -(-length // sizes[0])
    y, log_sum = lax.map(queries, jnp.arange(count))
    return tuple(x.reshape(count * sizes[0], group, *x.shape[2:])[:length] for x in (y, log_sum))


def _head_backward(q, y, log_sum, dy, k, v, numbers, visited, slopes, *, rule, sizes):
    """The gradients in q (l r p), k and v (s 1 p), at least float32."""
    (l, r, p), s, dtype = q.shape, k.shape[0], log_sum.dtype
    m = sizes[0] * r
    inner = _rows(jnp.sum(dy.astype(dtype) * y, axis=2), sizes[0])
    q, k, v = _rows(q, sizes[0]), _rows(k, sizes[1]), _rows(v, sizes[1])
    dy, log_sum = _rows(dy, sizes[0]), _rows(log_sum, sizes[0])
    scores_of = _block_scores(q, k, numbers, slopes, rule, sizes, r)

    def keys(dq, j):
        k_here, v_here = _block(k, j, sizes[1]), _block(v, j, sizes[1])

        def queries(i, sums):
            dq, dk, dv = sums
            dy_here = _block(dy, i, m)
            weights = jnp.exp(scores_of(i, j) - _block(log_sum, i, m)[:, None])
            dscores = weights * (_product(dy_here, v_here, (1, 1)) - _block(inner, i, m)[:, None])
            weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
            dv += _product(weights, dy_here, (0, 0))
            dk += _product(dscores, _block(q, i, m), (0, 0))
            dq_here = _block(dq, i, m) + _product(dscores, k_here, (1, 0))
            return lax.dynamic_update_slice_in_dim(dq, dq_here, i * m, 0), dk, dv

        zeros = jnp.zeros(k_here.shape, dtype)
        dq, dk, dv = lax.fori_loop(visited[0][j], visited[1][j], queries, (dq, zeros, zeros))
        return dq, (dk, dv)

    counts = -(-l // sizes[0]), -(-s // sizes[1])
    dq, (dk, dv) = lax.scan(keys, jnp.zeros(q.shape, dtype), jnp.arange(counts[1]))
    dk, dv = (x.reshape(counts[1] * sizes[1], 1, p)[:s] for x in (dk, dv))
    return (dq * rule.scale).reshape(counts[0] * sizes[0], r, p)[:l], dk * rule.scale, dv


def _block_scores(q, k, numbers, slopes, rule, sizes, group):
    """(i, j) -> the scores of a block of queries and a block of keys, -inf where they are hidden."""
    # Keys that fill up the last block are absent; of queries that do nobody reads the output.
    filled = Pairs(
        *(
            None if x is None else _fill(x, size, value)
            for x, size, value in zip(numbers, sizes * 3, (0, ABSENT, 0, 0, 0, 0), strict=True)
        )
    )
    n_keys = numbers.k_index.shape[0]
    hides = rule.hides or not is_known_size(n_keys) or n_keys % sizes[1] > 0
    slopes = None if slopes is None else jnp.tile(_wide(slopes), sizes[0])[:, None]

    def here(i, j):
        places = ((i, sizes[0], group), (j, sizes[1], 1)) * 3
        return Pairs(
            *(
                None if x is None else jnp.repeat(_block(x, n, size), times)
                for x, (n, size, times) in zip(filled, places, strict=True)
            )
        )

    def scores_of(i, j):
        scores = _product(_block(q, i, sizes[0] * group), _block(k, j, sizes[1]), (1, 1)) * rule.scale
        if slopes is None and not hides:
            return scores
        at = here(i, j)
        if slopes is not None:
            scores -= slopes * jnp.abs(distances(at))
        return jnp.where(seen(at, causal=rule.causal, window=rule.window), scores, -jnp.inf) if hides else scores

    return scores_of


def _product(a, b, axes):
    """The sum over an axis of each, in at least float32; no transposed copies."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    numbers = (axes[:1], axes[1:]), ((), ())
    return lax.dot_general(a, b, numbers, precision=exact(a, b), preferred_element_type=dtype)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rows(x, size):
    """(l r ...) as whole blocks of rows (m ...)."""
    filled = _fill(x, size)
    return filled.reshape(filled.shape[0] * x.shape[1], *x.shape[2:])


def _fill(x, size, value=0):
    missing = -(-x.shape[0] // size) * size - x.shape[0]
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)
