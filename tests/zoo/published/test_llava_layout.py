"""LLaVA, and the image encoders of CLIP and SigLIP: transformers' numbers, their files in and out, what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from m2.mlp import ACTIVATIONS
from tests.numerics import jitted
from tests.places import PUBLISHED
from zoo.published import ssm_layout
from zoo.published.llava_layout import read_config, write_config
from zoo.published.weight_files import open_weights, save_weights

NAMES = ("llava_clip", "llava_siglip", "llava_mamba2", "llava_qwen3")


def arrays(folder):
    return {key: tensor.read() for key, tensor in open_weights(folder).items()}


def test_every_published_file_is_tested():
    assert sorted(NAMES) == sorted(folder.name for folder in PUBLISHED.iterdir() if folder.name.startswith("llava"))


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow), *NAMES[2:]])
def test_gives_transformers_numbers(name):
    """An image a row and padding, two images in a row, text alone; and what follows."""
    model = zoo.from_pretrained(PUBLISHED / name)
    expected = np.load(PUBLISHED / name / "expected.npz")
    images, mask = expected["images"].transpose(0, 2, 3, 1), expected["mask_one"].astype(bool)
    run, params = jitted(model)
    tokens, _ = model.encode(jnp.asarray(images[:1]))
    np.testing.assert_allclose(tokens[0, 0], expected["features"].reshape(16, 24), rtol=0, atol=1e-4)
    one = run(params, expected["ids_one"], mask, images=images[:2, None])
    np.testing.assert_allclose(one[mask], expected["logits_one"][mask], rtol=0, atol=1e-4)
    two = run(params, expected["ids_two"], images=images[None, 1:])
    np.testing.assert_allclose(two, expected["logits_two"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(run(params, expected["ids_text"]), expected["logits_text"], rtol=0, atol=1e-4)
    new = zoo.generate(model, expected["ids_two"], 8, images=images[None, 1:])
    np.testing.assert_array_equal(new[:, -8:], expected["greedy"])
    assert expected["logits_one"].std() > 1


@pytest.mark.parametrize("name", NAMES)
def test_goes_out_as_it_came_in(name, tmp_path):
    model = zoo.from_pretrained(PUBLISHED / name)
    zoo.save_pretrained(model, tmp_path, "transformers")
    theirs, ours = arrays(PUBLISHED / name), arrays(tmp_path)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    back = zoo.from_pretrained(tmp_path)
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.parametrize(
    "renaming",
    [
        {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head": "lm_head",
            "vision": "model.vision",
        },
        {"vision_tower.": "vision_tower.vision_model."},
    ],
    ids=["transformers 4.52", "the released files"],
)
def test_names_of_other_releases_are_read_too(renaming, tmp_path):
    renamed = {}
    for name, value in arrays(PUBLISHED / "llava_clip").items():
        for theirs, other in renaming.items():
            name = other + name.removeprefix(theirs) if name.startswith(theirs) else name
        renamed[name] = value
    shutil.copy(PUBLISHED / "llava_clip/config.json", tmp_path)
    save_weights(tmp_path, renamed, format="safetensors")
    model, other = zoo.from_pretrained(tmp_path), zoo.from_pretrained(PUBLISHED / "llava_clip")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": []}, r"vision_feature_layer=\[\], expected a layer, such as -2, or a list of some"),
        ({"vision_feature_layer": [-2, 0.5]}, r"vision_feature_layer=\[-2, 0.5\], expected a layer"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_layer=\(-2, -5\), expected some of 3 layers"),
        ({"vision_feature_layer": [-2, -3]}, r"linear_1.weight is \(24, 16\), expected \(24, 32\)"),
        (
            {"vision_feature_select_strategy": "all"},
            "select_strategy='all', expected 'default' or 'full'",
        ),
        ({"multimodal_projector_bias": False}, "2 in the file that the model does not have: multi_modal_projector"),
        (
            {"vision_config": {"model_type": "pixtral"}},
            "vision_config.model_type='pixtral', expected one of clip_vision",
        ),
        ({"text_config": None}, "text_config=None, expected the config of a part"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false', expected true or false"),
        (
            {"tie_word_embeddings": True},
            "lm_head.weight differs from language_model.embed_tokens.weight, which",
        ),
        ({"image_token_index": 40}, "image_token_id=40, expected a token of 40"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(change, message, tmp_path):
    folder = shutil.copytree(PUBLISHED / "llava_clip", tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


def test_what_the_layout_has_no_word_for_is_named(tmp_path):
    model = zoo.from_pretrained(PUBLISHED / "llava_clip")
    for changes, message in (
        ({"deepstack": 2, "text": dataclasses.replace(model.config.text, n_layers=4)}, "deepstack=2 cannot be written"),
        (
            {"connector": zoo.ConnectorConfig(kind="scan")},
            "connector.kind='scan' cannot be written in the layout of llava",
        ),
        ({"vision_layer": -1}, "vision_norm=True with vision_layer=-1 cannot be written"),
        ({"vision_layer": (0, 3)}, r"vision_norm=True with vision_layer=\(0, 3\) cannot be written"),
        ({"image_multiplier": 2.0}, "image_multiplier=2.0 cannot be written in the layout of llava, only 1.0"),
        (
            {"text": dataclasses.replace(model.config.text, embedding_multiplier=2.0, logits_multiplier=0.5)},
            "image_multiplier=1.0 cannot be written in the layout of llava, only 2.0; nor text.logits_multiplier=0.5",
        ),
        (
            {"text": dataclasses.replace(model.config.text, pattern="mamba", tie_embeddings=True)},
            "text.tie_embeddings=True around mamba cannot be written in the layout of llava, only False",
        ),
    ):
        other = nnx.eval_shape(
            lambda c=changes: zoo.VisionLanguageModel(dataclasses.replace(model.config, **c), rngs=0)
        )
        with pytest.raises(ValueError, match=message):
            zoo.save_pretrained(other, tmp_path, "transformers")


@pytest.mark.parametrize(
    ("name", "embedding", "image"), [("falcon_h1", 1.0, 1.0), ("granite", 2.5, 2.5), ("jamba", 1.0, 1.0)]
)
def test_what_multiplies_around_a_language_model_is_llava_s_not_its_own(name, embedding, image):
    """transformers leaves out what is not in the stack itself; Granite's multiplies whatever enters it, images too."""
    raw = json.loads((PUBLISHED / "llava_clip/config.json").read_text()) | {"image_token_index": 7}
    text = json.loads((PUBLISHED / name / "config.json").read_text()) | {"embedding_multiplier": 2.5}
    text |= {"lm_head_multiplier": 3.0} if name == "falcon_h1" else {"logits_scaling": 3.0}
    config = read_config(raw | {"text_config": text}, ssm_layout.read_config)
    assert (config.text.embedding_multiplier, config.image_multiplier) == (embedding, image)
    assert config.text.logits_multiplier == 1
    text = ssm_layout.write_config(config.text, "transformers")
    assert read_config(write_config(config, text), ssm_layout.read_config) == config


