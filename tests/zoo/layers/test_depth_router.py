"""Which positions a router keeps: the best of each document, as many as its capacity says, and what foretells them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, make_positions, normal, with_random_parameters
from zoo.layers.depth_router import kept_positions, share


def kept_by_loops(scores, capacity, mask, segment_ids, skippable):
    kept = np.zeros(scores.shape, bool)
    for row in range(len(scores)):
        starts = [0, *(np.flatnonzero(np.diff(segment_ids[row])) + 1), scores.shape[1]]
        for first, end in itertools.pairwise(starts):
            among = [i for i in range(first, end) if mask[row, i] and skippable[row, i]]
            best = sorted(among, key=lambda i: (-scores[row, i], i))[: int(capacity * len(among) + 1e-9)]
            kept[row, best] = True
    return kept | (mask & ~skippable)


@pytest.mark.parametrize(("length", "capacity"), [(1, 0.7), (63, 1.0), (100, 0.125)])
def test_keeps_the_best_of_each_document_as_loops_do(length, capacity):
    positions = {name: np.asarray(value) for name, value in make_positions(length).items()}
    random = np.random.default_rng(length)
    scores = random.integers(0, 9, (2, length)).astype(np.float32)  # many are equal: the first are kept
    skippable = random.random((2, length)) < 0.8
    given = {name: jnp.asarray(value) for name, value in positions.items()} | {"skippable": jnp.asarray(skippable)}
    kept = kept_positions(jnp.asarray(scores), capacity, **given)
    np.testing.assert_array_equal(kept, kept_by_loops(scores, capacity, **positions, skippable=skippable))


def test_a_share_is_exact_where_floats_are_not():
    assert int(0.29 * 100) == 28
    assert share(0.29, 100) == 29
    assert share(0.9999, 2**30) == 2**30 * 9999 // 10000
    n = np.arange(2000, dtype=np.int32)
    np.testing.assert_array_equal(share(0.3333, jnp.asarray(n)), n * 3333 // 10000)


@pytest.mark.parametrize(("gate", "expected"), [("linear", -1.5), ("sigmoid", 0.18242552), ("tanh", 0.81897035)])
def test_what_a_block_counts(gate, expected):
    router = zoo.DepthRouter(4, zoo.MoDConfig(gate=gate), capacity=0.5, causal=False, rngs=0)
    assert_close(router.weights(jnp.array([[-1.5]])), jnp.array([[expected]]))


@pytest.mark.parametrize("decides", ["predictor", "router"])
def test_the_loss_is_the_cross_entropy_of_what_decides_and_moves_that_alone(decides):
    config = zoo.MoDConfig(decides=decides, weight=1.0)
    router = with_random_parameters(lambda: zoo.DepthRouter(4, config, capacity=0.5, causal=True, rngs=0))
    x, mask = normal(jax.random.key(0), 2, 6, 4), jnp.arange(6)[None] < jnp.array([[6], [4]])
    kept = router.choose(x, mask=mask)
    graphdef, params = nnx.split(router)

    def loss(params, x):
        return nnx.merge(graphdef, params).loss(x, kept, mask=mask)

    logits = router.scores(x)
    if decides == "predictor":
        hidden = jax.nn.gelu(x @ router.hidden.kernel[...] + router.hidden.bias[...])
        logits = (hidden @ router.decision.kernel[...] + router.decision.bias[...])[..., 0]
    chance = jax.nn.sigmoid(jnp.where(kept, logits, -logits))
    assert_close(loss(params, x), -jnp.sum(jnp.where(mask, jnp.log(chance), 0)) / 10)
    ours, theirs = jax.grad(loss, (0, 1))(params, x)
    assert not jnp.any(theirs)
    assert bool(jnp.any(ours.score.kernel[...])) == (decides == "router")
    np.testing.assert_array_equal(router.foretell(x, mask=mask), (logits > 0) & mask)


def test_one_that_sees_all_foretells_nothing():
    for options in ({"causal": False}, {"causal": True, "config": zoo.MoDConfig(decides="top_k")}):
        router = zoo.DepthRouter(4, capacity=0.5, rngs=0, **options)
        assert not router.has_auxiliary_loss
        assert router.hidden is None
        assert router.loss(jnp.ones((1, 2, 4)), jnp.ones((1, 2), bool)) == 0


@pytest.mark.parametrize("capacity", [0.0, 1.5, 0.33333])
def test_a_capacity_that_is_none(capacity):
    with pytest.raises(ValueError, match=r"more than 0, at most 1, in steps of 0\.0001"):
        zoo.DepthRouter(4, capacity=capacity, causal=False, rngs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "relu"}, "gate='relu', expected one of linear"),
        ({"decides": "chance"}, "decides='chance'"),
        ({"weighs": "all"}, "weighs='all'"),
        ({"predictor_width": 0}, "predictor_width=0"),
        ({"weight": -1.0}, "weight=-1.0"),
    ],
)
def test_options_that_are_none(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.MoDConfig(**options)
