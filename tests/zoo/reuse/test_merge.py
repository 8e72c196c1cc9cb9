"""Merged models: what each method is of the numbers, and what expectation it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo.models.frozen import freeze
from zoo.reuse.merge import drop_at_random, keep_largest, ties


def model(seed):
    return zoo.MLP(8, zoo.MLPConfig(d_ff=8, bias=True), rngs=nnx.Rngs(seed))


def numbers(model):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))])


BASE, ONE, TWO = (model(seed) for seed in range(3))
B, X, Y = map(numbers, (BASE, ONE, TWO))


def test_averages_and_task_arithmetic_are_sums():
    np.testing.assert_allclose(numbers(zoo.merge(None, [ONE, TWO], method="average")), (X + Y) / 2, atol=1e-7)
    got = numbers(zoo.merge(None, [ONE, TWO], method="average", weights=[3.0, 1.0]))
    np.testing.assert_allclose(got, 0.75 * X + 0.25 * Y, atol=1e-7)
    got = numbers(zoo.merge(BASE, [ONE, TWO], method="task_arithmetic", weights=[0.3, 2.0]))
    np.testing.assert_allclose(got, B + 0.3 * (X - B) + 2 * (Y - B), atol=1e-6)
    assert np.array_equal(numbers(BASE), B)  # which stays as it is


def test_dare_keeps_the_expectation_and_drop_does_not():
    delta = jnp.asarray(np.random.default_rng(0).standard_normal(16))
    keys = jax.random.split(jax.random.key(0), 4000)
    for rescale, expected in ((True, delta), (False, delta / 4)):
        mean = jnp.mean(
            jax.vmap(lambda key, rescale=rescale: drop_at_random(delta, 0.75, key, rescale=rescale))(keys), axis=0
        )
        np.testing.assert_allclose(mean, expected, atol=0.15)
    merged = numbers(zoo.merge(BASE, [ONE], method="dare", rate=0.75, key=jax.random.key(1)))
    moved = ~np.isclose(merged, B, atol=1e-7)
    np.testing.assert_allclose(merged[moved], (B + 4 * (X - B))[moved], atol=1e-5)
    assert 0.1 < moved[np.abs(X - B) > 1e-3].mean() < 0.4
    nothing = numbers(zoo.merge(BASE, [ONE], method="dare", rate=0.0, key=jax.random.key(1)))
    np.testing.assert_allclose(nothing, X, atol=1e-6)


def test_ties_keeps_the_largest_and_averages_those_of_one_sign():
    assert keep_largest(jnp.array([1.0, -4, 2, 3]), 0.5).tolist() == [0, -4, 0, 3]
    got = ties([jnp.array([1.0, -3, 0, 0]), jnp.array([2.0, 1, 5, 0])], [1.0, 1.0])
    assert got.tolist() == [1.5, -3, 5, 0]
    np.testing.assert_allclose(numbers(zoo.merge(BASE, [ONE], method="ties", rate=0.0)), X, atol=1e-6)


def test_what_is_excluded_stays_and_what_does_not_fit_is_said():
    got = zoo.merge(BASE, [ONE], method="task_arithmetic", exclude="down_proj.*")
    assert np.array_equal(got.down_proj.kernel[...], BASE.down_proj.kernel[...])
    np.testing.assert_allclose(got.up_proj.kernel[...], ONE.up_proj.kernel[...], atol=1e-6)
    with pytest.raises(ValueError, match=r"rate=1\.0, expected at least 0 and below 1"):
        zoo.merge(BASE, [ONE], rate=1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="key=None with method='dare'"):
        zoo.merge(BASE, [ONE])
    with pytest.raises(ValueError, match="base=None with method='ties'"):
        zoo.merge(None, [ONE], method="ties")
    with pytest.raises(ValueError, match="expected one for each of the 2 models"):
        zoo.merge(BASE, [ONE, TWO], method="ties", weights=[1.0])
    wider = zoo.MLP(8, zoo.MLPConfig(d_ff=4, bias=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tuned\[0\]\..* has shape .*, the first model's"):
        zoo.merge(BASE, [wider], method="ties")


def test_weights_that_are_no_parameters_are_said_and_not_passed_by():
    adapted = [zoo.add_lora(m, rank=2, targets=".*", rngs=nnx.Rngs(0)) for m in (ONE, TWO)]
    quantized = [zoo.quantize(m, targets=".*") for m in (ONE, TWO)]
    frozen = [freeze(m, lambda name: "bias" in name) for m in (ONE, TWO)]
    for models, words in ((adapted, "zoo.merge_lora"), (quantized, "zoo.dequantize"), (frozen, "is frozen")):
        with pytest.raises(ValueError, match=rf"\.kernel .*{words}"):
            zoo.merge(None, models, method="average")
        with pytest.raises(ValueError, match=words):
            zoo.sparse_delta(*models)


def test_parameters_that_are_read_otherwise_are_said():
    heads = [zoo.Attention(8, zoo.AttentionConfig(n_heads=n), rngs=nnx.Rngs(0)) for n in (2, 4)]
    with pytest.raises(ValueError, match=r"tuned\[1\]\.n_heads is 4, the first model's 2"):
        zoo.merge(None, heads, method="average")
    with pytest.raises(ValueError, match=r"weights=\[nan\], expected finite numbers"):
        zoo.merge(BASE, [ONE], method="task_arithmetic", weights=[float("nan")])


def test_heads_of_other_tasks_stay_out_whatever_their_shape():
    options = {"vocab_size": 8, "d_model": 8, "n_layers": 1, "pattern": "-/mlp"}
    one, two = (zoo.TokenClassifier(zoo.TokenClassifierConfig(n_labels=n, **options), rngs=nnx.Rngs(n)) for n in (2, 3))
    merged = zoo.merge(one, [one, two], method="average", exclude=r"classifier\..*")
    assert np.array_equal(merged.classifier.kernel[...], one.classifier.kernel[...])
    assert not np.array_equal(merged.encoder.word_embeddings.embedding[...], one.encoder.word_embeddings.embedding[...])
    with pytest.raises(ValueError, match=r"tuned\[1\]\.classifier\.\w+ has shape"):
        zoo.merge(one, [one, two], method="average")
