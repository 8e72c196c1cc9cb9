"""BERT and ModernBERT: transformers' numbers, their files in and out, what their layouts have no word for."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import jitted, with_random_parameters
from tests.places import PUBLISHED
from zoo.published import bert_layout
from zoo.published.weight_files import open_weights, save_weights

NAMES = sorted(folder.name for folder in PUBLISHED.iterdir() if folder.name.startswith(("bert_", "modernbert_")))
KINDS = {
    "bert_masked_lm": zoo.MaskedLM,
    "bert_pretraining": zoo.MaskedLM,
    "bert_sequence_classification": zoo.SequenceClassifier,
    "bert_token_classification": zoo.TokenClassifier,
    "bert_question_answering": zoo.TokenClassifier,
    "bert_sentence": zoo.SequenceClassifier,
    "modernbert_masked_lm": zoo.MaskedLM,
    "modernbert_biases": zoo.MaskedLM,
    "modernbert_model": zoo.SequenceClassifier,
    "modernbert_sequence_classification": zoo.SequenceClassifier,
    "modernbert_token_classification": zoo.TokenClassifier,
}
BASE = {"model_type": "bert", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
MODERN = BASE | {"model_type": "modernbert", "num_hidden_layers": 4}


def arrays(folder):
    return {key: tensor.read() for key, tensor in open_weights(folder).items()}


def parameters(model):
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_same_models(model, other):
    assert model.config == other.config
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


# What they compute


def test_every_published_file_is_tested():
    assert sorted(KINDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_gives_transformers_numbers(name):
    """At lengths within a local layer's window and beyond it, one row of two padded."""
    model = zoo.from_pretrained(PUBLISHED / name)
    assert type(model) is KINDS[name]
    expected = np.load(PUBLISHED / name / "expected.npz")
    has_logits = "logits_1" in expected
    hidden_of, params = jitted(model, "hidden")
    read, _ = jitted(model, "read" if has_logits else "vectors")
    for length in (1, 7, 33):
        ids, mask, kinds = (jnp.asarray(expected[f"{what}_{length}"]) for what in ("ids", "mask", "token_type_ids"))
        options = {"token_type_ids": kinds} if model.config.type_vocab_size else {}
        hidden = hidden_of(params, ids, mask, **options)
        np.testing.assert_allclose(hidden[mask], expected[f"hidden_{length}"][mask], rtol=0, atol=1e-4)
        actual = np.asarray(read(params, hidden, mask))
        theirs = expected[f"{'logits' if has_logits else 'pooled'}_{length}"]
        assert actual.shape == theirs.shape
        if actual.ndim == 3:
            actual, theirs = actual[mask], theirs[mask]
        np.testing.assert_allclose(actual, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.1


def test_sentences_are_pooled_as_the_folder_says(tmp_path):
    """A model without a head: its pooler where there is no 1_Pooling, and else what that says, without the pooler."""
    plain = shutil.copytree(PUBLISHED / "bert_sentence", tmp_path / "plain")
    shutil.rmtree(plain / "1_Pooling")
    ids = jnp.arange(1, 10)[None]
    mask = jnp.arange(9)[None] < 6
    pooler = zoo.from_pretrained(plain)
    assert (pooler.config.pool, pooler.config.pooler, pooler.config.n_labels) == ("first", True, 0)
    first = pooler.hidden(ids, mask)[:, 0]
    expected = jnp.tanh(first @ pooler.pooler.kernel[...] + pooler.pooler.bias[...])
    np.testing.assert_allclose(pooler.embed(ids, mask), expected, atol=1e-6)

    (plain / "1_Pooling").mkdir()
    for said, pool in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
    ):
        (plain / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | said))
        config = zoo.from_pretrained(plain).config
        assert (config.pool, config.pooler) == (pool, False)
    for said, message in (
        ({"pooling_mode_max_tokens": True}, "pooling by max_tokens, expected cls_token or mean_tokens or lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling by mean_tokens, cls_token"),
        ({}, "pooling by nothing"),
    ):
        (plain / "1_Pooling" / "config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=message):
            zoo.from_pretrained(plain)


def test_a_module_with_parameters_behind_the_pooling_is_an_error(tmp_path):
    folder = shutil.copytree(PUBLISHED / "bert_sentence", tmp_path / "dense")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json: a module of type Dense is not supported"):
        zoo.from_pretrained(folder)


# In and out


@pytest.mark.parametrize("name", NAMES)
def test_goes_out_and_comes_in_unchanged(name, tmp_path):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(PUBLISHED / name)
    zoo.save_pretrained(model, tmp_path, "transformers")
    assert_same_models(zoo.from_pretrained(tmp_path), model)
    theirs, written = arrays(PUBLISHED / name), arrays(tmp_path)
    dropped = {key for key in theirs if "seq_relationship" in key or ("pooler" in key and model_has_none(model))}
    renamed = {key.replace("qa_outputs", "classifier"): value for key, value in theirs.items() if key not in dropped}
    assert written.keys() == renamed.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, renamed[key], err_msg=key)
    assert bool(dropped) == (name in ("bert_pretraining", "bert_sentence"))


