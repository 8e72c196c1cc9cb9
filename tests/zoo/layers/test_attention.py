"""Attention against a softmax written out pair by pair, and its cache against the whole sequence."""

import contextlib
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
from zoo.layers.attention import _put, _put_one, alibi_slopes, rotate

D_MODEL = 10
BASE = zoo.AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, bias=True)


def make_attention(dtype="float64", causal=True, **options):
    """Attention in which every parameter matters: 4 heads of width 6 over 2 of keys, unless options differ."""
    kwargs = {"causal": causal, "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    config = dataclasses.replace(BASE, **options)
    return with_random_parameters(lambda: zoo.Attention(D_MODEL, config, **kwargs, rngs=nnx.Rngs(0)))


def compiled(attention):
    """The mixer's two calls, compiled once for each shape."""
    call = jax.jit(lambda x, mask=None, segment_ids=None: attention(x, mask=mask, segment_ids=segment_ids))
    extend = jax.jit(
        lambda x, state, mask=None, segment_ids=None: attention.extend(x, state, mask=mask, segment_ids=segment_ids)
    )
    return call, extend


def make_input(length, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


def oracle(attention, x, mask=None, segment_ids=None):
    """Attention in numpy, one query at a time: gather the keys it may see, softmax their scores, average the values."""
    config, p = attention.config, attention.head_dim
    x = config.in_multiplier * np.asarray(x)
    mask = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask)
    segment_ids = np.zeros(x.shape[:2], int) if segment_ids is None else np.asarray(segment_ids)
    q, k, v = (
        (x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])).reshape(*x.shape[:2], -1, p)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    if config.qk_norm:
        sizes = [np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.qk_norm_eps) for x in (q, k)]
        scales = [np.asarray(norm.scale[...]) for norm in (attention.q_norm, attention.k_norm)]
        q, k = q / sizes[0] * scales[0], k / sizes[1] * scales[1]

    def turned(vector, angle_of_position, h):
        if config.position != "rope":
            return vector
        out, turns = vector.copy(), config.rope_dim or p
        for i in range(turns // 2):
            number = i if config.rope_pairs is None else float(attention.rope_index[h, i])
            angle = angle_of_position * config.rope_base ** (-number / (config.rope_pairs or turns / 2))
            first, second = (2 * i, 2 * i + 1) if config.rope_interleaved else (i, i + turns // 2)
            a, b = vector[first], vector[second]
            out[first] = a * math.cos(angle) - b * math.sin(angle)
            out[second] = a * math.sin(angle) + b * math.cos(angle)
        return out

    heads, group = attention.n_heads, attention.n_heads // attention.n_kv_heads
    scale = config.softmax_scale or 1 / math.sqrt(p)
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
            score = turned(q[row, t, h], distance, h // group) @ turned(k[row, s, h // group], 0, h // group) * scale
            if config.position == "alibi":
                score -= 2.0 ** (-8 * (h + 1) / heads) * abs(distance)  # a power of two of heads
            scores.append(score)
            values.append(v[row, s, h // group])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            y[row, t, h] = weights @ np.array(values) / weights.sum()
    y = y.reshape(*x.shape[:2], -1)
    out_bias = 0 if attention.o_proj.bias is None else np.asarray(attention.o_proj.bias[...])
    return config.out_multiplier * (y @ np.asarray(attention.o_proj.kernel[...]) + out_bias)


MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
SEGMENTS = np.array([[7, 7, 7, 7, 7, 7, 7, 2, 2], [1, 1, 1, 0, 0, 1, 1, 1, 1]])


MULTIPLIED = {"softmax_scale": 0.3, "in_multiplier": 0.7, "out_multiplier": 1.3, "out_bias": False}
VARIANTS = [
    {"position": position, "window": window, "causal": causal}
    for position, window, causal in itertools.product(("rope", "alibi", "none"), (None, 3), (True, False))
]
VARIANTS += [{"rope_dim": 4, "rope_interleaved": True} | MULTIPLIED, {"rope_dim": 2, "causal": False}]
VARIANTS += [{"rope_dim": 4, "rope_pairs": 5}, {"qk_norm": True, "qk_norm_eps": 0.1, "rope_dim": 4}]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_equals_a_softmax_over_the_keys_that_each_query_sees(x64, options):
    attention = make_attention(**options)
    call, _ = compiled(attention)
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
    ("position", "window", "slots", "options"),
    [
        ("rope", None, 9, {"d_conv": 3}),
        ("alibi", None, 9, {}),
        ("none", None, 12, MULTIPLIED),
        ("rope", 3, None, {}),  # the window bounds the cache: no max_len
        ("alibi", 3, 9, {"d_conv": 4}),
        ("rope", 4, 6, {"rope_dim": 4, "rope_interleaved": True, "rope_pairs": 5}),
    ],
)
def test_extend_over_any_split_is_the_whole_call(x64, position, window, slots, options):
    attention = make_attention(position=position, window=window, **options)
    call, extend = compiled(attention)
    x, everywhere, one = make_input(9), np.ones((2, 9), bool), np.zeros((2, 9), int)
    ends = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    packed = np.array([[7, 7, 7, 7, 7, 7, 7, 2, 2], [1, 1, 0, 0, 0, 0, 1, 1, 1]])
    for name, mask, segment_ids in (("plain", everywhere, one), ("padded", ends, one), ("packed", everywhere, packed)):
        expected = call(x, mask, segment_ids)
        for pieces in SPLITS:
            starts = np.cumsum((0, *pieces))[:-1]
            if name == "packed" and np.any(np.diff(packed)[:, starts[1:] - 1]):
                continue  # a call goes on with the segment that the last one ended in
            state, outputs = attention.init_state(2, slots), []
            for start, length in zip(starts, pieces, strict=True):
                here = slice(start, start + length)
                y, state = extend(x[:, here], state, mask[:, here], segment_ids[:, here])
                outputs.append(y)
            y = jnp.concatenate(outputs, axis=1)
            assert_close(y[mask], expected[mask], name=f"{name} {pieces}")
            assert np.array_equal(state.next_index, mask.sum(axis=1))


def test_a_ring_may_have_more_slots_than_the_window(x64):
    attention, roomy = make_attention(window=3), make_attention(window=None)
    call, extend = compiled(attention)
    state, outputs = roomy.init_state(2, 5), []
    for piece in jnp.split(make_input(9), (4, 5), axis=1):
        y, state = extend(piece, state)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), call(make_input(9)))


def test_cache_of_a_window_does_not_grow_with_max_len():
    attention = make_attention("float32", window=3)
    sizes = {attention.init_state(2, max_len).key.shape for max_len in (None, 3, 1000)}
    assert sizes == {(2, 3, 2, 6)}  # 2 rows, 3 slots, 2 heads of keys, width 6
    assert attention.init_state(2, 2).key.shape == (2, 2, 2, 6)


@pytest.mark.parametrize("more", [(), (2, 6)])
def test_a_tpu_puts_one_position_a_row_where_others_do(more):
    held, new = (normal(jax.random.key(i), 4, l, *more) for i, l in enumerate((5, 1)))
    slot = jnp.array([[0], [4], [5], [2]])  # 5: in none
    assert np.array_equal(_put_one(held, new, slot), _put(held, new, slot))


def test_batch_rows_are_independent():
    call, _ = compiled(make_attention("float32"))
    x = make_input(7, b=3)
    assert_close(call(x)[1:2], call(x[1:2]))


def test_masked_positions_have_no_gradient():
    attention = make_attention("float32", position="alibi")
    mask = jnp.arange(6)[None] >= jnp.asarray([[2], [0]])

    def total(x):
        return jnp.where(mask[..., None], attention(x, mask=mask), 0).sum()

    gradient = jax.jit(jax.grad(total))(make_input(6))
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[0, :2])
    assert np.all(gradient[mask])


def test_rotary_scores_depend_on_the_distance_alone(x64):
    q, k = normal(jax.random.key(3), 1, 1, 2, 8), normal(jax.random.key(4), 1, 1, 2, 8)

    def score(i, j):
        i, j = (jnp.asarray([[n]]) for n in (i, j))
        return jnp.sum(rotate(q, i, 10_000.0) * rotate(k, j, 10_000.0), axis=-1)

    assert_close(score(107, 103), score(4, 0))
    assert_close(rotate(q, jnp.zeros((1, 1), int), 10_000.0), q)
    assert np.all(np.abs(score(5, 0) - score(4, 0)) > 1e-3)


@pytest.mark.slow
def test_which_pairs_a_head_has_is_never_moved():
    attention = make_attention("float32", rope_dim=4, rope_pairs=5)
    graphdef, params = nnx.split(attention)
    gradients = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(make_input(5)) ** 2))(params)
    assert not np.any(gradients["rope_index"][...])
    fresh = zoo.Attention(D_MODEL, attention.config, rngs=nnx.Rngs(0)).rope_index
    assert np.array_equal(fresh[...], [[0, 2]] * 2)
    assert fresh.get_metadata("decay") is False


