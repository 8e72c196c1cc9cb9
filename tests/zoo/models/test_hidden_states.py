"""The vectors of every layer, and vectors in place of token ids, for every model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close
from tests.places import ROOT

IDS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
SHAPE = {"d_model": 8, "vocab_size": 30, "attn": zoo.AttentionConfig(n_heads=2), "mlp": zoo.MLPConfig(d_ff=8)}
MODELS = {
    "causal": zoo.CausalLMConfig(**SHAPE, n_layers=5, pattern="mamba*2 attn/mlp", embedding_multiplier=2.0),
    "shared": zoo.CausalLMConfig(**SHAPE, n_layers=3, pattern="attn/mlp@a mamba"),
    "norms behind": zoo.MaskedLMConfig(**SHAPE, n_layers=2, pattern="attn/mlp", max_len=8),
    "norms before": zoo.SequenceClassifierConfig(
        **SHAPE, n_layers=3, pattern="attn/mlp", norm_place="pre", first_norm=False
    ),
    "tokens": zoo.TokenClassifierConfig(**SHAPE, n_layers=2, pattern="mamba", type_vocab_size=0, max_len=None),
}


@pytest.fixture(params=MODELS)
def model(request):
    from zoo.models.build import build

    return build(MODELS[request.param], rngs=nnx.Rngs(0))


def test_every_layer_s_vectors_begin_with_the_embedding_and_end_with_hidden(model):
    states = jax.jit(lambda ids, mask: model.hidden_states(ids, mask))(IDS, MASK)
    assert [state.shape for state in states] == [(2, 6, 8)] * (model.config.n_layers + 1)
    assert_close(states[-1], jax.jit(model.hidden)(IDS, MASK))
    backbone = model.backbone if isinstance(model, zoo.CausalLM) else model.encoder.backbone
    x = states[0]
    for block, state in zip(backbone.blocks[:-1], states[1:-1], strict=True):
        x = jax.jit(lambda x, block=block: block(x, mask=MASK))(x)
        assert_close(state, x)
    if isinstance(model, zoo.CausalLM):
        np.testing.assert_array_equal(states[0], model.embed(IDS))


def test_layers_that_are_looped_over_give_the_same_vectors():
    config = MODELS["causal"]
    looped = zoo.CausalLM(dataclasses.replace(config, scan_layers=True), rngs=nnx.Rngs(0))
    one, other = (jax.jit(model.hidden_states)(IDS) for model in (zoo.CausalLM(config, rngs=nnx.Rngs(0)), looped))
    for mine, theirs in zip(one, other, strict=True):
        assert_close(mine, theirs)
    assert_close(other[-1], jax.jit(looped.hidden)(IDS))


def test_vectors_may_take_the_place_of_ids(model):
    vectors = model.embed(IDS) if isinstance(model, zoo.CausalLM) else model.encoder.word_embeddings(IDS)
    by_ids, by_vectors = jax.jit(lambda ids, x: (model(ids, MASK), model(None, MASK, inputs_embeds=x)))(IDS, vectors)
    np.testing.assert_array_equal(by_ids, by_vectors)
    assert_close(jax.jit(lambda x: model.hidden_states(inputs_embeds=x)[-1])(vectors), jax.jit(model.hidden)(IDS))


def test_a_state_goes_on_by_vectors_too():
    model = zoo.CausalLM(MODELS["causal"], rngs=nnx.Rngs(0))

    def extend(x):
        logits, state = model.extend(IDS[:, :4], model.init_state(2, 6))
        return jnp.concatenate([logits, model.extend(None, state, inputs_embeds=x)[0]], axis=1)

    assert_close(jax.jit(extend)(model.embed(IDS[:, 4:])), jax.jit(model)(IDS))


def test_images_have_the_vectors_of_every_layer():
    config = zoo.ImageClassifierConfig(d_model=8, n_layers=2, image_size=8, patch_size=4, mlp=MODELS["causal"].mlp)
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    states, hidden = jax.jit(lambda images: (model.hidden_states(images), model.hidden(images)))(images)
    assert [state.shape for state in states] == [(2, 5, 8)] * 3
    assert_close(states[-1], hidden)


@pytest.mark.usefixtures("unchecked")
def test_ids_and_vectors_exclude_each_other():
    model = zoo.CausalLM(MODELS["shared"], rngs=nnx.Rngs(0))
    for arguments in ({}, {"ids": IDS, "inputs_embeds": model.embed(IDS)}):
        with pytest.raises(ValueError, match="expected one of them"):
            model(**arguments)
    for wrong in (jnp.zeros((2, 6, 7)), jnp.zeros((6, 8)), jnp.zeros((2, 6, 8), int)):
        with pytest.raises(ValueError, match=r"inputs_embeds is \w+\(.*\), expected floats \(b, l, 8\)"):
            model(inputs_embeds=wrong)


# What transformers 5.24 (torch 2.14.1) gives for ids 5 7 11 2 9 with output_hidden_states=True, AutoModel in float32:
# of every layer, the first two channels of the third position.
FACTS = {
    "bert_sequence_classification": [[1.6537, -0.0061], [2.4411, -1.5091], [-0.6708, 0.5694]],
    "modernbert_model": [[1.8666, -1.584], [7.9368, -4.779], [9.6252, -5.0967], [4.9744, -2.9312], [0.4683, -0.5872]],
    "llama_tied": [[0.284, -0.2523], [-4.3761, -2.4819], [-0.4933, 0.6613]],
    "bamba": [[-0.4484, 0.3264], [0.4482, -1.0563], [0.227, 1.1243], [0.4994, 2.0897]],
}


@pytest.mark.parametrize("name", FACTS)
def test_published_models_have_the_hidden_states_of_transformers(name):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(ROOT / "tests/published" / name)
    states = jax.jit(model.hidden_states)(jnp.array([[5, 7, 11, 2, 9]]))
    np.testing.assert_allclose([state[0, 2, :2] for state in states], FACTS[name], atol=2e-4)
