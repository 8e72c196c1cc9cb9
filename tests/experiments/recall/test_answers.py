"""Answers: long rows in chunks, the loss by hand, and what counts as right."""

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.recall import answers
from experiments.recall.tasks import MQAR, Parity
from tests.experiments.recall.test_tasks import SMALL
from tests.numerics import assert_close, with_random_parameters


def small_model(data, pattern):
    config = zoo.CausalLMConfig(
        d_model=8, n_layers=1, pattern=pattern, vocab_size=data.vocab_size, attn=zoo.AttentionConfig(n_heads=2)
    )
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def logits(model, batch):
    return np.asarray(jax.jit(model)(batch["tokens"]))


@pytest.mark.parametrize("pattern", ["mamba", "attn"])
def test_long_rows_in_chunks_equal_the_whole(pattern):
    data = SMALL[MQAR]
    model = small_model(data, pattern)
    batch = data.sample(np.random.default_rng(0), 3, 1)
    whole = np.take_along_axis(logits(model, batch), batch["positions"][..., None], axis=1)
    assert_close(answers.answer_logits(model, batch, chunk_size=8), whole)  # the last chunk is filled up


def test_the_loss_is_the_cross_entropy_of_the_answers():
    data = SMALL[Parity]
    model = small_model(data, "-/mlp")
    batch = data.sample(np.random.default_rng(0), 3, 1)
    nats = -np.asarray(jax.nn.log_softmax(logits(model, batch)))
    asked = [
        nats[row, batch["positions"][row, i], batch["targets"][row, i]]
        for row, i in zip(*np.nonzero(batch["weights"]), strict=True)
    ]
    loss = jax.jit(lambda batch: answers.answer_loss(model, batch, None))(batch)
    assert float(loss.weight) == len(asked) < batch["weights"].size
    assert float(loss.total) == pytest.approx(sum(asked), rel=1e-5)
    measured = answers.score(model, [batch], chunk_size=7)
    assert measured.loss == pytest.approx(np.mean(asked), rel=1e-5)


def test_accuracy_counts_answers_and_whole_rows(monkeypatch):
    targets = np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]])
    guesses = np.array([[1, 2, 3], [1, 0, 3], [3, 2, 0]])
    batch = {"targets": targets, "weights": np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]])}
    monkeypatch.setattr(answers, "answer_logits", lambda *_, chunk_size: np.eye(4)[guesses])
    measured = answers.score(None, [batch, batch])
    assert measured.accuracy == pytest.approx(7 / 8)
    assert measured.sequence_accuracy == pytest.approx(2 / 3)
    assert measured.sequences == 6
