"""A router for each task: a row goes as it would in a mixture of that task's router alone (M3ViT)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, normal, with_random_parameters

CONFIG = zoo.MoEConfig(n_experts=4, top_k=2, d_ff=4, n_tasks=3)


def of_one_task(mixture, task):
    """The mixture with one task's router."""
    config = dataclasses.replace(mixture.config, n_tasks=1)
    alone = zoo.MoE(8, config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    alone.experts = mixture.experts
    alone.router.kernel[...] = mixture.router.kernel[...][:, 4 * task : 4 * (task + 1)]
    return alone


def make():
    return with_random_parameters(lambda: zoo.MoE(8, CONFIG, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


@pytest.mark.slow
def test_each_row_goes_by_the_router_of_its_task(x64):
    mixture, x = make(), normal(jax.random.key(0), 3, 5, 8)
    y, loss = mixture.run(x, task=jnp.array([2, 0, 2]))
    for row, task in enumerate([2, 0, 2]):
        assert_close(y[row : row + 1], of_one_task(mixture, task)(x[row : row + 1]))
    assert loss > 0
    assert_close(mixture.run(x, task=jnp.array([1, 1, 1])), of_one_task(mixture, 1).run(x))


def test_equal_routers_are_one(x64):
    mixture, x = make(), normal(jax.random.key(0), 3, 5, 8)
    one = of_one_task(mixture, 0)
    mixture.router.kernel[...] = jnp.tile(one.router.kernel[...], (1, 3))
    assert_close(mixture.run(x, task=jnp.array([0, 1, 2])), one.run(x))


@pytest.mark.slow
def test_an_encoder_hands_the_task_on(tmp_path):
    shape = {"d_model": 8, "n_layers": 2, "pattern": "attn/moe", "attn": zoo.AttentionConfig(n_heads=2), "moe": CONFIG}
    ids, first, second = jnp.array([[1, 2, 3]] * 2), jnp.array([0, 1]), jnp.array([1, 1])
    model = zoo.SequenceClassifier(zoo.SequenceClassifierConfig(vocab_size=8, max_len=4, **shape), rngs=0)
    y = model(ids, task=first)
    assert_close(model(ids, task=second)[1], y[1])
    assert jnp.any(model(ids, task=second)[0] != y[0])
    assert_close(model.hidden_states(ids, task=first)[-1], model.hidden(ids, task=first))
    zoo.save_pretrained(model, tmp_path)
    assert_close(zoo.from_pretrained(tmp_path, kind=zoo.SequenceClassifier)(ids, task=first), y)
    images = zoo.ImageClassifierConfig(image_size=4, patch_size=2, channels=1, n_classes=2, **shape)
    vision, pixels = zoo.ImageClassifier(images, rngs=0), jnp.ones((2, 4, 4, 1))
    assert jnp.any(vision(pixels, task=first)[0] != vision(pixels, task=second)[0])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, r"task is not given with n_tasks=3, expected that of each row, 0 to 2"),
        (jnp.array([0, 3]), r"task=\[0 3\], expected 0 to 2"),
        (jnp.array([0]), r"task has shape \(1,\), expected a number for each row, \(2,\)"),
    ],
)
def test_a_task_that_there_is_not(unchecked, task, message):
    with pytest.raises(ValueError, match=message):
        zoo.MoE(8, CONFIG, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8)), task=task)


def test_who_has_no_tasks(unchecked):
    with pytest.raises(ValueError, match="task is given with n_tasks=1, expected none"):
        zoo.MoE(8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8)), task=jnp.array([0, 0]))
    with pytest.raises(ValueError, match="n_tasks=0, expected at least 1"):
        zoo.MoEConfig(n_tasks=0)
    with pytest.raises(ValueError, match="moe has a router for each task, but a causal language model"):
        zoo.CausalLMConfig(pattern="attn/moe", moe=CONFIG)
