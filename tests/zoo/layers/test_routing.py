"""Routing: the chosen experts and what they count, and the auxiliary losses, against the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import assert_close, normal
from zoo.layers.routing import balance_loss, choose, z_loss

N_EXPERTS = 4


def make_mask(length=6):
    mask = np.ones((2, length), bool)
    mask[0, -2:] = mask[1, 0] = False
    return jnp.asarray(mask)


def test_renormalised_is_the_softmax_of_the_chosen_logits_and_ties_go_to_the_first(x64):
    logits = normal(jax.random.key(0), 7, 6)
    experts, weights = choose(logits, 3, "renormalised")
    exponentials = np.exp(logits)
    over_all = exponentials / exponentials.sum(axis=1, keepdims=True)
    order = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, :3]
    assert np.array_equal(experts, order)
    for of_all in (over_all, exponentials):  # Mixtral's and Granite's
        chosen = np.take_along_axis(of_all, order, axis=1)
        assert_close(weights, jnp.asarray(chosen / chosen.sum(axis=1, keepdims=True)))
    assert_close(choose(logits, 3, "softmax")[1], jnp.asarray(np.take_along_axis(over_all, order, axis=1)))
    assert choose(jnp.zeros(6), 3, "unit")[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_auxiliary_losses_are_the_published_formulas(x64, top_k, masked):
    logits = np.asarray(normal(jax.random.key(0), 2, 6, N_EXPERTS))
    mask = make_mask() if masked else None
    there = np.ones((2, 6), bool) if mask is None else np.asarray(mask)
    experts, _ = choose(jnp.asarray(logits), top_k)
    frequency, probability, squares = np.zeros(N_EXPERTS), np.zeros(N_EXPERTS), 0.0
    for position in zip(*np.nonzero(there), strict=True):
        frequency[np.argsort(-logits[position])[:top_k]] += 1 / there.sum()
        probability += np.exp(logits[position]) / np.exp(logits[position]).sum() / there.sum()
        squares += np.log(np.exp(logits[position]).sum()) ** 2 / there.sum()
    assert_close(balance_loss(jnp.asarray(logits), experts, mask), jnp.asarray(N_EXPERTS * frequency @ probability))
    assert_close(z_loss(jnp.asarray(logits), mask), jnp.asarray(squares))


def test_the_balance_loss_is_least_where_all_experts_have_as_much_to_do():
    @jax.jit
    def loss(logits, mask):
        return balance_loss(logits, choose(logits, 1)[0], mask), z_loss(logits, mask)

    even, all_there = jnp.log(jnp.eye(4) * 1e4 + 1), jnp.ones(4, bool)
    assert abs(loss(even, all_there)[0] - 1) < 1e-6
    assert loss(even.at[1].set(even[0]), all_there)[0] > 1.4
    assert loss(even, ~all_there) == (0, 0)