def test_alibi_slopes_are_the_published_ones():
    # `get_slopes` of the published code.
    eight = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    assert np.array_equal(alibi_slopes(8), eight)
    between = [0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    assert_close(alibi_slopes(12), np.array(eight + between))


def test_bfloat16_computes_in_bfloat16():
    config = dataclasses.replace(BASE, position="alibi")
    attention = with_random_parameters(lambda: zoo.Attention(D_MODEL, config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    call, extend = compiled(attention)
    x, state = make_input(9), attention.init_state(2, 9)
    y, after = extend(x, state)
    arrays = (y, call(x), state.key, state.value, after.key, after.value)
    assert {a.dtype for a in arrays} == {jnp.dtype("bfloat16")}
    assert_close(y, compiled(make_attention("float32", position="alibi"))[0](x))


@pytest.mark.parametrize(
    ("d_model", "options", "heads"),
    [
        (128, {}, (2, 2, 64)),
        (32, {}, (1, 1, 32)),
        (96, {"head_dim": 32, "n_kv_heads": 1}, (3, 1, 32)),
        (96, {"n_heads": 4}, (4, 4, 24)),
        (10, {"n_heads": 4, "head_dim": 6}, (4, 4, 6)),
    ],
)
def test_heads_default_to_a_width_of_64(d_model, options, heads):
    attention = nnx.eval_shape(lambda: zoo.Attention(d_model, zoo.AttentionConfig(**options), rngs=nnx.Rngs(0)))
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == heads


@pytest.mark.parametrize(
    ("d_model", "options", "message"),
    [
        (8, {"n_heads": 0}, "n_heads=0, expected None or at least 1"),
        (8, {"window": 0}, "window=0, expected None or at least 1"),
        (8, {"position": "rotary"}, "position='rotary', expected 'rope', 'alibi' or 'none'"),
        (10, {"n_heads": 3}, "n_heads=3 must divide d_model=10 unless head_dim is given"),
        (100, {}, None),  # one head of 100
        (12, {"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        (12, {"n_heads": 4}, "head_dim=3, expected an even number with position='rope'"),
        (12, {"n_heads": 4, "position": "alibi"}, None),
        (12, {"n_heads": 2, "rope_dim": 3}, "rope_dim=3, expected None or an even number"),
        (12, {"n_heads": 2, "rope_dim": 8}, "rope_dim=8, expected at most head_dim=6"),
        (12, {"n_heads": 2, "rope_pairs": 2}, "rope_pairs=2, expected at least the 3 that are rotated"),
        (12, {"n_heads": 2, "rope_pairs": 3, "position": "none"}, "rope_pairs=3 with position='none', expected 'rope'"),
        (12, {"n_heads": 2, "d_conv": 0}, "d_conv=0, expected None or at least 1"),
    ],
)
def test_errors_name_the_option(unchecked, d_model, options, message):
    def build():
        return nnx.eval_shape(lambda: zoo.Attention(d_model, zoo.AttentionConfig(**options), rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        build()


def test_a_cache_needs_a_bound_and_a_direction():
    with pytest.raises(ValueError, match=r"max_len=None, expected the number of positions to keep"):
        make_attention("float32").init_state(1)
    with pytest.raises(ValueError, match=r"causal=False: a bidirectional mixer has no state"):
        make_attention("float32", causal=False).init_state(1, 8)
    with pytest.raises(ValueError, match="d_conv=3 with causal=False, expected None: the convolution is causal"):
        make_attention("float32", causal=False, d_conv=3)


def test_convolves_queries_keys_and_values_before_it_rotates_them(x64):
    """By hand: the projections' outputs, each channel over its last three positions."""
    attention, x = make_attention(d_conv=3), make_input(7)
    channels = np.concatenate([linear(x) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)], axis=-1)
    padded = np.pad(channels, ((0, 0), (2, 0), (0, 0)))
    kernel = np.asarray(attention.conv1d.kernel[...])
    mixed = sum(padded[:, i : i + 7] * kernel[:, i] for i in range(3)) + np.asarray(attention.conv1d.bias[...])
    plain = make_attention()
    seen = {name: mixed[..., a:b] for name, a, b in (("q_proj", 0, 24), ("k_proj", 24, 36), ("v_proj", 36, 48))}
    for name, value in seen.items():
        setattr(plain, name, lambda _, value=value: jnp.asarray(value))
    plain.o_proj = attention.o_proj
    assert_close(attention(x), plain(x))
