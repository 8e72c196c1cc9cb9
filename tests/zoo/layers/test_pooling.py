"""One vector a row: each way of pooling against its formula, and padding left out of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, normal, with_random_parameters
from zoo.layers.pooling import AttentionPool, attention_pool, pool

MASK = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2, [False, True, True, False, False, False]])


@pytest.fixture
def x(x64):
    return normal(jax.random.key(0), 3, 6, 5)


def test_first_is_the_first_position(x):
    np.testing.assert_array_equal(pool(x, MASK, kind="first"), x[:, 0])


def test_mean_is_of_those_that_are_there(x):
    expected = jnp.stack([x[0].mean(0), x[1, :4].mean(0), x[2, 1:3].mean(0)])
    assert_close(pool(x, MASK, kind="mean"), expected)
    assert_close(pool(x, kind="mean"), x.mean(1))


def test_last_is_the_last_that_is_there(x):
    np.testing.assert_array_equal(pool(x, MASK, kind="last"), jnp.stack([x[0, 5], x[1, 3], x[2, 2]]))
    np.testing.assert_array_equal(pool(x, kind="last"), x[:, 5])


def test_attention_weighs_by_the_softmax_of_a_linear_score(x):
    query = 3 * normal(jax.random.key(1), 5)
    expected = []
    for row, mask in zip(np.asarray(x), np.asarray(MASK), strict=True):
        weight = np.exp(row[mask] @ np.asarray(query))
        expected.append((weight[:, None] * row[mask]).sum(0) / weight.sum())
    assert_close(attention_pool(x, query, MASK), jnp.asarray(np.stack(expected)))
    assert_close(attention_pool(x, query), attention_pool(x, query, jnp.ones((3, 6), bool)))


def test_attention_to_large_scores_and_in_bfloat16_is_computed_in_float32():
    x = normal(jax.random.key(0), 3, 6, 5, dtype=jnp.bfloat16)
    query = 300 * normal(jax.random.key(1), 5, dtype=jnp.float32)
    exact = attention_pool(x.astype(jnp.float32), query, MASK)
    pooled = attention_pool(x, query, MASK)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))
    assert np.isfinite(pooled).all()


@pytest.mark.parametrize("kind", ["first", "mean", "last", "attention"])
def test_what_is_not_there_has_no_say_and_no_gradient(kind, x):
    query = normal(jax.random.key(1), 5)

    def total(x, mask):
        pooled = attention_pool(x, query, mask) if kind == "attention" else pool(x, mask, kind=kind)
        return jnp.sum(pooled * normal(jax.random.key(2), *pooled.shape))

    gradient = jax.grad(total)(x, MASK.at[2, 0].set(True))
    assert not np.any(gradient[1, 4:])
    assert not np.any(gradient[2, 3:])
    nothing = jax.grad(total)(x, jnp.zeros((3, 6), bool))
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("kind", ["first", "mean", "last", "attention"])
def test_a_classifier_pools_as_it_says_whatever_the_padding(kind):
    config = zoo.SequenceClassifierConfig(
        d_model=8,
        n_layers=1,
        vocab_size=24,
        max_len=9,
        pattern="attn/mlp",
        n_labels=3,
        pool=kind,
        attn=zoo.AttentionConfig(n_heads=2, position="none"),
    )
    model = with_random_parameters(lambda: zoo.SequenceClassifier(config, rngs=nnx.Rngs(0)))
    has_query = any("attention_pool" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    assert has_query == (kind == "attention")
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)))
    mask = jnp.arange(9)[None] < jnp.asarray([[6], [6]])
    logits = jax.jit(model)(ids, mask)
    assert logits.shape == (2, 3)
    assert_close(logits, jax.jit(model)(ids[:, :6]))
    hidden = model.hidden(ids, mask)
    pooled = model.attention_pool(hidden, mask) if kind == "attention" else pool(hidden, mask, kind=kind)
    assert_close(model.embed(ids, mask), jnp.tanh(pooled @ model.pooler.kernel[...] + model.pooler.bias[...]))


@pytest.mark.usefixtures("unchecked")
def test_a_row_of_several_documents_has_no_one_vector():
    config = zoo.SequenceClassifierConfig(vocab_size=24, d_model=8, n_layers=1, pattern="-/mlp", max_len=None)
    model = zoo.SequenceClassifier(config, rngs=nnx.Rngs(0))
    ids = jnp.zeros((1, 4), int)
    for call in (model, model.embed):
        with pytest.raises(ValueError, match="segment_ids given, expected one document a row"):
            call(ids, None, ids)
    assert model.hidden(ids, None, ids).shape == (1, 4, 8)


def test_a_fresh_query_is_nearly_the_mean():
    x = normal(jax.random.key(0), 3, 6, 8, dtype=jnp.float32)
    pooled = AttentionPool(8, rngs=nnx.Rngs(0))(x, MASK)
    assert_close(pooled, pool(x, MASK, kind="mean"), tolerance=0.1)
