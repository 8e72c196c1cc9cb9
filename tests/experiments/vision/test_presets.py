"""Presets of image classifiers: of equal size, as large as their images, and the same when read from a file."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zoo
from experiments.data.augment import AugmentConfig
from experiments.loop import flags
from experiments.loop.model_size import count_params
from experiments.vision.presets import PRESETS, Config


@pytest.mark.parametrize("pattern", ["attn/mlp", "m2/monarch", "vim", "ss2d/mlp[d_ff=64]"])
def test_the_mixers_of_the_mnist_preset_are_of_equal_size(pattern):
    model = dataclasses.replace(PRESETS["mnist"][1].model, pattern=pattern, n_classes=10)
    assert count_params(model) == pytest.approx(128_400, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_images(name):
    config = PRESETS[name][1]
    model = dataclasses.replace(config.model, n_classes=10, n_layers=1)
    size = (config.image_size or model.image_size,) * 2
    images = jax.ShapeDtypeStruct((1, *size, model.channels), jnp.float32)
    logits = nnx.eval_shape(lambda images: zoo.ImageClassifier(model, rngs=nnx.Rngs(0))(images), images)
    assert logits.shape == (1, 10)
    assert len(config.preprocess.mean) in (1, model.channels)


def test_deit_changes_images_as_its_recipe_says():
    """RandAugment rand-m9-mstd0.5-inc1, erasing 0.25, MixUp 0.8, CutMix 1.0, smoothing 0.1, each image three times."""
    recipe = AugmentConfig(
        **{"crop": "resized", "flip": 0.5, "rand_augment": 2, "magnitude": 9, "magnitude_std": 0.5, "erase": 0.25},
        **{"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "repeats": 3},
    )
    for name, (_, config) in PRESETS.items():
        if name.startswith(("deit", "m2-vit", "vim")):
            assert config.augment == recipe, name
        else:
            assert (config.augment.rand_augment, config.augment.repeats) == (0, 1), name


def test_flags_come_back_from_their_file(tmp_path):
    config = PRESETS["deit-tiny"][1]
    flags.save_config(config, tmp_path / "config.json")
    assert flags.load_config(Config, tmp_path / "config.json") == config
