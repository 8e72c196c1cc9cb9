"""ViT and DeiT: transformers' numbers, their files in and out, what their layout has no word for."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import jitted
from tests.places import PUBLISHED
from zoo.published.weight_files import open_weights

NAMES = ("vit_classifier", "vit_model", "deit_classifier", "deit_teacher", "deit_model")
TINY = {"d_model": 16, "n_layers": 2, "image_size": 12, "patch_size": 4, "n_classes": 3}


def arrays(folder):
    return {key: tensor.read() for key, tensor in open_weights(folder).items()}


def test_every_published_file_is_tested():
    assert sorted(NAMES) == sorted(
        folder.name for folder in PUBLISHED.iterdir() if folder.name.startswith(("vit_", "deit_"))
    )


@pytest.mark.parametrize("name", NAMES)
def test_gives_transformers_numbers(name):
    """At the size that positions are for, and at two others, to which they are interpolated."""
    model = zoo.from_pretrained(PUBLISHED / name)
    expected = np.load(PUBLISHED / name / "expected.npz")
    hidden_of, params = jitted(model, "hidden")
    read, _ = jitted(model, "read")
    for size in ("12x12", "20x16", "8x8"):
        images = expected[f"images_{size}"].transpose(0, 2, 3, 1)
        hidden = hidden_of(params, images)
        np.testing.assert_allclose(hidden, expected[f"hidden_{size}"], rtol=0, atol=1e-4)
        if f"logits_{size}" in expected:
            np.testing.assert_allclose(read(params, hidden), expected[f"logits_{size}"], rtol=0, atol=1e-4)
    assert expected["hidden_8x8"].std() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_goes_out_as_it_came_in(name, tmp_path):
    model = zoo.from_pretrained(PUBLISHED / name)
    zoo.save_pretrained(model, tmp_path / "out", "transformers")
    theirs = {key: value for key, value in arrays(PUBLISHED / name).items() if "pooler" not in key}
    ours = arrays(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    said, wrote = (json.loads((folder / "config.json").read_text()) for folder in (PUBLISHED / name, tmp_path / "out"))
    assert {key: wrote[key] for key in ("architectures", "model_type")} == {
        key: said[key] for key in ("architectures", "model_type")
    }
    back = zoo.from_pretrained(tmp_path / "out")
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "selu"}, "config.json: hidden_act='selu', expected one of gelu, "),
        ({"qkv_bias": False}, "qkv_bias=False is not supported"),
        ({"image_size": [12, 8]}, r"image_size=\[12, 8\] is not supported, only squares"),
        ({"num_hidden_layers": 3}, "16 missing in the file: backbone|16 missing in the file: encoder.layer.2"),
        ({"image_size": 16}, "1 of another shape: embeddings.position_embeddings"),
        ({"model_type": "deit"}, "1 missing in the file: embeddings.distillation_token"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(change, message, tmp_path):
    folder = shutil.copytree(PUBLISHED / "vit_classifier", tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "mamba"}, "pattern='mamba' has no transformers layout for images"),
        ({"stem": "conv"}, "stem='conv' cannot be written in the layout of vit, only 'patch'"),
        ({"layer_scale": 0.1}, "layer_scale=0.1 cannot be written"),
        ({"pool": "mean"}, "pool='mean' cannot be written"),
        ({"patch_stride": 2}, "patch_stride=2 cannot be written in the layout of vit, only patch_size=4"),
        ({"mlp": zoo.MLPConfig(bias=True, activation="gelu")}, "mlp.gated=True cannot be written"),
        ({"attn": zoo.AttentionConfig(bias=True)}, "attn.position='rope' cannot be written"),
    ],
)
def test_what_the_layout_has_no_word_for_is_an_error(fields, message, tmp_path):
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(**TINY | fields), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path, "transformers")


def test_the_official_layout_has_no_attention_over_images(tmp_path):
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(**TINY), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="pattern='attn/mlp' has no official layout for images, only vim has one"):
        zoo.save_pretrained(model, tmp_path, "official")


def test_what_is_dropped_in_training_needs_no_word(tmp_path):
    config = zoo.ImageClassifierConfig(**TINY, drop_path=0.2, remat=True)
    zoo.save_pretrained(zoo.ImageClassifier(config, rngs=nnx.Rngs(0)), tmp_path, "transformers")
    back = zoo.from_pretrained(tmp_path).config
    assert dataclasses.replace(back, drop_path=0.2, remat=True, attn=config.attn, mlp=config.mlp) == config
