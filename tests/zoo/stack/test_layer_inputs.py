"""What is added before deeper blocks: the same as adding it there by hand, however the stack is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters

CONFIG = zoo.CausalLMConfig(
    d_model=16,
    n_layers=5,
    vocab_size=20,
    pattern="mamba2*4 attn/mlp",
    attn=zoo.AttentionConfig(n_heads=2),
    mamba2=ssm.Mamba2Config(head_dim=8, d_state=4),
)
IDS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def build(**fields):
    return with_random_parameters(lambda: zoo.CausalLM(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return build()


def groups():
    return {number: normal(jax.random.key(number), 2, 7, 16) for number in (0, 2, 3)}


def by_hand(model, added):
    x = model.embed(IDS)
    for number, block in enumerate(model.backbone.blocks):
        x = block(x + added[number] if number in added else x)
    return model.head(model.backbone.norm_f(x))


def test_they_are_added_before_their_block(model):
    def weighted(function):
        return jax.jit(jax.value_and_grad(lambda added: jnp.sum(jnp.sin(function(added)))))(groups())

    assert_close(
        weighted(lambda added: model(IDS, layer_inputs=added)),
        weighted(lambda added: by_hand(model, added)),
        gradient=True,
    )


@pytest.mark.parametrize(
    "fields", [{"scan_layers": True}, {"scan_layers": True, "remat": True, "remat_positions": 3}], ids=str
)
def test_loops_and_pieces_give_the_same(model, fields):
    other = build(**fields)
    run = jax.jit(lambda model_of, added: model_of(IDS, layer_inputs=added), static_argnums=0)
    assert_close(run(other.__call__, groups()), run(model.__call__, groups()))


def test_nothing_added_is_the_plain_model(model):
    run, plain = jax.jit(lambda added: model(IDS, layer_inputs=added)), jax.jit(model)(IDS)
    assert_close(run({}), plain)
    assert_close(run({1: jnp.zeros((2, 7, 16))}), plain)


@pytest.mark.slow
def test_absent_positions_add_nothing_and_steps_are_the_whole(model):
    mask = jnp.asarray([[False, True, True, False, True, True, True], [True] * 7])
    noise = {n: jnp.where(mask[..., None], value, jnp.nan) for n, value in groups().items()}
    ids = jnp.where(mask, IDS, 0)
    whole = jax.jit(lambda a: model(ids, mask, layer_inputs=a))(noise)
    alone = jax.jit(lambda a: model(ids[:1, [1, 2, 4, 5, 6]], layer_inputs=a))(
        {n: value[:1, jnp.asarray([1, 2, 4, 5, 6])] for n, value in groups().items()}
    )
    assert_close(whole[:1][:, mask[0]], alone)

    def steps(added):
        first, state = model.extend(
            ids[:, :5], model.init_state(2, 7), mask=mask[:, :5], layer_inputs={n: v[:, :5] for n, v in added.items()}
        )
        second, _ = model.extend(
            ids[:, 5:], state, mask=mask[:, 5:], layer_inputs={n: v[:, 5:] for n, v in added.items()}
        )
        return jnp.concatenate([first, second], axis=1)

    assert_close(jax.jit(steps)(noise)[mask], whole[mask])


def test_hidden_states_have_them_behind_their_block(model):
    added = {2: groups()[2]}
    states, plain = (jax.jit(lambda a: model.hidden_states(IDS, layer_inputs=a))(a) for a in (added, {}))
    for n in range(3):
        np.testing.assert_array_equal(states[n], plain[n])
    assert_close(states[-1], jax.jit(lambda a: model.hidden(IDS, layer_inputs=a))(added))


@pytest.mark.usefixtures("unchecked")
def test_a_block_that_there_is_not_and_another_shape_are_named(model):
    with pytest.raises(ValueError, match="layer_inputs has 5, expected numbers of blocks, 0 to 4"):
        model(IDS, layer_inputs={5: groups()[0]})
    with pytest.raises(ValueError, match=r"layer_inputs\[1\] has shape \(2, 6, 16\), expected that of x, \(2, 7, 16\)"):
        model(IDS, layer_inputs={1: groups()[0][:, :6]})
