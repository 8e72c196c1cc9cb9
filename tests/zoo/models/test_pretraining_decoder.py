"""Blocks that help an encoder to learn: nothing outside of training, in it what they see grows from block to block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from experiments.encoders.masked_loss import masked_loss
from tests.numerics import assert_close, normal, with_random_parameters

PLAIN = zoo.MaskedLMConfig(
    vocab_size=16,
    d_model=8,
    n_layers=1,
    pattern="attn/mlp",
    max_len=8,
    attn=zoo.AttentionConfig(n_heads=2, position="none", bias=True),
    mlp=zoo.MLPConfig(d_ff=8, gated=False, activation="gelu", bias=True),
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
)
CONFIG = dataclasses.replace(PLAIN, decoder_layers=2, decoder_pattern="mamba attn/mlp")
BATCH = {
    "tokens": jnp.arange(12).reshape(2, 6),
    "mask": jnp.arange(6)[None] < jnp.array([[6], [4]]),
    "positions": jnp.array([[1, 4], [3, 0]]),
    "targets": jnp.array([[3, 5], [7, 0]]),
    "weights": jnp.array([[1.0, 1.0], [1.0, 0.0]]),
}


@pytest.mark.slow
def test_outside_of_training_it_is_the_model_without():
    plain, model = zoo.MaskedLM(PLAIN, rngs=0), zoo.MaskedLM(CONFIG, rngs=0)
    assert plain.decoder is None
    assert_close(model(BATCH["tokens"], BATCH["mask"]), plain(BATCH["tokens"], BATCH["mask"]))
    assert_close(masked_loss(model, BATCH, None), masked_loss(plain, BATCH, None))


def test_in_training_a_share_of_0_is_the_model_without():
    plain = zoo.MaskedLM(PLAIN, rngs=0)
    losses = [
        masked_loss(zoo.MaskedLM(dataclasses.replace(CONFIG, decoder_share=share), rngs=0), BATCH, nnx.Rngs(dropout=0))
        for share in (0.0, 1.0)
    ]
    expected = masked_loss(plain, BATCH, nnx.Rngs(dropout=0))
    assert_close(losses[0].total, expected.total)
    assert jnp.abs(losses[1].total - expected.total) > 1e-4


@pytest.mark.slow
def test_each_block_sees_a_row_of_what_is_not_to_be_guessed_and_some_of_the_rest(x64):
    config = zoo.BackboneConfig(
        d_model=8,
        n_layers=2,
        pattern="attn attn/mlp",
        causal=False,
        attn=PLAIN.attn,
        mlp=PLAIN.mlp,
        dtype="float64",
        param_dtype="float64",
    )
    decoder = with_random_parameters(lambda: zoo.PretrainingDecoder(config, share=1.0, rngs=0))
    x, guessed = normal(jax.random.key(0), 1, 12, 8), jnp.arange(12)[None] % 3 > 0
    mask = jnp.arange(12)[None] < 11
    y, _ = decoder(x, guessed, mask=mask, rngs=nnx.Rngs(dropout=3))
    chance = np.asarray(jax.random.uniform(nnx.Rngs(dropout=3).dropout(), guessed.shape))[0]
    expected = x
    for i, block in enumerate(decoder.blocks):
        seen = np.flatnonzero(np.asarray(mask[0]) & (~np.asarray(guessed[0]) | (chance < (i + 1) / 2)))
        assert len(seen) == (11 if i else len(seen))
        expected = expected.at[:, seen].set(block(expected[:, seen]))
    assert_close(y[:, :11], decoder.norm_f(expected)[:, :11])


def test_our_layout_keeps_it_and_others_leave_it_out(tmp_path):
    model = zoo.MaskedLM(dataclasses.replace(CONFIG, decoder_pattern=None), rngs=0)
    zoo.save_pretrained(model, tmp_path / "native")
    native = zoo.from_pretrained(tmp_path / "native", kind=zoo.MaskedLM)
    assert_close(nnx.to_pure_dict(nnx.state(native)), nnx.to_pure_dict(nnx.state(model)))
    zoo.save_pretrained(model, tmp_path / "bert", layout="transformers")
    published = zoo.from_pretrained(tmp_path / "bert", kind=zoo.MaskedLM)
    assert published.config.decoder_layers == 0
    assert_close(published(BATCH["tokens"]), model(BATCH["tokens"]))


def test_a_trained_encoder_is_given_one_and_keeps_its_own():
    plain = zoo.MaskedLM(PLAIN, rngs=0)
    model = zoo.with_head(plain, zoo.MaskedLMConfig, decoder_layers=1, rngs=1)
    again = zoo.with_head(model, zoo.MaskedLMConfig, dropout=0.1, rngs=2)
    assert_close(model(BATCH["tokens"]), plain(BATCH["tokens"]))
    assert_close(*(nnx.to_pure_dict(nnx.state(m.decoder)) for m in (again, model)))
    assert zoo.with_head(model, zoo.SequenceClassifierConfig, rngs=0).config.n_labels == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_layers": -1}, "decoder_layers=-1, expected at least 0"),
        ({"decoder_share": 1.5}, "decoder_share=1.5, expected 0 to 1"),
        ({"decoder_layers": 0}, "decoder_pattern='mamba attn/mlp' with decoder_layers=0"),
        ({"decoder_layers": 1}, "has 2 blocks, more than n_layers=1"),
    ],
)
def test_options_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
