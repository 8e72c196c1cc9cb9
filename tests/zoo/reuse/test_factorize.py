"""Maps as products of smaller ones: exact where their inputs lie in few directions, better than the plain way else."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import zoo
from tests.numerics import assert_close, jitted, with_random_parameters
from tests.zoo.reuse.models import OPTIONS, causal
from zoo.reuse.compensation import cost
from zoo.reuse.factorize import monarch_of, square_root

BATCHES = [{"ids": jnp.asarray(np.random.default_rng(1).integers(0, 11, (16, 12)))}]


def output(model, ids):
    run, params = jitted(model)
    return run(params, ids)


def attention(**options):
    attn = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "position": "none"} | options.pop("attn", {})
    fields = OPTIONS | {"attn": zoo.AttentionConfig(**attn), **options}
    config = zoo.CausalLMConfig(pattern="attn/mlp", n_layers=1, **fields)
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def built_of_its_config(model):
    return nnx.split(zoo.CausalLM(model.config, rngs=nnx.Rngs(0)))[0] == nnx.split(model)[0]


def test_heads_lose_nothing_where_their_inputs_lie_in_few_directions():
    model, ids = attention(), BATCHES[0]["ids"] % 2
    small = zoo.factorize(model, [{"ids": ids}], head_dim=2)  # two tokens are two directions
    assert small.config.attn.head_dim == 2
    assert built_of_its_config(small)
    assert_close(output(small, ids), output(model, ids), tolerance=1e-4)
    assert float(jnp.abs(output(small, ids + 5) - output(model, ids + 5)).max()) > 0.01
    wide = zoo.factorize(model, BATCHES, head_dim=4)
    assert_close(output(wide, ids + 5), output(model, ids + 5), tolerance=1e-4)


@pytest.mark.slow
def test_heads_with_linear_biases_are_products_too():
    model, ids = attention(attn={"position": "alibi"}), BATCHES[0]["ids"] % 2
    small = zoo.factorize(model, [{"ids": ids}], head_dim=2)
    assert_close(output(small, ids), output(model, ids), tolerance=1e-4)


@pytest.mark.parametrize(
    "attn",
    [
        {},
        pytest.param({"rope_interleaved": True}, marks=pytest.mark.slow),
        pytest.param({"head_dim": 12, "rope_dim": 8}, marks=pytest.mark.slow),
    ],
)
def test_rotated_pairs_that_no_query_uses_go_at_no_cost_each_heads_own(attn, tmp_path):
    """The others keep their frequencies, in the folder too, and in heads that are made narrower again."""
    model = attention(attn={"head_dim": 8, "position": "rope", "rope_base": 10.0} | attn)
    mixer, rng = model.backbone.layers[0].mixer, np.random.default_rng(3)
    p, of = (
        mixer.head_dim,
        np.arange(8).reshape(2, 4).T if "rope_interleaved" not in attn else np.arange(8).reshape(4, 2),
    )
    q = mixer.q_proj.kernel[...].reshape(8, 2, 2, p)
    v = mixer.v_proj.kernel[...]
    for group, unused in enumerate(([0, 2], [1, 3])):
        q = q.at[:, group, :, of[unused].ravel()].set(0)
    mixer.q_proj.kernel[...] = q.reshape(8, -1)
    mixer.v_proj.kernel[...] = v.reshape(8, 2, p).at[:, :, p // 2 :].set(0).reshape(v.shape)  # values go by halves too
    if p > 8:
        k = mixer.k_proj.kernel[...].reshape(8, 2, p)
        mixer.k_proj.kernel[...] = k.at[:, :, 10:].set(0).reshape(8, -1)
    ids = jnp.asarray(rng.integers(0, 11, (2, 9)))
    small = zoo.factorize(model, BATCHES, head_dim=p // 2)
    assert small.backbone.layers[0].mixer.rope_index[...].tolist() == [[1, 3], [0, 2]]
    assert built_of_its_config(small)
    assert_close(output(small, ids), output(model, ids), tolerance=1e-4)
    zoo.save_pretrained(small, tmp_path)
    assert jnp.array_equal(output(zoo.from_pretrained(tmp_path), ids), output(small, ids))
    if not attn:
        one = zoo.factorize(small, BATCHES, head_dim=2)
        assert set(np.asarray(one.backbone.layers[0].mixer.rope_index[...])[0].tolist()) < {1, 3}
        with pytest.raises(ValueError, match="rope_pairs=4 cannot be written in the transformers layout"):
            zoo.save_pretrained(small, tmp_path / "other", layout="transformers")


@pytest.mark.slow
def test_channel_mixers_become_monarch_and_lose_nothing_where_blocks_see_one_direction():
    model = attention(mlp=zoo.MLPConfig(d_ff=16, out_bias=True))
    ids = jnp.full((2, 7), 3)
    small = zoo.factorize(model, [{"ids": ids}], n_blocks=4)
    assert small.config.pattern == "attn/monarch"
    assert isinstance(small.backbone.layers[0].mlp.wo, m2.MonarchLinear)
    assert built_of_its_config(small)
    assert_close(output(small, ids), output(model, ids), tolerance=1e-4)
    assert (
        sum(x.size for x in nnx.to_pure_dict(nnx.state(small.backbone.layers[0].mlp))["gated_layers"].values())
        < 16 * 16
    )


def test_a_monarch_matrix_under_moments_is_no_worse_than_the_closest_one():
    draw = np.random.default_rng(0).standard_normal
    W, mix = draw((12, 8)), draw((12, 12)) * np.linspace(0.05, 2, 12)
    H = jnp.asarray(mix @ mix.T, jnp.float32)

    def lost(w1, w2):
        dense = np.asarray(m2.monarch_to_dense(jnp.asarray(w1, jnp.float32), jnp.asarray(w2, jnp.float32))).T
        return float(cost(jnp.asarray(W - dense, jnp.float32), H))

    plain = m2.project_to_monarch(jnp.asarray(W.T, jnp.float32), 2, hidden=8)
    assert lost(*monarch_of(W, np.asarray(H), 2)) < 0.9 * lost(*plain)
    C, inverse = square_root(np.asarray(H))
    np.testing.assert_allclose(C @ C, H, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(C @ inverse, np.eye(12), atol=1e-4)


@pytest.mark.slow
def test_hidden_channels_go_as_in_pruning():
    model = causal("mamba2/mlp")
    by_both = (zoo.factorize(model, BATCHES, d_ff=4), zoo.prune(model, BATCHES, d_ff=4))
    assert_close(*(output(one, BATCHES[0]["ids"]) for one in by_both), tolerance=0.0)


def test_what_cannot_be_factorised_is_said():
    model = causal("attn/mlp")
    for options, message in (
        ({}, "expected one of head_dim, n_blocks and d_ff"),
        ({"head_dim": 3}, "of which 3 channels would be rotated as 4 of 4 are, expected an even number"),
        ({"n_blocks": 3}, "n_blocks=3 must divide d_model=8"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.factorize(model, BATCHES, **options)
    with pytest.raises(ValueError, match="has no attention"):
        zoo.factorize(causal("mamba/mlp"), BATCHES, head_dim=2)
    with pytest.raises(ValueError, match="expected mlp as its only channel mixer"):
        zoo.factorize(causal("m2/monarch"), BATCHES, n_blocks=2)
    with pytest.raises(ValueError, match="head_dim=5, expected 1 to the model's 4"):
        zoo.factorize(attention(), BATCHES, head_dim=5)
