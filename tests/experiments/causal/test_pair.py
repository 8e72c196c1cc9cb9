"""The distances of a student from its teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.causal import pair as pairs
from experiments.loop.train import sum_over
from tests.numerics import with_random_parameters

TEACHER = zoo.CausalLMConfig(
    d_model=16, n_layers=2, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=16)
)


def make_pair(**options):
    teacher = with_random_parameters(
        lambda: zoo.CausalLM(dataclasses.replace(TEACHER, vocab_size=24, **options), rngs=nnx.Rngs(0))
    )
    return pairs.Pair(teacher, zoo.seed_from_attention(teacher, [1], rngs=nnx.Rngs(1)))


def make_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 24, (2, 9))
    weights = np.array([[1.0] * 8, [1.0] * 5 + [0.0] * 3], np.float32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights, "segment_ids": np.zeros((2, 8), int)}
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.slow
def test_distances_are_those_of_plain_numpy():
    pair, batch = make_pair(), make_batch()
    pair = pairs.make_pair(pair.teacher, pair.student, [batch])
    sums = sum_over(pair, pairs.measure, [batch])
    assert sums["weight"] == 13

    @jax.jit
    def run(batch):
        x = pair.teacher.embedding(batch["tokens"])
        (each,) = zoo.compare_layers(pair.teacher.backbone, pair.student.backbone, x)
        return pair.teacher(batch["tokens"]), pair.student(batch["tokens"]), each

    *logits, each = jax.tree.map(lambda x: np.asarray(x, np.float64), run(batch))
    log_p, log_q = (x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in logits)
    weights = np.asarray(batch["weights"])
    nats = -np.take_along_axis(log_q, np.asarray(batch["targets"])[..., None], 2)[..., 0]

    def relative(error, of):
        return 13 * np.sum(error**2 * weights[..., None]) / np.sum(of**2 * weights[..., None])

    expected = {
        "nats": np.sum(nats * weights),
        "kl": np.sum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1) * weights),
        "layer_error": relative(each.student.mixed - each.teacher.mixed, each.teacher.mixed),
        "hidden_error": relative(each.student.out - each.teacher.out, each.teacher.out - each.x),
    }
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-4), name

    silent = pair.student.backbone.layers[1].mixer.o_proj.kernel
    silent[...] = jnp.zeros_like(silent[...])
    assert sum_over(pair, pairs.measure, [batch])["layer_error"] == pytest.approx(13, rel=1e-4)
