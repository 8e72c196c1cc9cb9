"""A trained encoder goes on under another head, or over longer inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from tests.numerics import assert_close, jitted, with_random_parameters
from zoo.models.build import build

TINY = {
    "d_model": 8,
    "n_layers": 2,
    "vocab_size": 24,
    "max_len": 12,
    "pattern": "attn/mlp",
    "attn": zoo.AttentionConfig(n_heads=2, position="none"),
    "mlp": zoo.MLPConfig(d_ff=12),
    "m2": M2Config(l_max=12, residual_long_conv=True, filter=HyenaFilterConfig(order=6)),
    "monarch": MonarchMLPConfig(d_ff=12, n_blocks=2),
}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 12)))
KINDS = {
    zoo.MaskedLMConfig: zoo.MaskedLM,
    zoo.SequenceClassifierConfig: zoo.SequenceClassifier,
    zoo.TokenClassifierConfig: zoo.TokenClassifier,
}


def make(kind=zoo.MaskedLMConfig, **options):
    config = kind(**TINY | options)
    return with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))


def parameters(module):
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def assert_shared(new, old):
    ours, theirs = parameters(new), parameters(old)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value is theirs[name], name


def test_a_masked_language_models_head_is_kept_under_other_options():
    model = make()
    other = zoo.with_head(model, zoo.MaskedLMConfig, rngs=nnx.Rngs(3), dropout=0.1)
    assert other.config.dropout == 0.1
    assert_shared(other, model)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_the_encoder_is_shared_and_computes_what_it_did(source, target):
    model = make(source, dropout=0.1)
    other = zoo.with_head(model, target, rngs=nnx.Rngs(3))
    assert type(other) is KINDS[target]
    assert type(other.config) is target
    assert_shared(other.encoder, model.encoder)
    encoder = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(zoo.EncoderConfig)}
    assert {name: getattr(other.config, name) for name in encoder} == encoder
    np.testing.assert_array_equal(other.hidden(IDS), model.hidden(IDS))


def test_an_image_classifier_keeps_its_classifier_for_as_many_classes():
    shape = {"d_model": 8, "n_layers": 1, "n_classes": 3, "image_size": 8, "patch_size": 4}
    shape["attn"] = zoo.AttentionConfig(n_heads=1, position="none")
    model = with_random_parameters(lambda: build(zoo.ImageClassifierConfig(**shape), rngs=nnx.Rngs(0)))
    assert_shared(zoo.with_head(model, zoo.ImageClassifierConfig, drop_path=0.5, rngs=nnx.Rngs(1)), model)
    other = zoo.with_head(model, zoo.ImageClassifierConfig, n_classes=5, rngs=nnx.Rngs(1))
    assert other.classifier.kernel.shape == (8, 5)
    ours, theirs = parameters(other), parameters(model)
    assert {name for name in ours if ours[name] is not theirs[name]} == {"classifier.kernel", "classifier.bias"}
    assert zoo.with_head(model, zoo.ImageClassifierConfig, n_classes=0, rngs=nnx.Rngs(1)).classifier is None
    with pytest.raises(ValueError, match=r"position_embeddings is \(10, 8\), expected \(5, 8\)"):
        zoo.with_head(model, zoo.ImageClassifierConfig, image_size=12, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="config of a model with an encoder"):
        zoo.with_head(model, zoo.MaskedLMConfig, rngs=nnx.Rngs(1))


def test_the_head_is_fresh_and_of_the_keys_that_are_given():
    model = make(zoo.TokenClassifierConfig)
    heads = [zoo.with_head(model, zoo.TokenClassifierConfig, rngs=nnx.Rngs(seed)).classifier for seed in (1, 1, 2)]
    kernels = [head.kernel[...] for head in heads]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3
    assert np.abs(kernels[0] - model.classifier.kernel[...]).max() > 1e-3


def test_fields_are_those_of_the_new_head_and_of_the_encoder():
    fields = {"n_labels": 5, "pool": "attention", "pooler": False, "classifier_dropout": 0.2}
    encoder = {"dropout": 0.3, "embedding_dropout": 0.4, "mask_padding": False, "remat": True, "dtype": "bfloat16"}
    other = zoo.with_head(make(), zoo.SequenceClassifierConfig, rngs=nnx.Rngs(0), **fields, **encoder)
    assert other.config == zoo.SequenceClassifierConfig(**TINY | fields | encoder)
    assert other.pooler is None
    assert other(IDS).shape == (2, 5)


def test_a_whole_config_may_be_given():
    config = zoo.SequenceClassifierConfig(**TINY | {"n_labels": 3, "pool": "mean"})
    model = make()
    other = zoo.with_head(model, config, rngs=nnx.Rngs(0), pool="last")
    assert other.config == dataclasses.replace(config, pool="last")
    assert_shared(other.encoder, model.encoder)


def test_fields_of_the_same_kind_of_head_are_kept():
    model = make(zoo.SequenceClassifierConfig, n_labels=3, pool="mean", pooler=False)
    other = zoo.with_head(model, zoo.SequenceClassifierConfig, n_labels=4, rngs=nnx.Rngs(0))
    assert other.config == dataclasses.replace(model.config, n_labels=4)


@pytest.mark.parametrize(("pool", "kept"), [("attention", True), ("mean", False)])
def test_what_pools_a_row_is_kept_where_rows_are_pooled_alike(pool, kept):
    model = make(zoo.SequenceClassifierConfig, n_labels=3, pool="attention")
    other = zoo.with_head(model, zoo.SequenceClassifierConfig, n_labels=4, pool=pool, rngs=nnx.Rngs(0))
    assert (other.pooler.kernel[...] is model.pooler.kernel[...]) == kept
    if kept:
        np.testing.assert_array_equal(other.embed(IDS), model.embed(IDS))


def test_parameters_may_be_kept_in_another_dtype():
    other = zoo.with_head(make(), zoo.TokenClassifierConfig, param_dtype="bfloat16", rngs=nnx.Rngs(0))
    assert other.encoder.word_embeddings.embedding.dtype == jnp.bfloat16
    assert other.encoder.norm.scale.dtype == jnp.float32


def test_training_one_leaves_the_other_alone():
    model = make()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    other = zoo.with_head(model, zoo.TokenClassifierConfig, rngs=nnx.Rngs(0))
    nnx.update(other, jax.tree.map(lambda x: x + 1, nnx.state(other)))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


CAUSAL = zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=24)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model", "config", "fields", "message"),
    [
        (make, zoo.TokenClassifierConfig, {"d_ff": 3}, "unknown field of TokenClassifierConfig 'd_ff'"),
        (make, zoo.TokenClassifierConfig, {"n_label": 3}, "unknown field .* 'n_label', did you mean 'n_labels'"),
        (make, zoo.TokenClassifierConfig, {"n_labels": 0}, "n_labels=0, expected at least 1"),
        (make, zoo.TokenClassifierConfig, {"d_model": 16}, r"has other parameters than the model's: backbone.layers"),
        (make, zoo.TokenClassifierConfig, {"n_layers": 3}, r"backbone.layers.2.* is \(.*, expected None"),
        (make, zoo.MaskedLMConfig, {"max_len": 24}, r"position_embeddings.* is \(24, 8\), expected \(12, 8\); `ex"),
        (make, zoo.CausalLMConfig, {}, "unknown config of a model with an encoder 'CausalLMConfig'"),
        (make, CAUSAL, {}, "unknown config of a model with an encoder 'CausalLMConfig'"),
        (lambda: zoo.CausalLM(CAUSAL, rngs=nnx.Rngs(0)), zoo.TokenClassifierConfig, {}, "model is a CausalLM, expec"),
    ],
)
def test_what_does_not_fit_is_named(model, config, fields, message):
    with pytest.raises(ValueError, match=message):
        zoo.with_head(model(), config, rngs=nnx.Rngs(0), **fields)


# Longer inputs


@pytest.mark.parametrize("max_len", [12, 13, 24, 30])
def test_the_table_of_positions_is_repeated_and_cut(max_len):
    model = make()
    longer = zoo.extend_positions(model, max_len)
    assert longer.config == dataclasses.replace(model.config, max_len=max_len)
    old, new = (m.encoder.position_embeddings.embedding[...] for m in (model, longer))
    np.testing.assert_array_equal(new, np.resize(old, (max_len, 8)))
    kept = parameters(longer).keys() - {"encoder.position_embeddings.embedding"}
    assert all(parameters(longer)[name] is parameters(model)[name] for name in kept)
    call = jax.jit(longer)
    np.testing.assert_array_equal(call(IDS), jax.jit(model)(IDS))
    assert np.isfinite(call(jnp.zeros((1, max_len), int))).all()
    assert parameters(longer).keys() == parameters(model).keys() == parameters(make(max_len=max_len)).keys()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [pytest.param("m2/monarch", marks=pytest.mark.slow), "m2/monarch attn/mlp"])
def test_features_of_long_filters_are_repeated_and_their_time_follows_from_the_length(pattern):
    model = make(pattern=pattern)
    longer = zoo.extend_positions(model, 30)
    assert (longer.config.max_len, longer.config.m2.l_max) == (30, 30)
    assert longer.config == dataclasses.replace(
        model.config, max_len=30, m2=dataclasses.replace(model.config.m2, l_max=30)
    )
    tiled = [name for name in parameters(model) if name.endswith(".z")] + ["encoder.position_embeddings.embedding"]
    assert len(tiled) == 1 + 2 * (2 if pattern == "m2/monarch" else 1)
    for name, value in parameters(longer).items():
        old = parameters(model)[name]
        if name in tiled:
            np.testing.assert_array_equal(value, np.concatenate([old, old, old])[:30])
        else:
            assert value is old, name
    fresh = build(longer.config, rngs=nnx.Rngs(0))
    nnx.update(fresh, nnx.state(longer))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 30)))
    call, params = jitted(longer)
    assert_close(call(params, ids), call(nnx.state(fresh), ids))
    assert np.isfinite(call(params, ids)).all()
    before, its = jitted(model)
    assert np.abs(call(params, IDS) - before(its, IDS)).max() > 1e-4  # filters decay more slowly


@pytest.mark.slow
def test_a_causal_monarch_mixer_grows_too():
    config = zoo.CausalLMConfig(d_model=8, n_layers=1, vocab_size=24, pattern="m2", m2=TINY["m2"])
    longer = zoo.extend_positions(zoo.CausalLM(config, rngs=nnx.Rngs(0)), 20)
    assert longer.config.m2.l_max == 20
    assert longer(jnp.zeros((1, 20), int)).shape == (1, 20, 24)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_that_are_not_learned_need_nothing(position):
    model = make(max_len=None, attn=zoo.AttentionConfig(n_heads=2, position=position))
    longer = zoo.extend_positions(model, 30)
    assert longer.config == model.config
    assert_shared(longer, model)
    assert longer(jnp.zeros((1, 30), int)).shape == (1, 30, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_len=11, expected at least the model's max_len=12"),
        ({"pattern": "m2", "max_len": None}, "max_len=11, expected at least the model's m2.l_max=12"),
        ({"pattern": "m2 m2[conv=2d]"}, r"m2\[conv=2d\] beside a flat m2, expected its own l_max"),
        ({"pattern": "m2[l_max=12]"}, r"pattern='m2\[l_max=12\]' says l_max itself, expected it in m2.l_max"),
    ],
)
def test_inputs_do_not_get_shorter(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.extend_positions(make(**options), 11)
