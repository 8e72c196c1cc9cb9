"""Our own layout: every model goes out and comes back, bit for bit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.zoo.stack.test_mixers import Average, AverageConfig
from zoo.models.build import build
from zoo.published.native_layout import read_config, write_config
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS
from zoo.stack.option_values import from_dict

SMALL = {
    "d_model": 16,
    "n_layers": 2,
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=8),
    "mamba3": ssm.Mamba3Config(d_state=4, head_dim=8),
    "m2": {"l_max": 8, "filter": {"order": 4}},
    "attn": zoo.AttentionConfig(n_heads=2),
    "linear_attn": ssm.LinearAttentionConfig(n_heads=2),
    "zamba2": {"n_heads": 2, "adapter_rank": 2},
    "monarch": {"n_blocks": 2},
    "moe": {"n_experts": 2},
}


def described(kind, fields, **more):
    return from_dict(kind, fields | more)


TEXT = {**SMALL, "vocab_size": 20}
IMAGES = {**SMALL, "image_size": 8, "patch_size": 4, "n_classes": 3}
CONFIGS = {
    "m2/monarch": described(zoo.CausalLMConfig, TEXT, pattern="m2/monarch"),
    "mamba2 attn/mlp": described(zoo.CausalLMConfig, TEXT, pattern="mamba2 attn/mlp", param_dtype="bfloat16"),
    "shared": described(zoo.CausalLMConfig, TEXT | {"n_layers": 4}, pattern="mamba attn/mlp@a mamba3 attn/mlp@a"),
    "zamba2": described(zoo.CausalLMConfig, TEXT, pattern="zamba2"),
    "linear_attn": described(zoo.CausalLMConfig, TEXT, pattern="linear_attn/moe", tie_embeddings=False),
    "fresh encoder": described(zoo.MaskedLMConfig, TEXT, pattern="mamba/mlp"),
    "tuned encoder": described(zoo.SequenceClassifierConfig, TEXT, pattern="attn/mlp", pool="mean", n_labels=3),
    "tagger": described(zoo.TokenClassifierConfig, TEXT, pattern="m2/monarch", n_labels=5),
    "vit": described(zoo.ImageClassifierConfig, IMAGES, pattern="attn/mlp", class_token="none", pool="mean"),
    "ss2d": described(zoo.ImageClassifierConfig, IMAGES, pattern="ss2d", class_token="none", pool="mean"),
}


def parameters(model):
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_equal(model, other):
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert np.array_equal(array, theirs[name]), name


@pytest.fixture
def average(monkeypatch):
    monkeypatch.setitem(MIXERS, "average", None)
    monkeypatch.delitem(MIXERS, "average")
    zoo.register_mixer("average", Average, AverageConfig())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_is_saved_and_loaded(name, tmp_path):
    model = build(CONFIGS[name], rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path)
    back = zoo.from_pretrained(tmp_path)
    assert (type(back), back.config) == (type(model), model.config)
    assert_equal(model, back)


def test_every_preset_can_be_described():
    for name, config in zoo.presets.items():
        assert read_config(json.loads(json.dumps(write_config(config)))) == config, name


def test_every_mixer_can_be_saved():
    words = " ".join(f"{config.pattern}" for config in CONFIGS.values())
    assert [name for name in (*MIXERS, *CHANNEL_MIXERS) if name not in words] == ["vim"]  # its parameters are mamba's


def test_large_models_are_written_in_shards_and_read_in_another_dtype(tmp_path):
    model = build(CONFIGS["linear_attn"], rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path, max_shard_bytes=4000, extra={"eos_token_id": 3})
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    assert_equal(model, zoo.from_pretrained(tmp_path))
    half = zoo.from_pretrained(tmp_path, dtype="bfloat16", kind=zoo.CausalLM)
    assert half.embedding.embedding.dtype == jnp.bfloat16
    assert half.config == dataclasses.replace(model.config, dtype="bfloat16", param_dtype="bfloat16")


@pytest.mark.usefixtures("average")
def test_a_registered_mixer_is_saved_with_its_options(tmp_path):
    config = described(zoo.CausalLMConfig, TEXT, pattern="average average[rate=0.25]/mlp")
    model = build(config, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path)
    assert_equal(model, zoo.from_pretrained(tmp_path))
    zoo.register_mixer("average", Average, AverageConfig(rate=0.75))
    with pytest.raises(
        ValueError, match=r"config.json: mixer 'average' is registered with .*0.75.*, the model has .*0.5"
    ):
        zoo.from_pretrained(tmp_path)
    del MIXERS["average"]
    with pytest.raises(ValueError, match=r"mixer 'average' is not known here: call zoo.register_mixer"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version=3, expected 1 to 2: update the library"),
        ({"format_version": None}, "format_version=None, expected 1"),
        ({"kind": "CausalLm"}, "unknown kind 'CausalLm', did you mean 'CausalLM'"),
        ({"config": {"d_modle": 3}}, "unknown field 'd_modle', did you mean 'd_model'"),
        ({"config": {"mamba": {"d_stat": 3}}}, "unknown field 'd_stat', did you mean 'd_state'"),
        ({"config": {"d_model": "16"}}, "d_model='16', expected an integer"),
        ({"config": {"vocab_size": 20, "d_model": 16}}, "the tensors do not fit the config"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, change, message):
    zoo.save_pretrained(build(CONFIGS["linear_attn"], rngs=nnx.Rngs(0)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        zoo.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_fields_beside_the_model_do_not_change_it(tmp_path):
    model = build(CONFIGS["tagger"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected fields other than 'config', which describes the model"):
        zoo.save_pretrained(model, tmp_path, extra={"config": {}})


def test_a_published_layout_says_what_it_lacks_and_which_has_it(tmp_path):
    model = build(CONFIGS["vit"], rngs=nnx.Rngs(0))
    message = (
        "attn.position='rope' cannot be written in the layout of vit, only 'none'; nor attn.bias=False, only True; "
        "nor class_token='none', only 'first'; nor pool='mean', only 'token'; layout='native' holds every model"
    )
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path, layout="transformers")