def test_a_class_token_is_read_where_the_strategy_is_full():
    """And of an encoder without one no patch is left out."""
    raw = json.loads((PUBLISHED / "llava_clip/config.json").read_text()) | {"vision_feature_select_strategy": "full"}
    config = read_config(raw, ssm_layout.read_config)
    assert (config.class_tokens, config.image_tokens) == (True, 17)
    text = ssm_layout.write_config(config.text, "transformers")
    assert write_config(config, text)["image_seq_length"] == 17
    assert read_config(write_config(config, text), ssm_layout.read_config) == config
    raw = json.loads((PUBLISHED / "llava_siglip/config.json").read_text())
    assert not read_config(raw, ssm_layout.read_config).class_tokens
    with pytest.raises(ValueError, match="vision_feature_select_strategy='default', expected 'full': what is left out"):
        read_config(raw | {"vision_feature_select_strategy": "default"}, ssm_layout.read_config)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_each_non_linearity_of_a_connector_goes_out_and_in(activation):
    config = zoo.from_pretrained(PUBLISHED / "llava_clip").config
    connector = dataclasses.replace(config.connector, activation=activation)
    config = dataclasses.replace(config, connector=connector)
    text = ssm_layout.write_config(config.text, "transformers")
    assert read_config(write_config(config, text), ssm_layout.read_config) == config


def test_a_head_is_tied_where_either_config_says_so():
    raw = json.loads((PUBLISHED / "llava_clip/config.json").read_text())
    for outer, inner in ((True, False), (False, True), (False, False)):
        said = raw | {"tie_word_embeddings": outer, "text_config": raw["text_config"] | {"tie_word_embeddings": inner}}
        assert read_config(said, ssm_layout.read_config).text.tie_embeddings == (outer or inner)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_alone_goes_in_and_out(name, tmp_path):
    """Under the names that CLIPVisionModel and SiglipVisionModel give, with and without their prefix."""
    vision = zoo.from_pretrained(PUBLISHED / name).vision
    zoo.save_pretrained(vision, tmp_path, "transformers")
    assert ("pre_layrnorm.weight" in arrays(tmp_path)) == (name in ("llava_clip", "llava_qwen3"))
    back = zoo.from_pretrained(tmp_path, kind=zoo.ImageClassifier)
    assert back.config == vision.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(vision))
    prefixed = {f"vision_model.{key}": value for key, value in arrays(tmp_path).items()}
    save_weights(tmp_path, prefixed, format="safetensors")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(zoo.from_pretrained(tmp_path)), nnx.state(vision))


def test_a_part_s_dtype_is_that_of_the_file(tmp_path):
    low = zoo.from_pretrained(PUBLISHED / "llava_clip", dtype="bfloat16")
    assert low.language.embedding.embedding.dtype == jnp.bfloat16
    assert low.vision.backbone.layers[0].mixer.q_proj.kernel.dtype == jnp.bfloat16
    assert low.vision.embedding_norm.scale.dtype == jnp.float32
