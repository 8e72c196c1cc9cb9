"""Bottlenecks beside and behind mixers: nothing at first, then what their formula says, in every pass alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters

CONFIG = zoo.BackboneConfig(
    d_model=8,
    n_layers=2,
    pattern="mamba attn/mlp",
    mamba=ssm.MambaConfig(d_state=4, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    dtype="float64",
    param_dtype="float64",
)
AUGMENTED = dataclasses.replace(CONFIG, shortcut_rank=3, adapter_width=2)


@pytest.mark.slow
def test_a_fresh_one_changes_nothing(x64):
    x = normal(jax.random.key(0), 2, 5, 8)
    plain, augmented = zoo.Backbone(CONFIG, rngs=0), zoo.Backbone(AUGMENTED, rngs=0)
    for one, other in zip(plain.layers, augmented.layers, strict=True):
        other.mixer, other.mlp = one.mixer, one.mlp
    assert plain.layers[0].shortcut is None
    assert_close(augmented(x), plain(x))


def test_one_maps_what_the_mixer_reads_the_other_what_it_gives(x64):
    backbone, x = with_random_parameters(lambda: zoo.Backbone(AUGMENTED, rngs=0)), normal(jax.random.key(0), 2, 5, 8)
    block = backbone.layers[0]
    read = np.asarray(block.norm(x))

    def bottleneck(module, x):
        return np.asarray(jax.nn.gelu(x @ module.down_proj.kernel[...])) @ np.asarray(module.up_proj.kernel[...])

    given = np.asarray(block.mixer(jnp.asarray(read))) + bottleneck(block.shortcut, read)
    assert_close(block(x), x + given + bottleneck(block.adapter, given))


@pytest.mark.slow
def test_steps_give_what_the_whole_does(x64):
    backbone, x = with_random_parameters(lambda: zoo.Backbone(AUGMENTED, rngs=0)), normal(jax.random.key(0), 2, 5, 8)
    first, state = backbone.extend(x[:, :3], backbone.init_state(2, 5))
    second, _ = backbone.extend(x[:, 3:], state)
    assert_close(jnp.concatenate([first, second], 1), backbone(x))


@pytest.mark.parametrize("name", ["shortcut_rank", "adapter_width"])
def test_a_width_below_1(name):
    with pytest.raises(ValueError, match=f"{name}=0, expected None or at least 1"):
        dataclasses.replace(CONFIG, **{name: 0})
