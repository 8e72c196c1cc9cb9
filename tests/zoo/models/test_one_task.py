"""One task out of a model of several: it computes what the whole does in that task."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, with_random_parameters

CONFIG = zoo.MaskedLMConfig(
    vocab_size=16,
    d_model=8,
    n_layers=2,
    pattern="attn/moe",
    max_len=None,
    attn=zoo.AttentionConfig(n_heads=2),
    moe=zoo.MoEConfig(n_experts=4, top_k=1, d_ff=4, n_tasks=3),
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 5)))


@pytest.mark.slow
def test_a_task_taken_out_answers_as_the_whole_does_in_it():
    model = with_random_parameters(lambda: zoo.MaskedLM(CONFIG, rngs=nnx.Rngs(0)))
    answers = []
    for task in (0, 2):
        one = zoo.of_task(model, task)
        assert one.config == dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, n_tasks=1))
        assert one.encoder.backbone.layers[0].mlp.router.kernel.shape == (8, 4)
        answers.append(one(IDS))
        assert_close(answers[-1], model(IDS, task=jnp.full(2, task)))
    assert not np.allclose(*answers)
    assert model.encoder.backbone.layers[0].mlp.router.kernel.shape == (8, 12)


def test_a_task_that_there_is_not_is_refused():
    model = zoo.MaskedLM(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="task=3, expected 0 to 2"):
        zoo.of_task(model, 3)
    with pytest.raises(ValueError, match="one router for all tasks"):
        zoo.of_task(zoo.of_task(model, 1), 0)
    inside = dataclasses.replace(CONFIG, pattern="attn/moe[n_tasks=2]")
    with pytest.raises(ValueError, match="says n_tasks, expected the config's moe"):
        zoo.of_task(zoo.MaskedLM(inside, rngs=nnx.Rngs(0)), 0)
