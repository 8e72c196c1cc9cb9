"""Image classification as the loop sees it: the loss by hand, batches by seed and step, scores, running averages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from experiments.data.augment import AugmentConfig
from experiments.loop import train
from experiments.loop.train import split_model
from experiments.vision.presets import PRESETS
from experiments.vision.task import image_loss, make_task, prepare, score, training_batch
from tests.numerics import assert_close


def test_loss_is_that_of_both_images_by_their_shares(monkeypatch):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    config = zoo.ImageClassifierConfig(d_model=8, n_layers=1, pattern="-/mlp", image_size=4, patch_size=4, n_classes=5)
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(zoo.ImageClassifier, "read", lambda self, hidden: logits)
    labels, partners, share = np.array([0, 1, 2]), np.array([4, 4, 2]), np.array([1.0, 0.3, 0.6], np.float32)
    batch = {"images": jnp.zeros((3, 4, 4, 3)), "labels": labels, "partners": partners, "share": share}
    loss = image_loss(model, batch, None, smoothing=0.1)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)

    def nats(i, label):
        return -(0.9 * log_p[i, label] + 0.1 * log_p[i].mean())

    expected = sum(share[i] * nats(i, labels[i]) + (1 - share[i]) * nats(i, partners[i]) for i in range(3))
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert float(loss.weight) == 3
    weights = np.array([2.0, 1.0, 0.5, 1.0, 3.0], np.float32)
    loss = image_loss(model, batch, None, smoothing=0.1, class_weights=weights)
    counts = [(share[i] * weights[labels[i]], (1 - share[i]) * weights[partners[i]]) for i in range(3)]
    weighed = sum(a * nats(i, labels[i]) + b * nats(i, partners[i]) for i, (a, b) in enumerate(counts))
    assert float(loss.total) == pytest.approx(weighed, rel=1e-5)
    assert float(loss.weight) == pytest.approx(np.sum(counts), rel=1e-6)


@pytest.mark.slow
def test_a_mixture_of_experts_is_trained_with_its_balance():
    images, labels = np.random.default_rng(0).random((3, 8, 8, 1), np.float32), np.array([0, 1, 2])
    batch = {"images": jnp.asarray(images), "labels": labels, "partners": labels, "share": np.ones(3, np.float32)}
    losses = []
    for pattern in ("attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]", "attn/mlp"):
        config = zoo.ImageClassifierConfig(
            **{"d_model": 16, "n_layers": 1, "pattern": pattern, "image_size": 8, "patch_size": 4, "channels": 1},
            n_classes=3,
            attn=zoo.AttentionConfig(n_heads=2),
        )
        model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
        losses.append(image_loss(model, batch, None, smoothing=0.0))
        if "moe" in pattern:
            assert losses[0].auxiliary == model.run(batch["images"])[1] > 0.4
    assert losses[1].auxiliary is None


def test_scores_count_ranks():
    logits = np.array([[6, 5, 4, 3, 2, 1, 0.0]] * 3, np.float32)
    scores = score(logits, np.array([0, 4, 5]))
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["top5"] == pytest.approx(2 / 3)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, np.array([0, 4, 5])).mean()
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert "top5" not in score(logits[:, :5], np.array([0, 1, 2]))


def test_a_batch_depends_on_seed_and_step_alone(squares):
    config = dataclasses.replace(PRESETS["tiny"][1], augment=AugmentConfig(crop="shift", rotate=5, mixup=0.8))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(squares)))
    prepared = prepare(config)
    images, rows = prepared.data.splits["train"], np.array([3, 1, -1, 2])
    one, again, other = (
        training_batch(images, rows, prepared.preprocess, seed, step) for seed, step in ((0, 1), (0, 1), (0, 2))
    )
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["images"], other["images"])
    assert set(one["labels"][2:3]) <= set(images.labels[[3, 1, 2]])


@pytest.mark.parametrize(
    ("augment", "total", "moment"),
    [
        (PRESETS["tiny"][1].augment, -85.5058805346489, -10246.344847559929),
        (AugmentConfig(), -84.88627260923386, -10269.40367257595),
    ],
)
def test_batches_are_those_of_earlier_versions(augment, total, moment):
    """Numbers by the commit before RandAugment was this project's own: what does not use it draws as it did."""
    prepared = prepare(dataclasses.replace(PRESETS["tiny"][1], augment=augment))
    batch = training_batch(prepared.data.splits["train"], np.array([5, 1, -1, 7]), prepared.preprocess, 0, 3)
    images = batch["images"].astype(np.float64)
    assert batch["labels"].tolist() == [5, 1, 8, 8]
    assert images.sum() == pytest.approx(total, rel=1e-9)
    assert (images * np.arange(images.size).reshape(images.shape)).sum() == pytest.approx(moment, rel=1e-9)


def test_repeated_images_are_changed_each_in_its_own_way(squares):
    config = dataclasses.replace(PRESETS["tiny"][1], augment=AugmentConfig(crop="shift", repeats=3))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(squares)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=6))
    prepared = prepare(config)
    task = make_task(config, prepared)
    batch = next(task.batches)
    assert batch["labels"].tolist() == np.repeat(batch["labels"][::3], 3).tolist()
    assert not np.array_equal(batch["images"][0], batch["images"][1])
    assert prepared.train.steps == 30 * 6  # an epoch of 32 images is six batches, repeated or not


def test_the_average_is_what_is_evaluated():
    """The running mean of the parameters, by hand, is what the run's checkpoint gives."""
    config = zoo.ImageClassifierConfig(
        d_model=8, n_layers=1, n_classes=2, image_size=4, patch_size=2, channels=1, attn=zoo.AttentionConfig(n_heads=1)
    )
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    seen = []
    _, params, _ = split_model(model)
    optimizer = optax.sgd(0.1)
    loss = functools.partial(image_loss, smoothing=0.0)
    step = train.make_train_step(model, loss, optimizer, ema=0.3)
    images = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1])
    batch = {"images": images, "labels": labels, "partners": labels, "share": np.ones(2, np.float32)}
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)  # noqa: E731
    state = train.TrainState(
        jnp.int32(0), copy(params), optimizer.init(params), jax.random.key(0), average=copy(params)
    )
    expected = jax.tree.map(np.asarray, params)
    for i in range(5):
        state, _ = step(state, batch)
        seen.append(jax.tree.map(np.asarray, state.params))
        decay = min(0.3, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda a, p, decay=decay: decay * a + (1 - decay) * p, expected, seen[-1])
    assert_close(jax.tree.leaves(state.average), jax.tree.leaves(expected))
