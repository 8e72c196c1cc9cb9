"""Heads of encoders: tokens and rows get classes, and all are called as the encoder is."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, jitted, normal, with_random_parameters
from zoo.models.build import build

TINY = {
    "d_model": 8,
    "n_layers": 2,
    "vocab_size": 24,
    "max_len": 12,
    "attn": zoo.AttentionConfig(n_heads=2, position="none"),
    "mlp": zoo.MLPConfig(d_ff=12),
}
SEGMENTS = jnp.asarray([[5] * 8 + [0] * 12, [1] * 12 + [2] * 8])
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 20)))
KINDS = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 20)))


def make(kind=zoo.MaskedLMConfig, **options):
    config = kind(**TINY | options)
    return with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", [zoo.MaskedLM, zoo.SequenceClassifier, zoo.TokenClassifier])
def test_every_head_is_called_as_the_encoder_is(kind):
    arguments = inspect.signature(zoo.Encoder.run).parameters
    assert [*arguments] == ["self", "ids", "mask", "segment_ids", "token_type_ids", "inputs_embeds", "task", "rngs"]
    for method in (zoo.Encoder.__call__, kind.__call__, kind.hidden, kind.hidden_states, kind.run):
        assert inspect.signature(method).parameters == arguments


def test_a_row_that_has_one_vector_is_one_document():
    model, ids = make(zoo.SequenceClassifierConfig, pattern="attn/mlp"), IDS[:, :12]
    for method in (model, model.embed):
        with pytest.raises(ValueError, match="segment_ids given, expected one document a row"):
            method(ids, None, SEGMENTS[:, :12])


def test_a_token_classifier_is_its_encoder_and_a_linear_map():
    model = make(zoo.TokenClassifierConfig, pattern="attn/mlp", n_labels=3)
    call, params = jitted(model)
    logits = call(params, IDS, None, SEGMENTS, token_type_ids=KINDS)
    hidden = model.hidden(IDS, None, SEGMENTS, token_type_ids=KINDS)
    assert_close(logits, hidden @ model.classifier.kernel[...] + model.classifier.bias[...])
    assert logits.shape == (2, 20, 3)


def test_a_token_classifier_drops_out_with_rngs_alone_and_answers_in_float32():
    model = make(zoo.TokenClassifierConfig, pattern="attn/mlp", classifier_dropout=0.5, dtype="bfloat16")
    call, params = jitted(model)
    ids = IDS[:, :12]
    np.testing.assert_array_equal(call(params, ids), call(params, ids))
    assert call(params, ids).dtype == jnp.float32
    drawn = [model(ids, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
    exact = with_random_parameters(
        lambda: zoo.TokenClassifier(dataclasses.replace(model.config, dtype="float32"), rngs=nnx.Rngs(0))
    )
    assert_close(call(params, ids), exact(ids), tolerance=3e-2)  # bfloat16 of a whole model


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (zoo.TokenClassifierConfig, {"n_labels": 0}, "n_labels=0, expected at least 1"),
        (zoo.TokenClassifierConfig, {"classifier_dropout": 1.0}, "classifier_dropout=1.0, expected 0 <= classifier_dr"),
        (zoo.SequenceClassifierConfig, {"n_labels": -1}, "n_labels=-1, expected at least 0"),
        (zoo.SequenceClassifierConfig, {"classifier_dropout": -0.1}, "classifier_dropout=-0.1, expected 0 <="),
        (
            zoo.TokenClassifierConfig,
            {"head_activation": "geluu"},
            "unknown head_activation 'geluu', did you mean 'gelu'",
        ),
        (
            zoo.SequenceClassifierConfig,
            {"head_activation": "gelu", "n_labels": 0},
            "head_activation='gelu' with n_labels=0, expected None: there is no classifier",
        ),
        (zoo.SequenceClassifierConfig, {"pool": "max"}, "pool='max', expected one of first, mean, last, attention"),
    ],
)
def test_config_errors_name_the_option(unchecked, kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_masked_language_models_hidden_layer_may_have_no_bias(x64):
    model = make(head_bias=False, pattern="-/mlp", dtype="float64", param_dtype="float64")
    assert model.dense.bias is None
    hidden = normal(jax.random.key(0), 2, 8)
    expected = model.norm(jax.nn.gelu(hidden @ model.dense.kernel[...], approximate=False))
    expected = expected @ model.encoder.word_embeddings.embedding[...].T + model.bias[...]
    assert_close(model.head(hidden), expected)
