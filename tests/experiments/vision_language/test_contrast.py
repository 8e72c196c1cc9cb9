"""Contrastive training: losses pair by pair, mini-batches that change nothing, and what is found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from experiments import clip
from experiments.data.image_texts import ImageTextsConfig
from experiments.loop.train import TrainConfig
from experiments.vision_language.contrast import Towers, contrastive_loss, pairwise
from experiments.vision_language.pairs import PRESETS, Config, prepare, recalls
from tests.numerics import assert_close, normal

TINY = PRESETS["tiny"][1]
CONFIG = dataclasses.replace(
    TINY,
    images=dataclasses.replace(TINY.images, d_model=16, n_layers=1, image_size=16, attn=zoo.AttentionConfig(n_heads=2)),
    texts=dataclasses.replace(TINY.texts, d_model=16, n_layers=1, mamba2=ssm.Mamba2Config(head_dim=8, d_state=4)),
    d_embed=8,
    tokenizer="bytes",
    data=ImageTextsConfig(scenes=24, held_out_scenes=9, scene_size=16, scene_kinds=("caption",)),
    threads=1,
    train=TrainConfig(steps=2, batch_size=4, log_every=1, eval_every=2, save_every=2, tensorboard=False),
)


@pytest.fixture(scope="module")
def prepared():
    return prepare(CONFIG)


@pytest.fixture(scope="module")
def towers(prepared):
    rngs = nnx.Rngs(0)
    images, texts = zoo.ImageClassifier(prepared.images, rngs=rngs), zoo.SequenceClassifier(prepared.texts, rngs=rngs)
    return Towers(images, texts, "sigmoid")


def test_a_sigmoid_is_taken_of_each_pair():
    u, v = (normal(key, n, 6) for key, n in zip(jax.random.split(jax.random.key(0)), (3, 4), strict=True))
    own = jnp.asarray([[True, False, False, True], [False] * 4, [False, True, False, False]])
    loss = pairwise(u, v, own, scale=2.0, bias=-1.0)
    for i in range(3):
        for j in range(4):
            logit = 2 * float(u[i] @ v[j]) - 1
            assert float(loss[i, j]) == pytest.approx(np.log1p(np.exp(-logit if own[i, j] else logit)), rel=1e-4)


def batch_of(prepared, rows):
    return jax.tree.map(jnp.asarray, prepared.pairs[0](rows))


def test_softmax_finds_the_text_of_an_image_and_the_image_of_a_text(prepared, towers):
    batch = batch_of(prepared, [0, 1, 2, 3])
    batch["text_ids"] = jnp.arange(4)

    @jax.jit
    def run(batch):
        texts, _ = towers.of_texts(batch["tokens"], batch["mask"])
        return contrastive_loss(towers, batch, None, kind="softmax"), towers.of_images(batch["images"])[0], texts

    loss, images, texts = run(batch)
    scores = towers.scale * images @ texts.T
    both = [-jnp.diagonal(jax.nn.log_softmax(scores, axis=axis)) for axis in (0, 1)]
    assert_close(loss.total, jnp.sum(both[0] + both[1]) / 2)
    assert float(loss.weight) == 4
    np.testing.assert_allclose(jnp.linalg.norm(images, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("softmax", marks=pytest.mark.slow), "sigmoid"])
def test_an_equal_text_is_no_mistake_and_a_row_of_none_counts_for_nothing(prepared, towers, kind):
    """Two images of one text: leaving one out of the other's wrong ones changes the loss as if it were not there."""
    batch = batch_of(prepared, [0, 1, 2, 3])
    run = jax.jit(lambda ids: contrastive_loss(towers, batch | {"text_ids": ids}, None, kind=kind))
    every, three = run(jnp.arange(4)), run(jnp.asarray([0, 1, 2, -1]))
    assert float(three.weight) == 3
    part = {name: values[:3] for name, values in batch.items()} | {"text_ids": jnp.arange(3)}
    assert_close(three.total, jax.jit(lambda part: contrastive_loss(towers, part, None, kind=kind))(part).total)
    assert float(every.total) > float(three.total)
    equal = run(jnp.asarray([0, 1, 2, 0]))
    assert abs(float(equal.total - every.total)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_mini_batches_have_the_value_and_the_gradient_of_the_whole(prepared, towers, kind):
    batch = batch_of(prepared, [0, 1, 2, 3])
    graphdef, params = nnx.split(towers)

    def both(mini_batch):
        def loss(params):
            return contrastive_loss(nnx.merge(graphdef, params), batch, None, kind=kind, mini_batch=mini_batch).total

        return jax.jit(jax.value_and_grad(loss))(params)

    whole, parts = both(None), both(2)
    assert_close(parts, whole, gradient=True)


def test_recalls_count_the_best_columns():
    scores = np.array([[3.0, 2, 1], [1, 2, 3], [1, 3, 2]])
    assert recalls(scores, np.eye(3, dtype=bool), (1, 2)) == {"r1": 1 / 3, "r2": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mini_batch": 3}, "--mini-batch 3 must divide --train.batch-size 128"),
        ({"train": TrainConfig(batch_size=8, accumulate=2)}, "pairs compete for the whole batch"),
        ({"d_embed": 0}, "--d-embed 0, expected at least 1"),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.slow
def test_a_run_ends_in_two_encoders_that_classify(tmp_path):
    trained = clip.fit(CONFIG, tmp_path / "run")
    scores = trained.scores["held out"]
    assert {"loss", "image to text r1", "text to image r5", "zero-shot"} <= scores.keys()
    prepared = prepare(CONFIG)
    images = zoo.from_pretrained(tmp_path / "run/images", kind=zoo.ImageClassifier)
    picture = jnp.asarray(prepared.pairs[1]([0])["images"])
    expected, _ = trained.model.of_images(picture)
    vector = images(picture)
    assert_close(vector / jnp.linalg.norm(vector, axis=1, keepdims=True), expected)
    prepared.data.held_out.read(0).save(tmp_path / "picture.png")
    asked = clip.Classify(str(tmp_path / "run"), str(tmp_path / "picture.png"), ("a red circle.", "a blue 7."))
    ((_, text, cosine),) = clip.classify(asked)
    assert text in asked.texts
    assert -1 <= cosine <= 1
