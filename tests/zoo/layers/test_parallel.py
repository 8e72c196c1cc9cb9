"""Mixers side by side: a sum of what each does alone, from the whole row or from a state."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, make_positions, normal, with_random_parameters

OPTIONS = {"d_model": 8, "n_layers": 1, "dtype": "float64", "param_dtype": "float64"}
SIZES = {
    "mamba": ssm.MambaConfig(d_state=4, dt_rank=2),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, chunk_size=4),
    "ss2d": ssm.SS2DConfig(d_state=4, dt_rank=2),
    "attn": zoo.AttentionConfig(n_heads=2),
    "mlp": zoo.MLPConfig(d_ff=12),
}


def make_backbone(**options):
    config = zoo.BackboneConfig(**OPTIONS | SIZES | options)
    return with_random_parameters(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0)))


def rms_norm(x, norm):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * norm.scale[...]


@pytest.mark.parametrize("causal", [True, False])
def test_both_read_one_normed_input_and_are_added_to_the_stream(x64, causal):
    backbone = make_backbone(pattern="mamba2+attn[window=3]/mlp", causal=causal)
    block, x, positions = backbone.layers[0], normal(jax.random.key(1), 2, 9, 8), make_positions(9)
    assert [type(m) for m in block.mixer.mixers] == [ssm.Mamba2 if causal else ssm.Bidirectional, zoo.Attention]
    assert (block.mixer.causal, block.mixer.mixers[1].config.window) == (causal, 3)
    normed = rms_norm(x, block.norm)
    first, second = (jax.jit(mixer)(normed, **positions) for mixer in block.mixer.mixers)
    assert min(jnp.abs(first).mean(), jnp.abs(second).mean()) > 1e-2
    expected = x + first + second
    expected = rms_norm(expected + block.mlp(rms_norm(expected, block.norm2)), backbone.norm_f)
    mask = positions["mask"][..., None]  # what is not there has no meaning
    assert_close(jax.jit(backbone)(x, **positions) * mask, expected * mask)


def test_extend_over_a_split_is_the_whole(x64):
    backbone, x = make_backbone(pattern="mamba+attn[window=3]+mamba/mlp"), normal(jax.random.key(1), 2, 9, 8)
    state, outputs, extend = backbone.init_state(2, 9), [], jax.jit(backbone.extend)
    assert len(state[0]) == 3
    for piece in jnp.split(x, [6, 7], axis=1):
        y, state = extend(piece, state)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), jax.jit(backbone)(x))


def test_one_that_looks_both_ways_leaves_no_state(x64):
    backbone = make_backbone(pattern="mamba+attn", causal=False)
    with pytest.raises(ValueError, match="a bidirectional mixer has no state"):
        backbone.init_state(2, 9)


def test_the_grid_of_an_image_reaches_the_mixer_that_goes_by_it(x64):
    backbone, x = make_backbone(pattern="attn+ss2d", causal=False), normal(jax.random.key(1), 2, 6, 8)
    attention, scans = backbone.layers[0].mixer.mixers
    normed = rms_norm(x, backbone.layers[0].norm)
    mixed = jax.jit(lambda x: attention(x) + scans(x, grid=(2, 3)))(normed)
    y = jax.jit(lambda x: backbone(x, grid=(2, 3)))(x)
    assert_close(y, rms_norm(x + mixed, backbone.norm_f))
    with pytest.raises(ValueError, match=r"mixes images, expected grid=\(rows, columns\)"):
        backbone(x)
