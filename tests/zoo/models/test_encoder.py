"""Encoders: documents packed in a row are each alone, positions are counted in each, options say what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from tests.numerics import assert_close, jitted, normal, with_random_parameters
from zoo.models.build import build
from zoo.models.encoder import document_positions

TINY = {
    "d_model": 8,
    "n_layers": 2,
    "vocab_size": 24,
    "max_len": 12,
    "mamba": ssm.MambaConfig(d_state=4, dt_rank=2),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, chunk_size=8),
    "attn": zoo.AttentionConfig(n_heads=2, position="none"),
    "mlp": zoo.MLPConfig(d_ff=12),
    "m2": M2Config(l_max=24, residual_long_conv=True, filter=HyenaFilterConfig(order=6)),
    "monarch": MonarchMLPConfig(d_ff=12, n_blocks=2),
}
ROPE, ALIBI = (zoo.AttentionConfig(n_heads=2, position=position) for position in ("rope", "alibi"))
MIXERS = {
    "attention, learned positions": {"pattern": "attn/mlp"},
    "attention, RoPE": {"pattern": "attn/mlp", "attn": ROPE, "max_len": None},
    "attention, ALiBi": {"pattern": "attn/mlp", "attn": ALIBI, "max_len": None},
    "Monarch Mixer": {"pattern": "m2/monarch", "mixer_residual": False},
    "Mamba both ways": {"pattern": "mamba", "norm_place": "pre", "norm_eps": 1e-5},
    "Mamba-2 both ways": {"pattern": "mamba2", "norm_place": "pre", "norm_eps": 1e-5},
}
ALIKE = (
    "attention, learned positions",
    "attention, ALiBi",
    "Mamba both ways",
    "Mamba-2 both ways",
)  # what they do, another does too
# Documents of rows of 20, which are longer than the 12 positions there are: of 8 and 12 tokens, and of 12 and 8.
SEGMENTS = jnp.asarray([[5] * 8 + [0] * 12, [1] * 12 + [2] * 8])
SHORT, LONG = ((0, np.s_[:8]), (1, np.s_[12:])), ((0, np.s_[8:]), (1, np.s_[:12]))
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 20)))
KINDS = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 20)))


def make(kind=zoo.MaskedLMConfig, **options):
    config = kind(**TINY | options)
    return with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))


def test_positions_are_counted_from_the_start_of_each_run():
    segment_ids = jnp.asarray([[5, 5, 5, 0, 5, 5], [1, 2, 2, 2, 2, 1]])  # an id that comes again is another run
    np.testing.assert_array_equal(document_positions(segment_ids), [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]])


def test_without_kinds_all_tokens_are_of_the_first():
    """In value and gradient, that of the kinds' vectors included."""
    graphdef, params = nnx.split(make(n_layers=1, pattern="attn", max_len=20))

    def outputs(kinds):
        def total(params):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(IDS, token_type_ids=kinds)))

        return jax.value_and_grad(total)(params)

    (value, gradient), (expected, its_gradient) = outputs(None), outputs(jnp.zeros_like(IDS))
    assert_close(value, expected)
    assert_close(gradient, its_gradient, gradient=True)
    assert jnp.any(its_gradient["encoder"]["token_type_embeddings"]["embedding"][...] != 0)


@pytest.mark.parametrize(
    "mixer", [pytest.param(mixer, marks=pytest.mark.slow) if mixer in ALIKE else mixer for mixer in MIXERS]
)
def test_packed_documents_give_what_each_gives_in_a_row_of_its_own(mixer):
    """In value and gradient, though the row is longer than there are positions."""
    graphdef, params = nnx.split(make(**MIXERS[mixer]))
    weight = normal(jax.random.key(3), 2, 20, 24, dtype=jnp.float32)

    def packed(params):
        logits = nnx.merge(graphdef, params)(IDS, None, SEGMENTS, token_type_ids=KINDS)
        return jnp.sum(logits * weight), logits

    def alone(params):
        model = nnx.merge(graphdef, params)
        logits = jnp.zeros_like(weight)
        for documents in (SHORT, LONG):
            ids, kinds = (jnp.stack([x[here] for here in documents]) for x in (IDS, KINDS))
            for here, of_one in zip(documents, model(ids, token_type_ids=kinds), strict=True):
                logits = logits.at[here].set(of_one)
        return jnp.sum(logits * weight), logits

    results = [jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (packed, alone)]
    ((_, logits), gradients), ((_, expected), expected_gradients) = results
    assert_close(logits, expected, tolerance=1e-5)
    # Gradients of parameters that cannot matter, such as a key's bias, are rounding errors: compare all as one.
    flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (gradients, expected_gradients)]
    assert_close(*flat, tolerance=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_changes_its_own_document_alone(mixer):
    call, params = jitted(make(**MIXERS[mixer]))
    before = call(params, IDS, None, SEGMENTS)
    after = call(params, IDS.at[0, 10].set((IDS[0, 10] + 1) % 24), None, SEGMENTS)
    change = np.abs(after - before).max(axis=-1)
    assert np.all(change[0, 8:] > 1e-6)
    # The long convolutions of a row are one FFT, which rounds all of it by what is in any part.
    assert change[0, :8].max() < 1e-5
    np.testing.assert_array_equal(change[1], 0)


def test_a_row_without_segments_is_one_document():
    model = make()
    with pytest.raises(ValueError, match="ids has 20 positions, expected at most max_len=12, or segment_ids"):
        model(IDS)
    call, params = jitted(model)
    assert_close(call(params, IDS[:, :12], None, jnp.full((2, 12), 3)), call(params, IDS[:, :12]))


def test_a_document_longer_than_there_are_positions_is_nan_and_not_wrong():
    call, params = jitted(make())
    logits = call(params, IDS, None, jnp.zeros((2, 20), int))
    assert np.isnan(logits).all()
    # One that is longer because of its padding is not.
    mask = jnp.arange(20)[None] < jnp.asarray([[12], [10]])
    logits = call(params, IDS, mask, jnp.zeros((2, 20), int))
    assert_close(logits[:, :10], call(params, IDS[:, :12], mask[:, :12])[:, :10])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_behind_packed_documents_changes_nothing(mixer):
    call, params = jitted(make(**MIXERS[mixer]))
    mask = jnp.ones((2, 20), bool).at[0, 15:].set(False).at[1, 17:].set(False)
    expected = call(params, IDS, mask, SEGMENTS)
    other = call(params, jnp.where(mask, IDS, 3), mask, jnp.where(mask, SEGMENTS, -1))
    assert_close(expected[0, :15], other[0, :15])
    assert_close(expected[1, :17], other[1, :17])


def test_a_table_of_positions_has_rows(unchecked):
    with pytest.raises(ValueError, match="max_len=0, expected None or at least 1"):
        zoo.EncoderConfig(max_len=0)


def test_rows_without_positions_are_empty():
    config = zoo.MaskedLMConfig(d_model=8, n_layers=1, vocab_size=16, pattern="m2/monarch", max_len=4)
    model = zoo.MaskedLM(config, rngs=nnx.Rngs(0))
    assert model(jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, 16)
