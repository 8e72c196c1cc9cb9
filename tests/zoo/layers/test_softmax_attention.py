"""Attention by blocks and all at once against pairs written out, in value and gradient; what it costs."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import assert_close, normal, tpu_products
from zoo.layers import block_attention, reference
from zoo.layers.seen import Positions
from zoo.layers.softmax_attention import softmax_attention


def make_inputs(b=2, length=13, n_keys=13, h=4, g=2, p=6, dtype=None):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (b, length, h, p), (b, n_keys, g, p), (b, n_keys, g, p)
    return [normal(key, *shape, dtype=dtype) for key, shape in zip(keys, shapes, strict=True)]


def make_places(b, length):
    """Irregular positions, different in each row: some not there, and packed documents."""
    rng = np.random.default_rng(length)
    there = rng.random((b, length)) >= 0.25
    index, segments = np.cumsum(there, axis=1) - 1, np.cumsum(rng.random((b, length)) < 0.15, axis=1)
    return [
        Positions(jnp.asarray(x, jnp.int32), jnp.asarray(segments, jnp.int32))
        for x in (index, np.where(there, index, -1))
    ]


def value_and_gradient(function, inputs):
    weight = normal(jax.random.key(1), *inputs[0].shape)

    def loss(*inputs):
        y = function(*inputs)
        return jnp.sum(weight * y), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return y, gradients


@pytest.fixture(params=["loop", "batch"])
def driver(request, monkeypatch):
    """Both ways to run the blocks: a CPU's, and the other platforms'."""
    if request.param == "batch":
        monkeypatch.setattr(block_attention, "by_platform", lambda _, elsewhere: elsewhere())


RULES = [(True, None, False), (True, 3, True), (False, None, True), (False, 3, False)]


@pytest.mark.parametrize(("causal", "window", "biased"), RULES)
@pytest.mark.usefixtures("driver")
def test_blocks_and_dense_are_the_pairs_written_out(x64, causal, window, biased):
    inputs, slopes = make_inputs(), normal(jax.random.key(2), 4) ** 2 if biased else None
    options = {"causal": causal, "window": window, "slopes": slopes}
    ways = {"dense": {"implementation": "dense"}, "blocks": {"implementation": "blocks", "block_size": 4}}
    places = {"plain": [None, None], "packed, with holes": make_places(2, 13)}

    def run(attention, **more):
        return {
            name: value_and_gradient(lambda *x, at=at: attention(*x, *at, **options, **more), inputs)
            for name, at in places.items()
        }

    expected = run(reference.softmax_attention)
    for way, more in ways.items():
        for name, (y, gradients) in run(softmax_attention, **more).items():
            assert_close(y, expected[name][0], name=f"{way}, {name}")
            assert_close(gradients, expected[name][1], gradient=True, name=f"{way}, {name}")


@pytest.mark.parametrize(("length", "n_keys", "size"), [(1, 9, 4), (5, 30, 8)])
@pytest.mark.usefixtures("driver")
def test_queries_read_a_longer_cache(x64, length, n_keys, size):
    """Prefill and decode: the queries are the last positions, and some slots are empty."""
    inputs = make_inputs(length=length, n_keys=n_keys)
    index = np.where(np.arange(n_keys) < n_keys - 2, np.arange(n_keys), -1)
    k_at = Positions(jnp.asarray(np.broadcast_to(np.roll(index, 3), (2, n_keys)), jnp.int32))
    q_at = Positions(jnp.arange(n_keys - 2 - length, n_keys - 2, dtype=jnp.int32)[None])
    expected = value_and_gradient(lambda *x: reference.softmax_attention(*x, q_at, k_at, causal=True), inputs)
    options = {"causal": True, "implementation": "blocks", "block_size": size}
    y, gradients = value_and_gradient(lambda *x: softmax_attention(*x, q_at, k_at, **options), inputs)
    assert_close(y, expected[0])
    assert_close(gradients, expected[1], gradient=True)


@pytest.mark.parametrize("implementation", ["blocks", "dense"])
def test_a_query_that_sees_nothing_gives_zero(implementation):
    inputs = make_inputs(length=3, n_keys=5)
    q_at, k_at = Positions(jnp.zeros((2, 3), jnp.int32)), Positions(jnp.full((2, 5), -1, jnp.int32))
    options = {"causal": True, "implementation": implementation, "block_size": 2}
    y, gradients = value_and_gradient(lambda *x: softmax_attention(*x, q_at, k_at, **options), inputs)
    assert all(not np.any(x) for x in jax.tree.leaves((y, gradients)))


@pytest.mark.parametrize(("b", "length", "n_keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.usefixtures("driver")
def test_no_rows_no_queries_and_no_keys_give_empty_or_zero_results(b, length, n_keys):
    inputs = make_inputs(b, length, n_keys)
    at = [Positions(jnp.arange(n, dtype=jnp.int32)[None]) for n in (length, n_keys)]
    for implementation in ("blocks", "dense"):
        y = softmax_attention(*inputs, *at, causal=True, implementation=implementation)
        assert y.shape == inputs[0].shape
        assert not np.any(y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["blocks", "dense"])
@pytest.mark.usefixtures("driver")
def test_narrow_numbers_are_summed_in_float32(dtype, implementation):
    """4,096 equal weights of one: a sum in float16 or bfloat16 would stop far below."""
    length = 4096
    q, k, v = (jnp.zeros((1, n, 1, 2), dtype) for n in (9, length, length))
    index = [Positions(jnp.full((1, n), 0, jnp.int32)) for n in (9, length)]
    options = {"causal": False, "implementation": implementation, "block_size": 512}
    y = jax.jit(lambda *x: softmax_attention(*x, *index, **options))(q, k, v + 1)
    assert y.dtype == dtype
    assert_close(y, jnp.ones_like(y), tolerance=1e-2)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_the_length(gradient):
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

        def run(q, k, v):
            return jnp.sum(softmax_attention(q, k, v, causal=True))

        program = jax.jit(jax.grad(run, argnums=(0, 1, 2)) if gradient else run).lower(x, x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.5 * short
    assert long < 16384**2  # one byte for each score


def test_only_blocks_with_a_seen_pair_are_visited():
    """The diagonal, a window, documents and an empty end of a cache: the blocks of 4 that each block of 4 reads."""

    def visited(q_at, k_at, **rule):
        rule = block_attention.Rule(
            **{"causal": True, "window": None, "scale": 1.0, "hides": True} | rule, block_size=4
        )
        numbers = block_attention.Pairs(q_at.indices, k_at.indices, q_at.segments, k_at.segments)
        first, last = block_attention._visited(numbers, (4, 4), rule, 2, True)
        return list(zip(first[0].tolist(), last[0].tolist(), strict=True))

    index = jnp.arange(16, dtype=jnp.int32)[None]
    documents = jnp.asarray([[0] * 8 + [1] * 4 + [2] * 4], jnp.int32)
    filled = jnp.where(index < 6, index, block_attention.ABSENT)
    plain = Positions(index)
    assert visited(plain, plain) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert visited(plain, plain, window=4) == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert visited(plain, plain, causal=False, window=2) == [(0, 2), (0, 3), (1, 4), (2, 4)]
    assert visited(*[Positions(index, documents)] * 2) == [(0, 1), (0, 2), (2, 3), (3, 4)]
    assert visited(Positions(index[:, 4:8]), Positions(filled)) == [(0, 2)]


def test_the_program_follows_the_platform_it_is_compiled_for():
    """Rows and heads are a loop on a CPU, and axes of the products elsewhere, whatever this process runs on."""
    x = jax.ShapeDtypeStruct((1, 300, 2, 8), jnp.float32)
    traced = jax.jit(jax.grad(lambda q, k, v: jnp.sum(softmax_attention(q, k, v, causal=True)))).trace(x, x, x)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["tpu"] == loops["cuda"] == loops["cpu"] - 2  # one forward, one backward


@pytest.mark.parametrize("shape", ["b, 80", "b, l"])
def test_exported_for_any_batch_and_length(shape):
    b, length = jax.export.symbolic_shape(shape)
    x = jax.ShapeDtypeStruct((b, length, 2, 4), jnp.float32)
    run = jax.jit(functools.partial(softmax_attention, causal=True))
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x, x, x)
    inputs = make_inputs(3, 80, 80, h=2, g=2, p=4, dtype=jnp.float32)
    assert_close(exported.call(*inputs), run(*inputs))
    assert "stablehlo.while" in exported.mlir_module()  # by blocks: never all scores at once


def test_wrong_options_are_named(unchecked):
    q, k, v = make_inputs()
    for options, message in (
        ({"implementation": "flash"}, "implementation='flash', expected None or one of"),
        ({"block_size": 0}, "block_size=0, expected at least 1"),
        ({"q_at": Positions(jnp.zeros((1, 13), jnp.int32))}, "q_at and k_at must both be given"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_attention(q, k, v, causal=True, **options)
    with pytest.raises(ValueError, match="k has 3 heads, expected a number that divides the 4 of q"):
        softmax_attention(q, normal(jax.random.key(0), 2, 13, 3, 6), v, causal=True)


@pytest.mark.parametrize("implementation", ["blocks", "dense"])
@pytest.mark.parametrize(("dtype", "expected"), [("float32", ("HIGHEST", "f32", "f32")), ("bfloat16", None)])
def test_products_of_float32_are_exact_on_every_platform(implementation, dtype, expected):
    x = jax.ShapeDtypeStruct((1, 20, 2, 8), dtype)
    run = functools.partial(softmax_attention, causal=True, implementation=implementation)
    total = jax.grad(lambda q, k, v: jnp.sum(run(q, k, v).astype(jnp.float32)), (0, 1, 2))
    for *product, result in tpu_products(total, x, x, x):
        assert result == "f32" or implementation == "dense"  # whose gradient in q is rounded as q is
        assert tuple(product) == expected or (expected is None and "bf16" in product) or product[0] == "HIGHEST"