def model_has_none(model):
    return getattr(model, "pooler", None) is None


@pytest.mark.parametrize("name", ["bert_masked_lm", "modernbert_masked_lm"])
def test_every_number_of_the_file_is_in_one_parameter(name, tmp_path):
    tensors, begin = {}, 0
    for key, tensor in sorted(arrays(PUBLISHED / name).items()):
        tensors[key] = np.arange(begin, begin + tensor.size, dtype=np.float32).reshape(tensor.shape)
        begin += tensor.size
    save_weights(tmp_path, tensors, format="bin")
    shutil.copy(PUBLISHED / name / "config.json", tmp_path)
    values = parameters(zoo.from_pretrained(tmp_path)).values()
    numbers = np.concatenate([np.asarray(value).ravel() for value in values])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(begin))


def with_names(change, source="bert_masked_lm"):
    """A folder's config and tensors, renamed or changed."""

    def make(folder):
        tensors = arrays(PUBLISHED / source)
        tensors = change(tensors) or tensors
        save_weights(folder, tensors, format="bin")
        raw = json.loads((PUBLISHED / source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def renamed(tensors, names):
    for old, new in names.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "change",
    [
        lambda t: renamed(t, {"bert.": ""}),
        lambda t: renamed(t, OLD),
        lambda t: renamed(t, {"cls.predictions.bias": "cls.predictions.decoder.bias"}),
        lambda t: t | {"cls.predictions.decoder.bias": t["cls.predictions.bias"]},
        lambda t: t | {"cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"]},
        lambda t: t | {"bert.embeddings.position_ids": np.arange(40)[None]},
        lambda t: (
            t | {"bert.pooler.dense.weight": np.ones((16, 16), "f4"), "bert.pooler.dense.bias": np.ones(16, "f4")}
        ),
        lambda t: {f"module.{key}": value for key, value in t.items()},
    ],
)
def test_what_files_of_all_ages_hold_is_read(change, tmp_path):
    assert_same_models(
        zoo.from_pretrained(with_names(change)(tmp_path)), zoo.from_pretrained(PUBLISHED / "bert_masked_lm")
    )


def test_old_token_classifiers_hold_a_pooler_that_they_ignore(tmp_path):
    pooler = {
        f"bert.pooler.dense.{name}": np.ones((16, 16)[: 2 - i], "f4") for i, name in enumerate(("weight", "bias"))
    }
    for name in ("bert_token_classification", "bert_question_answering"):
        folder = tmp_path / name
        folder.mkdir()
        model = zoo.from_pretrained(with_names(lambda t: t | pooler, name)(folder))
        assert_same_models(model, zoo.from_pretrained(PUBLISHED / name))


