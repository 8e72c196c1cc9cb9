"""Attention in which some positions also see some that lie behind them: the modality-mutual mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters
from zoo.layers import block_attention, reference
from zoo.layers.seen import Positions
from zoo.layers.softmax_attention import softmax_attention


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("way", [{"implementation": "dense"}, {"implementation": "blocks", "block_size": 4}])
def test_a_query_that_looks_ahead_sees_what_is_seen_ahead(x64, way, window):
    rng = np.random.default_rng(0)
    there, ahead = rng.random((2, 13)) > 0.2, rng.integers(0, 3, (2, 13))
    index, segments = np.cumsum(there, axis=1) - 1, np.cumsum(rng.random((2, 13)) < 0.1, axis=1)
    q, k, v, weight = (normal(key, 2, 13, 2, 4) for key in jax.random.split(jax.random.key(0), 4))
    segments, ahead = (jnp.asarray(x, jnp.int32) for x in (segments, ahead))
    at = [Positions(jnp.asarray(x, jnp.int32), segments, ahead) for x in (index, np.where(there, index, -1))]

    def both(attention, **more):
        def loss(*x):
            y = attention(*x, *at, causal=True, window=window, **more)
            return jnp.sum(weight * y), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert_close(both(softmax_attention, **way), both(reference.softmax_attention), gradient=True, name=str(way))


def test_blocks_behind_are_visited_where_somebody_looks():
    index, ahead = jnp.arange(16, dtype=jnp.int32)[None], jnp.asarray([[1] * 4 + [0] * 4 + [2] * 4 + [0] * 4])
    numbers = block_attention.Pairs(index, index, None, None, ahead, ahead)
    rule = block_attention.Rule(causal=True, window=None, scale=1.0, hides=True, block_size=4)
    first, last = block_attention._visited(numbers, (4, 4), rule, 2, True)
    assert list(zip(first[0].tolist(), last[0].tolist(), strict=True)) == [(0, 3), (0, 2), (0, 3), (0, 4)]


MIXERS = {"attn": zoo.AttentionConfig(n_heads=2), "mamba2": ssm.Mamba2Config(head_dim=8, d_state=4)}
SHAPE = {"d_model": 16, "n_layers": 2, "vocab_size": 20, **MIXERS}
IDS = jnp.arange(1, 10).reshape(1, 9) % 7
AHEAD = jnp.asarray([[0, 1, 1, 1, 0, 2, 2, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return with_random_parameters(
        lambda: zoo.CausalLM(zoo.CausalLMConfig(**SHAPE, pattern="attn/mlp"), rngs=nnx.Rngs(0))
    )


def test_what_nobody_sees_ahead_changes_nothing(model):
    run = jax.jit(lambda ahead: model(IDS, ahead=ahead))
    plain = jax.jit(model)(IDS)
    for nobody in (jnp.where(AHEAD == 1, 0, AHEAD), jnp.where(AHEAD == 2, 0, AHEAD)):
        assert_close(run(nobody), plain)
    seen = run(AHEAD)
    assert_close(seen[:, :1], plain[:, :1])  # what stands before all that look
    assert np.abs(np.asarray(seen - plain)[:, 1:]).max() > 1e-3


def test_a_prompt_that_looks_ahead_and_steps_after_it_are_the_whole(model):
    def steps(ahead):
        logits, state = model.extend(IDS[:, :7], model.init_state(1, 9), ahead=ahead[:, :7])
        parts = [logits]
        for i in (7, 8):
            logits, state = model.extend(IDS[:, i : i + 1], state)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    assert_close(jax.jit(steps)(AHEAD), jax.jit(lambda a: model(IDS, ahead=a))(AHEAD))


def test_padding_and_packing_leave_a_row_what_it_is_alone(model):
    row, gap = jnp.arange(9), jnp.asarray([0, 1, 99, 2, 3, 4, 99, 5, 6, 7, 8])
    spread = jnp.where(gap == 99, 3, IDS[0][jnp.minimum(gap, 8)])[None]
    ahead = jnp.where(gap == 99, 2, AHEAD[0][jnp.minimum(gap, 8)])[None]
    run = jax.jit(lambda ids, mask, segments, ahead: model(ids, mask, segments, ahead=ahead))
    alone = jax.jit(lambda: model(IDS, ahead=AHEAD))()
    holes = run(spread, (gap != 99)[None], None, ahead)
    assert_close(holes[:, gap != 99], alone)
    twice = run(jnp.tile(IDS, (1, 2)), None, jnp.concatenate([row * 0, row * 0 + 1])[None], jnp.tile(AHEAD, (1, 2)))
    assert_close(twice, jnp.tile(alone, (1, 2, 1)))


@pytest.mark.parametrize("pattern", ["mamba2", "attn/mlp linear_attn", "mamba2+attn/mlp"])
def test_a_state_cannot_look_ahead_and_says_why(pattern):
    model = with_random_parameters(lambda: zoo.CausalLM(zoo.CausalLMConfig(**SHAPE, pattern=pattern), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"(mamba2|linear_attn), which reads from left to right: .* attention alone"):
        model(IDS, ahead=AHEAD)


def test_an_encoder_sees_everything_already():
    mixer = zoo.Attention(8, zoo.AttentionConfig(n_heads=2), causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ahead is given with causal=False"):
        mixer(jnp.zeros((1, 9, 8)), ahead=AHEAD)
