"""What cannot be computed is refused before anything is: rows too long for a state, numbers that are none, no rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo

pytestmark = pytest.mark.usefixtures("unchecked")

D_MODEL = 8
SMALL = {
    "d_model": D_MODEL,
    "n_layers": 1,
    "mamba": ssm.MambaConfig(d_state=4, dt_rank=2),
    "mamba2": ssm.Mamba2Config(d_state=4, head_dim=4),
    "mamba3": ssm.Mamba3Config(d_state=4, head_dim=4),
    "vim": ssm.MambaConfig(d_state=4, dt_rank=2),
    "attn": zoo.AttentionConfig(n_heads=2),
    "m2": m2.M2Config(l_max=6, filter=m2.HyenaFilterConfig(order=4)),
    "linear_attn": ssm.LinearAttentionConfig(n_heads=2),
}


def make_attention(**options):
    return zoo.Attention(D_MODEL, zoo.AttentionConfig(n_heads=2, **options), rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_row_that_outgrows_attentions_cache_is_refused():
    attention, x = make_attention(), jnp.zeros((1, 8, D_MODEL))
    message = r"8 positions, expected at most max_len=4, which the state was made for"
    with pytest.raises(ValueError, match=message):
        attention.extend(x, attention.init_state(1, 4))
    with pytest.raises(ValueError, match=message):  # shapes say it under jit as well
        jax.eval_shape(attention.extend, x, attention.init_state(1, 4))
    _, state = attention.extend(x[:, :3], attention.init_state(1, 4))
    with pytest.raises(ValueError, match=r"5 positions, expected at most max_len=4"):
        attention.extend(x[:, :2], state)
    attention.extend(x[:, :1], state)
    mask = jnp.arange(8)[None] >= 5  # three are there
    attention.extend(x, attention.init_state(1, 4), mask=mask)
    with pytest.raises(ValueError, match=r"6 positions, expected at most max_len=4"):
        attention.extend(x, state, mask=mask)
    near = make_attention(window=3)
    near.extend(x, near.init_state(1, 4))
    with pytest.raises(ValueError, match=r"8 positions, expected at most max_len=2"):
        near.extend(x, near.init_state(1, 2))


@pytest.mark.slow
def test_a_row_that_outgrows_the_long_filter_is_refused():
    mixer, x = m2.M2Mixer(D_MODEL, SMALL["m2"], rngs=nnx.Rngs(0)), jnp.zeros((1, 8, D_MODEL))
    with pytest.raises(ValueError, match=r"8 positions, expected at most max_len=6, which the state was made for"):
        jax.eval_shape(mixer.extend, x, mixer.init_state(1))
    _, state = mixer.extend(x[:, :4], mixer.init_state(1))
    with pytest.raises(ValueError, match=r"7 positions, expected at most max_len=6"):
        mixer.extend(x[:, :3], state)
    mixer.extend(x[:, :2], state)


def test_generation_beyond_what_the_model_has_positions_for_is_refused_before_it_starts():
    model = zoo.CausalLM(zoo.CausalLMConfig(vocab_size=9, pattern="m2", **SMALL), rngs=0)
    message = r"a prompt of 3 tokens and max_new_tokens=4, 7 positions: max_len=7, expected at most l_max=6"
    for generate in (zoo.generate, zoo.generate_stream):
        with pytest.raises(ValueError, match=message):
            generate(model, [[1, 2, 3]], 4)
    for wrong in (2.5, 0, "4"):
        with pytest.raises(ValueError, match=r"max_new_tokens=.*, expected at least 1"):
            zoo.generate(model, [[1]], wrong)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e-45, "1"])
def test_numbers_that_sampling_cannot_count_with_are_refused(name, value):
    if (name, value) in {("top_p", 1e-45), ("min_p", 1e-45)}:  # the most likely token alone, and next to all of them
        zoo.Sampling(**{name: value})
        return
    with pytest.raises(ValueError, match=f"{name}={value!r}, expected"):
        zoo.Sampling(**{name: value})


def test_the_least_temperature_and_the_extreme_penalties_draw_tokens_of_the_vocabulary():
    model = zoo.CausalLM(zoo.CausalLMConfig(vocab_size=9, pattern="mamba", **SMALL), rngs=0)
    # The padding rows, 9 to 15, would win every draw.
    kernel = model.embedding.embedding
    kernel[...] = kernel[...].at[9:].set(100.0)
    sharp = zoo.Sampling(temperature=1e-6)
    tokens = zoo.generate(model, [[1, 2]], 6, sampling=sharp, key=jax.random.key(0))
    np.testing.assert_array_equal(tokens, zoo.generate(model, [[1, 2]], 6))
    for penalty in (1e-6, 1e6):
        drawn = zoo.Sampling(temperature=5.0, top_k=50, min_p=0.0, repetition_penalty=penalty)
        assert np.all(np.asarray(zoo.generate(model, [[1, 2]], 6, sampling=drawn, key=jax.random.key(0))) < 9)
    with pytest.raises(ValueError, match=r"top_k=2\.5, expected an integer"):
        zoo.Sampling(top_k=2.5)


OTHERS = [
    pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("mamba", "mamba3", "attn", "linear_attn", "mamba/mlp")
]


_COSTLY = ("mamba2", "-/monarch", "vim", "mamba2, both ways")


@pytest.mark.parametrize(
    "pattern",
    [
        *("m2", "mamba2+attn/moe", "m2, both ways"),
        *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in _COSTLY),
        *OTHERS,
    ],
)
def test_no_rows_and_no_positions_give_empty_results(pattern):
    pattern, both, _ = pattern.partition(",")
    causal = not both and pattern != "vim"
    backbone = zoo.Backbone(zoo.BackboneConfig(pattern=pattern, causal=causal, **SMALL), rngs=0)
    mixer = backbone.layers[0].mixer or backbone.layers[0].mlp
    for b, l in ((2, 0), (0, 3), (0, 0)):
        x, positions = jnp.zeros((b, l, D_MODEL)), {"mask": jnp.ones((b, l), bool)}
        calls = [lambda **given: backbone(x, **given), lambda **given: mixer(x, **given)]  # noqa: B023
        if pattern.startswith("-"):
            calls.pop()
            assert mixer(x).shape == x.shape
        else:
            positions["segment_ids"] = jnp.zeros((b, l), int)
        if causal and not pattern.startswith("-"):
            for part in (backbone, mixer):
                state = part.init_state(b, 4)
                for given in ({}, positions):
                    y, after = part.extend(x, state, **given)
                    assert y.shape == x.shape
                    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        for call in calls:
            for given in ({}, positions):
                assert call(**given).shape == x.shape
    assert len(backbone.hidden_states(jnp.zeros((0, 3, D_MODEL)))) == 2


@pytest.mark.parametrize("pool", ["first", "mean", "last", "attention"])
def test_models_give_nothing_for_no_rows_and_no_vector_for_a_row_of_nothing(pool):
    options = SMALL | {"pattern": "attn/mlp", "vocab_size": 9, "max_len": 4}
    model = zoo.SequenceClassifier(zoo.SequenceClassifierConfig(pool=pool, **options), rngs=0)
    assert model(jnp.zeros((0, 3), int)).shape == (0, 2)
    for mask in (None, jnp.ones((2, 0), bool)):
        with pytest.raises(ValueError, match=r"x has shape \(2, 0, 8\), expected \(b, l, d\) with at least one"):
            model(jnp.zeros((2, 0), int), mask)
    assert zoo.MaskedLM(zoo.MaskedLMConfig(**options), rngs=0)(jnp.zeros((2, 0), int)).shape == (2, 0, 16)


def test_no_images_have_no_classes():
    options = {"d_model": D_MODEL, "n_layers": 1, "image_size": 8, "patch_size": 4, "n_classes": 3}
    model = zoo.ImageClassifier(zoo.ImageClassifierConfig(**options), rngs=0)
    assert model(jnp.zeros((0, 8, 8, 3))).shape == (0, 3)