EXTRA = np.zeros((2, 3), np.float32)
QUERY = "encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"bert.{QUERY}.bias") is None, f"1 missing in the file: {QUERY}.bias"),
        (lambda t: t | {"bert.extra": EXTRA}, "1 in the file that the model does not have: extra"),
        (lambda t: t | {f"bert.{QUERY}.weight": EXTRA}, rf"{QUERY}.weight is \(2, 3\), expected \(16, 16\)"),
        (lambda t: t | {f"{QUERY}.bias": EXTRA}, f"two tensors are {QUERY}.bias, with and without a prefix"),
        (lambda t: t | {"cls.predictions.decoder.bias": EXTRA}, "decoder.bias differs from cls.predictions.bias"),
        (lambda t: t | {"cls.predictions.decoder.weight": EXTRA}, "decoder.weight differs from embeddings.word_embedd"),
        (lambda t: t | {"bert.embeddings.position_ids": np.ones((1, 40))}, "position_ids is not what follows from the"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(with_names(change)(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.attn.Wqkv.weight") is None,
            "1 missing in the file: layers.2.attn.Wqkv.weight",
        ),
        (
            lambda t: t | {"model.layers.2.mlp.Wi.weight": EXTRA},
            r"layers.2.mlp.Wi.weight is \(2, 3\), expected \(48, 16\)",
        ),
        (
            lambda t: t | {"model.layers.0.attn_norm.weight": EXTRA},
            "the model does not have: layers.0.attn_norm.weight",
        ),
        (lambda t: t | {"decoder.weight": EXTRA}, "decoder.weight differs from embeddings.tok_embeddings.weight"),
        (
            lambda t: {k: v for k, v in t.items() if "decoder" not in k},
            "the model does not have: head.dense.weight, head.norm.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_a_modernbert_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(with_names(change, "modernbert_masked_lm")(tmp_path))


# Configs

BERT_BASE = {  # google-bert/bert-base-uncased
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
MODERNBERT_BASE = {  # answerdotai/ModernBERT-base, of before transformers 5
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
    "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
    "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute", "sep_token_id": 50282,
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": 50368,
}  # fmt: skip
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 28, "intermediate_size": 2624}


@pytest.mark.parametrize(
    ("raw", "preset"),
    [(BERT_BASE, "bert-base"), (MODERNBERT_BASE, "modernbert-base"), (MODERNBERT_BASE | LARGE, "modernbert-large")],
    ids=["bert-base", "modernbert-base", "modernbert-large"],
)
def test_published_configs_are_the_presets(raw, preset):
    config = zoo.presets[preset]
    assert bert_layout.read_config(raw) == config
    written = json.loads(json.dumps(bert_layout.write_config(config)))
    assert bert_layout.read_config(written) == config
    said = {"hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "model_type", "architectures"}
    assert {name: written[name] for name in said} == {name: raw[name] for name in said}


def test_a_config_with_nothing_but_its_type_has_the_published_sizes():
    assert bert_layout.read_config({"model_type": "bert"}) == zoo.presets["bert-base"]
    assert bert_layout.read_config({"model_type": "modernbert"}) == zoo.presets["modernbert-base"]


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("fssf", "attn/mlp attn[rope_base=10000,window=65]/mlp*2"),
        ("ssss", "attn[rope_base=10000,window=65]/mlp"),
        ("ffff", "attn/mlp"),
        ("sfff", "attn[rope_base=10000,window=65]/mlp attn/mlp*3"),
        ("fsfs", "attn/mlp attn[rope_base=10000,window=65]/mlp"),
    ],
)
def test_a_layers_kind_becomes_its_word(kinds, pattern):
    types = [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in kinds]
    config = bert_layout.read_config(MODERN | {"layer_types": types})
    assert config.pattern == pattern
    assert bert_layout.write_config(config)["layer_types"] == types


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (BASE | {"hidden_act": "tanh"}, "hidden_act='tanh', expected one of gelu, gelu_new"),
        (BASE | {"is_decoder": True}, "is_decoder=True is not supported, only False"),
        (BASE | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        (BASE | {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        (MODERN | {"decoder_bias": False}, "decoder_bias=False is not supported, only True"),
        (MODERN | {"layer_types": ["full_attention"]}, "layer_types has 1, expected 4 of full_attention"),
        (MODERN | {"layer_types": ["full_attention"] * 3 + ["chunked"]}, "layer_types has chunked, expected 4 of"),
        (MODERN | {"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type='linear' is not supported"),
        (
            MODERN | {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "rope_parameters: full_attention: rope_type='yarn' is not supported",
        ),
        (MODERN | {"hidden_activation": "mish"}, "hidden_activation='mish', expected one of"),
    ],
)
def test_a_config_that_cannot_be_read_names_the_option(raw, message):
    with pytest.raises(ValueError, match=message):
        bert_layout.read_config(raw)


def bert(kind=zoo.MaskedLMConfig, **options):
    fields = {
        "d_model": 16,
        "n_layers": 2,
        "pattern": "attn/mlp",
        "vocab_size": 29,
        "max_len": 40,
        "attn": zoo.AttentionConfig(n_heads=4, position="none", bias=True),
        "mlp": zoo.MLPConfig(d_ff=24, gated=False, activation="gelu", bias=True),
    }
    return kind(**fields | options)


def modern(kind=zoo.MaskedLMConfig, **options):
    fields = {
        "pattern": "attn/mlp attn[rope_base=10000,window=5]/mlp",
        "norm_place": "pre",
        "norm_bias": False,
        "first_norm": False,
        "max_len": None,
        "type_vocab_size": 0,
        "attn": zoo.AttentionConfig(n_heads=4, rope_base=160_000.0),
        "mlp": zoo.MLPConfig(d_ff=24, activation="gelu"),
    }
    if kind is zoo.MaskedLMConfig:
        fields["head_bias"] = False
    return bert(kind, **fields | options)


EMBEDDING = {"kind": zoo.SequenceClassifierConfig, "n_labels": 0, "pooler": False}
ATTN, MLP = zoo.AttentionConfig(n_heads=4, position="none", bias=True), bert().mlp


@pytest.mark.parametrize(
    "config",
    [
        bert(pad_vocab_multiple=8),
        bert(attn=dataclasses.replace(ATTN, n_kv_heads=4, head_dim=4, rope_base=3.0)),
        bert(pattern="attn[bias=true]/mlp[bias=true] attn/mlp", mlp=dataclasses.replace(MLP, out_bias=True)),
        bert(mlp=dataclasses.replace(MLP, d_ff=None)),
        bert(dropout=0.1, embedding_dropout=0.1),
        bert(zoo.SequenceClassifierConfig, n_labels=3, classifier_dropout=0.2),
        bert(zoo.SequenceClassifierConfig, n_labels=0),
        bert(zoo.TokenClassifierConfig, n_labels=1),
        modern(zoo.SequenceClassifierConfig, n_labels=3, pooler=False, pool="mean", head_activation="gelu"),
        modern(zoo.TokenClassifierConfig, n_labels=4, head_activation="silu", head_bias=True),
        bert(**EMBEDDING, pool="mean"),
        bert(**EMBEDDING, pool="last"),
        bert(**EMBEDDING),
        modern(),
        modern(attn=zoo.AttentionConfig(n_heads=2, rope_base=10.0), pattern="attn/mlp"),
        modern(**EMBEDDING, pool="mean"),
        modern(**EMBEDDING),
    ],
)
def test_configs_go_out_and_in_and_say_the_same_model(config, tmp_path):
    pytest.importorskip("safetensors")
    model = with_random_parameters(lambda: zoo.models.build.build(config, rngs=nnx.Rngs(0)))
    zoo.save_pretrained(model, tmp_path, "transformers")
    again = zoo.from_pretrained(tmp_path)
    assert type(again) is type(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 12)))
    mask = jnp.arange(12)[None] < jnp.asarray([[12], [8]])
    run = lambda m: (m.embed if getattr(config, "n_labels", 1) == 0 else m)(ids, mask)  # noqa: E731
    np.testing.assert_array_equal(run(again), run(model))
    names = ("n_labels", "pool", "pooler", "dropout", "classifier_dropout")
    for name in names:
        if not (config.norm_place == "pre" and name == "dropout") and (hasattr(config, name)):
            assert getattr(again.config, name) == getattr(config, name), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            bert(pattern="mamba", norm_place="pre"),
            "pattern='mamba' has no transformers layout for encoders; those that",
        ),
        (bert(pattern="attn"), "pattern='attn' has no transformers layout"),
        (
            bert(attn=dataclasses.replace(ATTN, position="alibi"), max_len=None),
            "attn.position='alibi' cannot be written",
        ),
        (
            bert(attn=dataclasses.replace(ATTN, window=3)),
            "attn.window=3 cannot be written in the .* of bert, only None",
        ),
        (bert(attn=dataclasses.replace(ATTN, n_kv_heads=2)), "attn.n_kv_heads=2 cannot be written"),
        (bert(attn=dataclasses.replace(ATTN, bias=False)), "attn.bias=False cannot be written"),
        (bert(pattern="attn/mlp attn/mlp[d_ff=8]"), "mlp.d_ff=8 in layer 1 cannot be written .*, only 24"),
        (bert(mlp=dataclasses.replace(MLP, gated=True)), "mlp.gated=True cannot be written"),
        (bert(mlp=dataclasses.replace(MLP, out_bias=False)), "mlp.out_bias=False cannot be written"),
        (bert(max_len=None), "max_len=None cannot be written"),
        (bert(type_vocab_size=0), "type_vocab_size=0 cannot be written"),
        (bert(norm="rms"), "norm='rms' cannot be written"),
        (bert(norm_bias=False), "norm_bias=False cannot be written"),
        (bert(causal=True), "causal=True cannot be written"),
        (bert(mask_padding=False), "mask_padding=False cannot be written"),
        (bert(head_bias=False), "head_bias=False cannot be written"),
        (bert(head_activation="relu"), "head_activation='relu' cannot be written"),
        (bert(zoo.SequenceClassifierConfig, pool="mean"), "pool='mean' cannot be written"),
        (bert(zoo.SequenceClassifierConfig, pooler=False), "pooler=False cannot be written"),
        (bert(zoo.SequenceClassifierConfig, n_labels=0, pool="mean"), "pool='mean' cannot be written"),
        (
            bert(**EMBEDDING, pool="attention"),
            "pool='attention' cannot be written in the transformers layout of bert, only fi",
        ),
        (modern(first_norm=True), "first_norm=True cannot be written in the transformers layout of modernbert"),
        (modern(max_len=40), "max_len=40 cannot be written"),
        (modern(type_vocab_size=2), "type_vocab_size=2 cannot be written"),
        (modern(pattern="attn[window=3]/mlp attn[window=5]/mlp"), "attn.window=5 in layer 1 cannot be written"),
        (modern(pattern="attn/mlp attn[rope_base=3]/mlp"), "attn.rope_base=3.0 in layer 1 cannot be written"),
        (modern(mlp=zoo.MLPConfig(gated=False, activation="gelu")), "mlp.gated=False cannot be written"),
        (modern(zoo.TokenClassifierConfig), "head_activation=None cannot be written"),
        (modern(zoo.SequenceClassifierConfig, head_activation="gelu"), "pooler=True cannot be written"),
        (modern(zoo.SequenceClassifierConfig, n_labels=0), "pooler=True cannot be written"),
    ],
)
def test_what_a_layout_has_no_word_for_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        bert_layout.write_config(config)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (bert(), "official", "pattern='attn/mlp' has no official layout for encoders"),
        (bert(pattern="mamba", norm_place="pre"), "transformers", "pattern='mamba' has no transformers layout for enc"),
        (bert(zoo.TokenClassifierConfig, pattern="m2/monarch"), "official", "M2-BERT has no layout for a TokenClassif"),
    ],
)
def test_saving_names_what_cannot_be_said(config, layout, message, tmp_path):
    model = nnx.eval_shape(lambda: zoo.models.build.build(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path, layout)
    assert not list(tmp_path.iterdir())


def test_more_fields_of_the_config_may_not_describe_another_model(tmp_path):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(PUBLISHED / "bert_sequence_classification")
    labels = {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    zoo.save_pretrained(model, tmp_path, "transformers", extra=labels)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == labels["id2label"]
    assert_same_models(zoo.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="describes another model"):
        zoo.save_pretrained(model, tmp_path / "other", "transformers", extra={"hidden_act": "relu"})


# The real thing

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
MINILM = CACHE / "subquadratic-zoo" / "data" / "minilm"
# What transformers 5.24.0 makes of these in float64, with the mean that the folder's 1_Pooling asks for.
SENTENCES = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
COSINES = [
    [1.000000, 0.694577, 0.942915, 0.256876],
    [0.694577, 1.000000, 0.621050, 0.249063],
    [0.942915, 0.621050, 1.000000, 0.210615],
    [0.256876, 0.249063, 0.210615, 1.000000],
]
FIRST = [-0.033877, 0.091942, 0.048701, -0.034884]


@pytest.fixture(scope="module")
def minilm():
    if not (MINILM / "model.safetensors").is_file():
        pytest.skip(f"all-MiniLM-L6-v2 is not in {MINILM}: fetch it with `python -m experiments.data fetch`")
    return zoo.from_pretrained(MINILM)


def test_all_minilm_l6_v2_has_its_size_and_pools_by_the_mean(minilm):
    config = minilm.config
    assert (config.d_model, config.n_layers, config.attn.n_heads, config.mlp.d_ff) == (384, 6, 12, 1536)
    assert (config.pool, config.pooler, config.n_labels) == ("mean", False, 0)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(minilm)))
    assert sizes == 22_713_216 - (384 * 384 + 384)  # 22.7M, without the pooler that nothing reads


def test_all_minilm_l6_v2_gives_its_vectors(minilm):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask = (jnp.asarray([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    vectors = np.asarray(minilm.embed(ids, mask > 0))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, COSINES, atol=1e-5)
    np.testing.assert_allclose(vectors[0, :4], FIRST, atol=1e-5)
