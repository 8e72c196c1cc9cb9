"""Attention against a softmax written out pair by pair, and its cache against the whole sequence."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, normal, with_random_parameters
from zoo.attention import alibi_slopes, rotate

D_MODEL = 10
BASE = zoo.AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, bias=True)


def make_attention(dtype="float64", causal=True, **options):
    """Attention in which every parameter matters: 4 heads of width 6 over 2 of keys, unless options differ."""
    kwargs = {"causal": causal, "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    config = dataclasses.replace(BASE, **options)
    return with_random_parameters(lambda: zoo.Attention(D_MODEL, config, **kwargs, rngs=nnx.Rngs(0)))


def make_input(length, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


def oracle(attention, x, mask=None, segment_ids=None):
    """Attention in numpy, one query at a time: gather the keys it may see, softmax their scores, average the values."""
    config, p = attention.config, attention.head_dim
    x = np.asarray(x)
    mask = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask)
    segment_ids = np.zeros(x.shape[:2], int) if segment_ids is None else np.asarray(segment_ids)
    q, k, v = (
        (x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])).reshape(*x.shape[:2], -1, p)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    def turned(vector, angle_of_position):
        if config.position != "rope":
            return vector
        out = vector.copy()
        for i in range(p // 2):
            angle = angle_of_position * config.rope_base ** (-2 * i / p)
            a, b = vector[i], vector[i + p // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + p // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    heads, group = attention.n_heads, attention.n_heads // attention.n_kv_heads
    y = np.zeros((*x.shape[:2], heads, p))
    for row, t, h in itertools.product(range(x.shape[0]), range(x.shape[1]), range(heads)):
        scores, values = [], []
        for s in range(x.shape[1]):
            first, last = min(s, t), max(s, t)
            distance = int(mask[row, first + 1 : last + 1].sum()) if s <= t else -int(mask[row, t + 1 : s + 1].sum())
            together = len(set(segment_ids[row, first : last + 1])) == 1
            near = config.window is None or abs(distance) < config.window
            if not (mask[row, s] and mask[row, t] and together and near) or (attention.causal and s > t):
                continue
            score = turned(q[row, t, h], distance) @ turned(k[row, s, h // group], 0) / math.sqrt(p)
            if config.position == "alibi":
                score -= 2.0 ** (-8 * (h + 1) / heads) * abs(distance)  # a power of two of heads
            scores.append(score)
            values.append(v[row, s, h // group])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            y[row, t, h] = weights @ np.array(values) / weights.sum()
    y = y.reshape(*x.shape[:2], -1)
    return y @ np.asarray(attention.o_proj.kernel[...]) + np.asarray(attention.o_proj.bias[...])


MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
SEGMENTS = np.array([[7, 7, 7, 7, 7, 7, 7, 2, 2], [1, 1, 1, 0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_equals_a_softmax_over_the_keys_that_each_query_sees(x64, position, window, causal):
    attention = make_attention(causal=causal, position=position, window=window)
    call = jax.jit(lambda x, mask=None, segment_ids=None: attention(x, mask=mask, segment_ids=segment_ids))
    x = make_input(9)
    assert_close(call(x), oracle(attention, x), name="alone")
    everywhere, one = np.ones_like(MASK), np.zeros_like(SEGMENTS)
    for name, mask, segment_ids in (
        ("packed", everywhere, SEGMENTS),
        ("padded", MASK, one),
        ("packed and padded", MASK, SEGMENTS),
    ):
        expected = oracle(attention, x, mask, segment_ids)
        assert_close(call(x, mask, segment_ids)[MASK], expected[MASK], name=name)


SPLITS = [(9,), (1,) * 9, (4, 1, 4), (1, 4, 4)]


@pytest.mark.parametrize(
    ("position", "window", "slots"),
    [
        ("rope", None, 9),
        ("alibi", None, 9),
        ("none", None, 12),
        ("rope", 3, None),  # the window bounds the cache: no max_len
        ("alibi", 3, 9),
        ("rope", 4, 6),
    ],
)
def test_extend_over_any_split_is_the_whole_call(x64, position, window, slots):
    attention = make_attention(position=position, window=window)
    whole = jax.jit(lambda x, mask, segment_ids: attention(x, mask=mask, segment_ids=segment_ids))
    extend = jax.jit(lambda x, state, mask, ids: attention.extend(x, state, mask=mask, segment_ids=ids))
    x, everywhere, one = make_input(9), np.ones((2, 9), bool), np.zeros((2, 9), int)
    ends = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    packed = np.array([[7, 7, 7, 7, 7, 7, 7, 2, 2], [1, 1, 0, 0, 0, 0, 1, 1, 1]])
    for name, mask, segment_ids in (("plain", everywhere, one), ("padded", ends, one), ("packed", everywhere, packed)):
        expected = whole(x, mask, segment_ids)
        for pieces in SPLITS:
            starts = np.cumsum((0, *pieces))[:-1]
            if name == "packed" and np.any(np.diff(packed)[:, starts[1:] - 1]):
                continue  # a call goes on with the segment that the last one ended in
            state, outputs = attention.init_state(2, slots), []
            for start, length in zip(starts, pieces, strict=True):
                here = slice(start, start + length)
                y, state = extend(x[:, here], state, mask[:, here], segment_ids[:, here])
                outputs.append(y)
            assert_close(jnp.concatenate(outputs, axis=1)[mask], expected[mask], name=f"{name} {pieces}")
            assert np.array_equal(state.index, mask.sum(axis=1))
