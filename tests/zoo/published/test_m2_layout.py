"""M2-BERT: its formulas written out densely, the official code's numbers, its files in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2.conv
import zoo
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from tests.numerics import assert_close, jitted
from tests.places import PUBLISHED
from tests.zoo.published import dense_m2_bert
from zoo.published import m2_layout
from zoo.published.weight_files import open_weights, save_weights

OFFICIAL = sorted(folder.name for folder in PUBLISHED.glob("m2_bert*"))
BASE = {
    "model_type": "m2_bert",
    "monarch_mixer_sequence_mixing": True,
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 21,
    "long_conv_l_max": 21,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "use_positional_encodings": True,
    "residual_long_conv": True,
    "bidirectional": True,
    "use_glu_mlp": True,
    "use_monarch_mlp": True,
    "monarch_mlp_nblocks": 4,
    "hyena_emb_dim": 5,
    "hyena_filter_order": 6,
    "hyena_w": 10,
    "hyena_w_mod": 1,
    "hyena_training_additions": False,
    "pool_all": False,
}
FORMS = {
    "released": {},
    "training additions": {"hyena_training_additions": True},
    "without residual": {"residual_long_conv": False, "hyena_emb_dim": 3},
    "causal": {"bidirectional": False},
    "plain dense MLP": {"use_glu_mlp": False, "use_monarch_mlp": False},
    "gated dense MLP, no positions": {"use_monarch_mlp": False, "use_positional_encodings": False},
    "blocks that do not divide": {"monarch_mlp_nblocks": 3, "hyena_w_mod": 2},
}


def random_model(raw, tensors=(), n_labels=0, dtype="float32"):
    """The model of a config with every parameter random, and its tensors under the official names."""
    config = m2_layout.read_config(BASE | raw, tensors, n_labels)
    config = type(config)(**vars(config) | {"dtype": dtype, "param_dtype": dtype})
    model = zoo.models.build.build(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def randomise(path, param):
        noise = rng.standard_normal(param.shape)
        leaf = str(path[-1])
        if leaf in ("scale", "freq"):
            value = (1 if leaf == "scale" else 3) + 0.3 * noise
        elif leaf == "z":
            value = param[...] + 0.3 * noise
        else:
            value = noise * (0.3 if noise.ndim < 2 else noise.shape[0 if leaf == "kernel" else -1] ** -0.5)
        return param.replace(jnp.asarray(value, param.dtype))

    params = [(path, randomise(path, param)) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    nnx.update(model, nnx.from_flat_state(params))
    return model, official_tensors(model)


def official_tensors(model):
    params = {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    table = m2_layout.tensor_table(model)
    tensors = {name: entry.join([params[path] for path in entry.paths]) for name, entry in table.entries.items()}
    return tensors | {name: tensors[original] for name, original in table.copies.items()} | dict(table.constants)


def tokens(length, vocab_size=24, rows=2):
    rng = np.random.default_rng(length)
    return jnp.asarray(rng.integers(0, vocab_size, (rows, length))), jnp.asarray(rng.integers(0, 2, (rows, length)))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_its_formulas_written_out(form, x64):
    raw = BASE | FORMS[form]
    model, tensors = random_model(raw, dtype="float64")
    hidden, params = jitted(model, "hidden")
    head, _ = jitted(model, "head")
    for length in (1, 20) if form != "released" else (1, 2, 7, 21):
        ids, kinds = tokens(length)
        expected = dense_m2_bert.hidden(tensors, raw, ids, kinds)
        actual = hidden(params, ids, token_type_ids=kinds)
        assert_close(actual, jnp.asarray(expected), name=f"{length}")
        assert_close(head(params, actual), jnp.asarray(dense_m2_bert.logits(tensors, raw, actual)))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["first", "mean"])
def test_poolers(pool, x64):
    raw = BASE | {"pool_all": pool == "mean"}
    model, tensors = random_model(raw, ("bert.pooler.dense.weight",), 3, dtype="float64")
    ids, kinds = tokens(9)
    mask = np.arange(9) < np.array([[5], [9]])
    hidden = model.hidden(ids, token_type_ids=kinds)
    expected = dense_m2_bert.pooled(tensors, np.asarray(hidden), mask if pool == "mean" else None)
    embed, params = jitted(model, "embed")
    assert_close(embed(params, ids, jnp.asarray(mask), token_type_ids=kinds), jnp.asarray(expected))
    logits = expected @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    assert_close(jitted(model)[0](params, ids, jnp.asarray(mask), token_type_ids=kinds), jnp.asarray(logits))
    assert_close(embed(params, ids), embed(params, ids, jnp.ones((2, 9), bool)))


@pytest.mark.parametrize("name", OFFICIAL)
def test_gives_the_official_numbers(name):
    model = zoo.from_pretrained(PUBLISHED / name)
    expected = np.load(PUBLISHED / name / "expected.npz")
    lengths = sorted(int(key.removeprefix("ids_")) for key in expected if key.startswith("ids_"))
    assert lengths
    hidden_of, params = jitted(model, "hidden")
    read, _ = jitted(model, "read")
    for length in lengths:
        ids, kinds = (jnp.asarray(expected[f"{what}_{length}"]) for what in ("ids", "token_type_ids"))
        hidden = hidden_of(params, ids, token_type_ids=kinds)
        assert_close(hidden, jnp.asarray(expected[f"hidden_{length}"]), tolerance=1e-5, name=f"hidden {length}")
        if f"logits_{length}" in expected:
            logits = read(params, hidden)
            assert_close(logits, jnp.asarray(expected[f"logits_{length}"]), tolerance=1e-5, name=f"logits {length}")


def test_retrieval_gives_the_official_vectors_by_either_pooling():
    model = zoo.from_pretrained(PUBLISHED / "m2_bert_retrieval")
    expected = np.load(PUBLISHED / "m2_bert_retrieval" / "expected.npz")
    ids, kinds, mask = (jnp.asarray(expected[f"{name}_40"]) for name in ("ids", "token_type_ids", "attention_mask"))

    def embed(model):
        call, params = jitted(model, "embed")
        return call(params, ids, mask > 0, token_type_ids=kinds)

    assert_close(embed(model), jnp.asarray(expected["pooled_cls_40"]), tolerance=1e-5)
    mean = zoo.SequenceClassifier(
        zoo.SequenceClassifierConfig(**vars(model.config) | {"pool": "mean"}), rngs=nnx.Rngs(0)
    )
    nnx.update(mean, nnx.state(model))
    assert_close(embed(mean), jnp.asarray(expected["pooled_all_40"]), tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_goes_out_and_comes_in_unchanged(form, tmp_path):
    model, tensors = random_model(FORMS[form])
    zoo.save_pretrained(model, tmp_path, "official")
    stored = {name: tensor.read() for name, tensor in open_weights(tmp_path).items()}
    assert stored.keys() == tensors.keys()
    back = zoo.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))
    again = m2_layout.write_config(back.config, "official")
    assert again == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("n_labels", [0, 3])
def test_poolers_and_classifiers_go_out_and_come_in(n_labels, tmp_path):
    model, _ = random_model({"pool_all": True}, ("bert.pooler.dense.weight",), n_labels)
    zoo.save_pretrained(model, tmp_path, "official")
    back = zoo.from_pretrained(tmp_path)
    assert isinstance(back, zoo.SequenceClassifier)
    assert (back.config.n_labels, back.config.pool) == (n_labels, "mean")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.slow
def test_a_classifier_of_the_first_token_passes_its_pooler_by(tmp_path):
    model, tensors = random_model({"use_cls_token": True}, ("bert.pooler.dense.weight",), 3)
    assert model.pooler is None
    zoo.save_pretrained(model, tmp_path, "official")
    assert zoo.from_pretrained(tmp_path).config == model.config
    unused = {f"bert.pooler.dense.{name}": np.zeros(8, "f4") for name in ("weight", "bias")}
    save_weights(tmp_path, tensors | unused, format="bin")
    back = zoo.from_pretrained(tmp_path)
    ids, kinds = tokens(9)
    first = back.hidden(ids, token_type_ids=kinds)[:, 0]
    expected = np.asarray(first) @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    assert_close(back(ids, token_type_ids=kinds), jnp.asarray(expected))


def test_prefixes_pruned_copies_and_flash_buffers(tmp_path):
    """Composer and DataParallel put prefixes in front; some files leave copies out; flash FFTs leave their own in."""
    model, tensors = random_model({})
    table = m2_layout.tensor_table(model)
    pruned = {name: x for name, x in tensors.items() if name in table.entries}
    pruned["bert.encoder.flashfft.f_128_fft"] = np.zeros(3, np.float32)
    save_weights(tmp_path, {f"module.model.{name}": x for name, x in pruned.items()}, format="bin")
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    back = zoo.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.1.attention.in_linear.bias"),
            "1 missing in the file: bert.encoder.layer.1",
        ),
        (
            lambda t: t.update({"bert.pooler.dense.bias": np.zeros(8, np.float32)}),
            "1 in the file that the model does not",
        ),
        (
            lambda t: t.update(
                {"bert.encoder.layer.0.attention.filter_fn.implicit_filter.3.freq": np.ones((1, 6), "f4")}
            ),
            "implicit_filter.3.freq differs from bert.encoder.layer.0.attention.filter_fn.implicit_filter.1.freq",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.0.attention.filter_fn.pos_emb.t": np.ones((1, 21, 1), "f4")}),
            "filter_fn.pos_emb.t is not what follows from the config",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": np.ones((24, 8), "f4")}),
            "decoder.weight differs from bert",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(change, message, tmp_path):
    _, tensors = random_model({})
    change(tensors)
    save_weights(tmp_path, tensors, format="bin")
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_pooling": True}, "attention_pooling=True is not supported"),
        ({"monarch_mixer_sequence_mixing": False}, "a BERT with attention, not a Monarch Mixer"),
        ({"hidden_act": "relu"}, "hidden_act='relu', expected 'gelu'"),
    ],
)
def test_a_config_that_cannot_be_read_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        m2_layout.read_config(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "attn/mlp"}, "pattern='attn/mlp' has no official layout for encoders, only 'm2/monarch'"),
        ({"mixer_residual": True}, "mixer_residual=True cannot be written in the official layout, only False"),
        ({"m2": M2Config(d_conv=4)}, "m2.d_conv=4 cannot be written"),
        ({"m2": M2Config(filter=HyenaFilterConfig(shift=0.1))}, r"m2.filter.shift=0.1 cannot be written"),
        ({"monarch": MonarchMLPConfig(order=2)}, "monarch.order=2 cannot be written"),
        ({"norm_bias": False}, "norm_bias=False cannot be written"),
        ({"head_bias": False}, "head_bias=False cannot be written"),
        ({"pattern": "m2[d_conv=4]/monarch"}, r"pattern='m2\[d_conv=4\]/monarch' has no official layout for encoders"),
    ],
)
def test_what_the_layout_has_no_word_for_is_an_error(change, message):
    fields = vars(zoo.presets["m2-bert-80m"]) | change
    with pytest.raises(ValueError, match=message):
        m2_layout.write_config(zoo.MaskedLMConfig(**fields), "official")
    with pytest.raises(ValueError, match="M2-BERT has no transformers layout, only the official one"):
        m2_layout.write_config(zoo.presets["m2-bert-80m"], "transformers")


@pytest.mark.parametrize("pool", ["last", "attention"])
def test_other_poolings_and_heads_are_errors(pool):
    released = vars(zoo.presets["m2-bert-80m"]).items()
    fields = {name: value for name, value in released if not name.startswith(("head", "decoder", "tied_head"))}
    with pytest.raises(ValueError, match=f"pool='{pool}' cannot be written in the official layout, only 'first'"):
        m2_layout.write_config(zoo.SequenceClassifierConfig(**fields, pool=pool), "official")
    with pytest.raises(ValueError, match="M2-BERT has no layout for a TokenClassifier, only for MaskedLM and Sequence"):
        m2_layout.write_config(zoo.TokenClassifierConfig(**fields), "official")


@pytest.mark.slow
def test_the_published_files_of_80m_have_720_tensors():
    model = nnx.eval_shape(lambda: zoo.create("m2-bert-80m", rngs=nnx.Rngs(0)))
    table = m2_layout.tensor_table(model)
    assert len(table.entries) == 550
    assert len(table.entries) + len(table.copies) + len(table.constants) == 720


@pytest.mark.slow
def test_padding_counts_as_text_or_not_at_all():
    """The released models take padding for text; new ones leave it out, wherever the row ends."""
    model, _ = random_model({})
    ids, _ = tokens(12)
    mask = jnp.asarray(np.arange(12) < np.array([[7], [12]]))
    np.testing.assert_array_equal(model.hidden(ids, mask), model.hidden(ids))
    heeding = zoo.MaskedLM(zoo.MaskedLMConfig(**vars(model.config) | {"mask_padding": True}), rngs=nnx.Rngs(0))
    nnx.update(heeding, nnx.state(model))
    assert_close(heeding.hidden(ids, mask)[:1, :7], heeding.hidden(ids[:1, :7]))


@pytest.mark.slow
def test_dropout_is_on_only_with_rngs():
    model = zoo.MaskedLM(
        zoo.MaskedLMConfig(**vars(random_model({})[0].config) | {"embedding_dropout": 0.5}), rngs=nnx.Rngs(0)
    )
    ids, _ = tokens(12)
    np.testing.assert_array_equal(model(ids), model(ids))
    drawn = [model(ids, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3


def flops(length):
    config = zoo.MaskedLMConfig(**vars(zoo.presets["m2-bert-80m"]) | {"n_layers": 1, "vocab_size": 8, "max_len": 2048})
    config = zoo.MaskedLMConfig(**vars(config) | {"m2": M2Config(l_max=2048, residual_long_conv=True)})
    graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.MaskedLM(config, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    return run.lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile().cost_analysis()["flops"]


def test_twice_the_length_costs_about_twice(monkeypatch):
    monkeypatch.setattr(m2.conv, "BLOCK_BYTES", 1 << 60)  # of a loop over channels, one turn would be counted
    short, middle, long = map(flops, (512, 1024, 2048))
    assert middle / short <= 2.3
    assert long / middle <= 2.3
