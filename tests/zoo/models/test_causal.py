"""The causal language model: tokens in, logits out, whatever mixers lie between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, with_random_parameters

TINY = zoo.CausalLMConfig(
    d_model=8,
    n_layers=2,
    pattern="mamba attn/mlp",
    vocab_size=17,
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=12),
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)))


def make_model(**options):
    config = dataclasses.replace(TINY, **options)
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def call(model):
    return jax.jit(model)


@pytest.fixture(scope="module")
def extend(model):
    return jax.jit(model.extend, static_argnames="last_only")


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [(17, 8, 24), (16, 8, 16), (17, 1, 17), (1, 128, 128)])
def test_vocabulary_is_padded_to_a_multiple(vocab_size, multiple, rows):
    config = dataclasses.replace(TINY, vocab_size=vocab_size, pad_vocab_multiple=multiple)
    assert config.padded_vocab_size == rows
    graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0))))
    assert params["embedding"]["embedding"].shape == (rows, 8)
    assert jax.eval_shape(lambda params: nnx.merge(graphdef, params)(IDS), params).shape == (2, 9, rows)


def test_tied_head_is_the_embedding(model, call):
    assert model.lm_head is None
    logits = jax.jit(model.hidden)(IDS) @ model.embedding.embedding[...].T
    assert_close(call(IDS), logits)


def test_untied_head_has_a_projection_of_its_own(model):
    untied = make_model(tie_embeddings=False)
    assert untied.lm_head.kernel.shape == (8, 24)
    assert untied.lm_head.bias is None
    assert_close(jax.jit(untied)(IDS), jax.jit(untied.hidden)(IDS) @ untied.lm_head.kernel[...])
    tied, untied = ({path for path, _ in nnx.to_flat_state(nnx.state(m))} for m in (model, untied))
    assert untied - tied == {("lm_head", "kernel")}


def test_bfloat16_logits_are_float32(call):
    low = make_model(dtype="bfloat16")
    logits = jax.jit(low)(IDS)
    assert logits.dtype == jnp.float32
    assert_close(logits, call(IDS), tolerance=2e-2)
    assert low.embedding(IDS).dtype == jnp.float32  # tokens enter the residual stream unrounded


def test_packed_documents_equal_each_alone(call):
    segment_ids = jnp.repeat(jnp.asarray([[4, 9, 5], [1, 0, 1]]), 3, axis=1)
    packed = call(IDS, None, segment_ids)
    for start in (0, 3, 6):
        here = slice(start, start + 3)
        assert_close(packed[:, here], call(IDS[:, here]))


@pytest.mark.parametrize("start", [0, 3])
def test_padding_on_either_side_changes_nothing(call, start):
    real = slice(start, start + 6)
    mask = jnp.zeros((2, 9), bool).at[:, real].set(True)
    assert_close(call(IDS, mask)[:, real], call(IDS[:, real]))


def test_extend_over_any_split_is_the_whole_call(model, call, extend):
    for pieces in [(9,), (6, 1, 1, 1)]:
        state, outputs = model.init_state(2, 9), []
        for piece in jnp.split(IDS, np.cumsum(pieces)[:-1], axis=1):
            logits, state = extend(piece, state)
            outputs.append(logits)
        assert_close(jnp.concatenate(outputs, axis=1), call(IDS), name=str(pieces))


def test_last_only_is_the_last_of_all(model, extend):
    whole, expected = extend(IDS, model.init_state(2, 9))
    last, state = extend(IDS, model.init_state(2, 9), last_only=True)
    assert last.shape == (2, 1, 24)
    assert_close(last, whole[:, -1:])
    assert jax.tree.all(jax.tree.map(np.allclose, state, expected))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "mamba"},
        {"pattern": "attn/mlp"},
        {"pattern": "mamba attn/mlp"},
        {"pattern": "attn -/mlp", "attn": zoo.AttentionConfig(n_heads=2, position="alibi", window=4)},
        {"pattern": "attn", "attn": zoo.AttentionConfig(n_heads=2, position="none")},
    ],
    ids=lambda options: options["pattern"],
)
def test_a_token_changes_its_own_logits_and_later_ones_alone(options):
    model = make_model(**options)
    ids = jnp.tile(IDS[:1], (10, 1))
    ids = ids.at[jnp.arange(9), jnp.arange(9)].add(1) % 17  # row t differs from the last row in token t
    logits = np.asarray(jax.jit(model)(ids))
    change = np.abs(logits[:9] - logits[9]).max(axis=-1)
    assert np.all(np.diag(change) > 1e-3)
    assert np.all(np.tril(change, -1) < 1e-6)


def test_dropout_needs_rngs():
    model = make_model(dropout=0.5, pattern="-/mlp")
    run = jax.jit(lambda ids, key=None: model(ids, rngs=None if key is None else nnx.Rngs(dropout=key)))
    assert np.array_equal(run(IDS, jax.random.key(0)), run(IDS, jax.random.key(0)))
    assert not np.allclose(run(IDS, jax.random.key(0)), run(IDS), atol=1e-2)


def flops(length, **options):
    model = make_model(n_layers=1, d_model=32, **options)
    lowered = jax.jit(model).lower(jnp.zeros((1, length), int))
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_flops_of_mamba_double_with_the_length():
    def mamba(length):
        # XLA counts the body of a loop once, so take the whole row as one chunk.
        config = ssm.MambaConfig(chunk_size=length, implementation="associative")
        return flops(length, pattern="mamba", mamba=config)

    assert mamba(512) < 2.25 * mamba(256)


def test_flops_of_attention_have_a_part_that_quadruples():
    # XLA counts the body of a loop once, so take all scores at once.
    dense = {"pattern": "attn/mlp", "attn": zoo.AttentionConfig(implementation="dense")}
    f = {length: flops(length, **dense) for length in (128, 256, 512)}
    quadratic = [f[2 * length] - 2 * f[length] for length in (128, 256)]  # a l + b l^2 -> 2 b l^2
    assert quadratic[0] > 0.2 * f[128]
    assert 3.8 < quadratic[1] / quadratic[0] < 4.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": -1}, "vocab_size=-1, expected at least 0"),
        ({"pad_vocab_multiple": 0}, "pad_vocab_multiple=0, expected at least 1"),
        ({"pattern": "attn", "causal": False}, "causal=False, but a causal language model predicts from earlier"),
        ({"pattern": "manba"}, "unknown mixer 'manba', did you mean 'mamba'"),
    ],
)
def test_config_errors_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.CausalLMConfig(**options)


def test_a_model_needs_to_know_its_vocabulary():
    with pytest.raises(ValueError, match="vocab_size=0, expected the number of token ids before a model is built"):
        zoo.CausalLM(zoo.CausalLMConfig(), rngs=nnx.Rngs(0))
