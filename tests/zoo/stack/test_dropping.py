"""Encoders whose blocks go on with fewer positions: the more important ones, each a row of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters

CONFIG = zoo.BackboneConfig(
    d_model=8,
    n_layers=3,
    pattern="attn/mlp",
    causal=False,
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=8),
    dtype="float64",
    param_dtype="float64",
)
PATTERNS = ["attn/mlp", pytest.param("mamba", marks=pytest.mark.slow)]


def build(**fields):
    return with_random_parameters(lambda: zoo.Backbone(dataclasses.replace(CONFIG, **fields), rngs=0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_share_of_1_changes_nothing(x64, pattern):
    x, mask = normal(jax.random.key(0), 2, 6, 8), jnp.arange(6)[None] < jnp.array([[6], [4]])
    all_, plain = build(pattern=pattern, keep=(1.0, 1.0)), build(pattern=pattern)
    present = mask[..., None]
    assert_close(jnp.where(present, all_(x, mask=mask), 0), jnp.where(present, plain(x, mask=mask), 0))


def test_how_much_a_position_is_looked_at_is_the_sum_of_weights(x64):
    attention = with_random_parameters(
        lambda: zoo.Attention(8, zoo.AttentionConfig(n_heads=4, n_kv_heads=2), causal=False, rngs=nnx.Rngs(0))
    )
    x, mask = normal(jax.random.key(0), 2, 6, 8), jnp.arange(6)[None] < jnp.array([[6], [4]])
    q, k, _, _ = attention._project(x, jnp.arange(6)[None])
    scores = jnp.einsum("blhp,bshp->bhls", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(2)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    expected = jnp.sum(weights * mask[:, None, :, None], axis=(1, 2))
    assert_close(attention.received(x, mask=mask), expected)
    assert_close(expected.sum(axis=1), 4.0 * mask.sum(axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_block_takes_the_most_important_of_what_it_had(x64, pattern):
    backbone, x = build(pattern=pattern, keep=(0.7, 0.3)), normal(jax.random.key(0), 1, 10, 8)
    expected, here, scores = x, np.arange(10), jnp.zeros(10)
    for n, block in zip((10, 7, 3), backbone.blocks, strict=True):
        if n < 10:
            here = np.sort(here[np.argsort(-np.asarray(scores), kind="stable")[:n]])
        read = expected[:, here]
        y = block.run_all(read, positions=jnp.asarray(here)[None])[0]
        if pattern == "attn/mlp":
            scores = block.mixer.received(block.norm(read), positions=jnp.asarray(here)[None])[0]
        else:
            scores = jnp.linalg.norm(y - read, axis=-1)[0]
        expected = expected.at[:, here].set(y)
    assert_close(backbone(x), backbone.norm_f(expected))
    assert_close(backbone.hidden_states(x)[-1], backbone(x))


@pytest.mark.slow
def test_a_packed_document_goes_on_as_alone(x64):
    backbone, x = build(keep=(0.5, 0.5)), normal(jax.random.key(0), 1, 9, 8)
    mask = jnp.ones((1, 9), bool).at[0, 4].set(False)
    y = backbone(x, segment_ids=jnp.array([[4, 4, 4, 4, 4, 7, 7, 7, 7]]), mask=mask)
    assert_close(y[:, :4], backbone(x[:, :4]))
    assert_close(y[:, 5:], backbone(x[:, 5:]))


@pytest.mark.slow
def test_a_trained_encoder_is_adjusted_and_its_first_token_goes_on(tmp_path):
    shape = {"d_model": 8, "n_layers": 3, "pattern": "attn/mlp", "attn": CONFIG.attn, "vocab_size": 16, "max_len": 8}
    model = zoo.SequenceClassifier(zoo.SequenceClassifierConfig(**shape), rngs=0)
    fast = zoo.with_keep(model, (0.5, 0.25))
    ids = jnp.arange(8)[None]
    assert fast.config.keep == (0.5, 0.25)
    assert jnp.any(fast(ids) != model(ids))
    assert_close(zoo.with_keep(fast, None)(ids), model(ids))
    alone = zoo.with_keep(model, (0.0001, 0.0001)).hidden_states(ids)
    np.testing.assert_array_equal(alone[2][0, 1:], alone[1][0, 1:])
    assert jnp.any(alone[2][0, 0] != alone[1][0, 0])
    zoo.save_pretrained(fast, tmp_path)
    assert_close(zoo.from_pretrained(tmp_path, kind=zoo.SequenceClassifier)(ids), fast(ids))
    with pytest.raises(ValueError, match="keep"):
        zoo.save_pretrained(fast, tmp_path / "bert", layout="transformers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": (0.5,)}, "expected a share for each block but the last, n_layers=3"),
        ({"keep": (0.5, 0.6)}, "expected shares from 1 down to more than 0"),
        ({"keep": (1.5, 0.6)}, "expected shares from 1 down"),
        ({"keep": (0.5, 0.0)}, "expected shares from 1 down"),
        ({"keep": (0.5, 0.5), "causal": True}, "with causal=True, expected None"),
        ({"keep": (0.5, 0.5), "pattern": "attn:0.5"}, "expected blocks without a capacity"),
        ({"keep": (0.5, 0.5), "pattern": "ss2d"}, "with ss2d, which goes by rows and columns"),
    ],
)
def test_shares_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
