"""Cross-entropy where some targets do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.loop.cross_entropy import counted, cross_entropy
from tests.numerics import normal

LOGITS = normal(jax.random.key(0), 2, 3, 8, dtype=jnp.float32)
TARGETS, WEIGHTS = np.array([[0, 5, 2], [1, 6, 3]]), np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]], np.float32)


def test_is_that_of_optax_times_the_weights_to_the_bit():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, TARGETS) * WEIGHTS
    np.testing.assert_array_equal(cross_entropy(LOGITS, TARGETS, WEIGHTS, 7), expected)


def test_what_does_not_count_has_no_say_and_no_gradient():
    junk = LOGITS.at[:, 2].set(jnp.nan)
    targets = TARGETS.copy()
    targets[:, 2] = (-100, 99)

    @jax.jit
    def loss(x, targets):
        return jnp.sum(cross_entropy(counted(x, WEIGHTS), targets, jnp.asarray(WEIGHTS), 7))

    for a, b in zip(*(jax.value_and_grad(loss)(x, t) for x, t in ((junk, targets), (LOGITS, TARGETS))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_target_that_is_none_is_refused_and_nan_where_values_are_not_known(wrong):
    targets = TARGETS.copy()
    targets[0, 1] = wrong
    with pytest.raises(ValueError, match=rf"targets hold {min(wrong, 0)} to {max(wrong, 6)}, expected 0 to 6"):
        cross_entropy(LOGITS, targets, WEIGHTS, 7)
    nats = jax.jit(lambda targets: cross_entropy(LOGITS, targets, WEIGHTS, 7))(targets)
    np.testing.assert_array_equal(np.isnan(nats), targets == wrong)
