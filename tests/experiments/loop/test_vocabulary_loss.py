import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from experiments.loop import vocabulary_loss as module
from experiments.loop.cross_entropy import counted, cross_entropy
from experiments.loop.vocabulary_loss import parts, vocabulary_loss

D, V, N = 5, 13, 11  # two columns pad the vocabulary


def plain(head, hidden, targets, weights, n_targets):
    """All at once."""
    logits = head(counted(hidden, weights))
    hits = jnp.argmax(logits[..., :n_targets], axis=-1) == targets
    return jnp.sum(cross_entropy(logits, targets, weights, n_targets)), jnp.sum(hits * weights)


def example(rows, positions, dtype=np.float64):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(rows, positions, D)).astype(dtype)
    weights = random.uniform(0.5, 2, size=(rows, positions)).astype(dtype) * (random.random((rows, positions)) < 0.7)
    targets = np.where(weights, random.integers(N, size=weights.shape), -7)
    parameters = {"w": random.normal(size=(D, V)).astype(dtype), "b": random.normal(size=V).astype(dtype)}
    return parameters, hidden, targets, weights


@pytest.mark.parametrize(
    ("rows", "positions", "most"), [(4, 6, 4 * V), (3, 7, 4 * V), (1, 23, 5 * V), (6, 2, V), (5, 1, V), (2, 3, 10**6)]
)
@pytest.mark.usefixtures("x64")
def test_is_the_plain_loss_in_value_and_every_gradient(monkeypatch, rows, positions, most):
    monkeypatch.setattr(module, "LOGITS", most)
    parameters, hidden, targets, weights = example(rows, positions)

    def value(loss, parameters, hidden, weights):
        def head(x):
            return x @ parameters["w"] + parameters["b"]

        total, correct = loss(head, hidden, targets, weights, N)
        return 3 * total, correct

    def both(loss):
        function = jax.value_and_grad(functools.partial(value, loss), argnums=(0, 1, 2), has_aux=True)
        return jax.jit(function)(parameters, hidden, weights)

    for ours, theirs in zip(*map(jax.tree.leaves, (both(vocabulary_loss), both(plain))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_no_array_holds_all_logits_also_where_the_gradient_is_taken(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 8 * V)
    parameters, hidden, targets, weights = example(8, 16, np.float32)

    def total(loss, parameters):
        return loss(lambda x: x @ parameters["w"] + parameters["b"], hidden, targets, weights, N)[0]

    def largest(loss):
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(total, loss)))(parameters)
        return max(np.prod(v.aval.shape) for eqn in jaxprs_in_params({"": jaxpr.jaxpr}) for v in outputs(eqn))

    def outputs(jaxpr):
        for eqn in jaxpr.eqns:
            yield from eqn.outvars
            for inner in jaxprs_in_params(eqn.params):
                yield from outputs(inner)

    assert largest(plain) == hidden.shape[0] * hidden.shape[1] * V
    assert largest(vocabulary_loss) < 128 * V


def test_accumulates_in_float32_where_parameters_are_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", V)
    parameters, hidden, targets, weights = example(2, 64, np.float32)
    w = parameters["w"].astype(jnp.bfloat16)

    def gradient(loss, w):
        return jax.jit(jax.grad(lambda w: loss(lambda x: (x @ w).astype(jnp.float32), hidden, targets, weights, N)[0]))(
            w
        )

    exact = gradient(plain, w.astype(jnp.float32))
    assert gradient(vocabulary_loss, w).dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient(vocabulary_loss, w).astype(np.float32), exact, rtol=0.01, atol=0.05)


def test_a_target_that_is_none_is_refused_and_nan_where_values_are_not_known(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", V)
    parameters, hidden, targets, weights = example(2, 4, np.float32)
    targets, weights = np.where(weights, N, 0), np.maximum(weights, 1).astype(np.float32)

    def loss(targets):
        return vocabulary_loss(lambda x: x @ parameters["w"], hidden, targets, weights, N).total

    with pytest.raises(ValueError, match=f"expected 0 to {N - 1}"):
        loss(targets)
    assert np.isnan(jax.jit(loss)(targets))


def test_every_device_has_its_share_of_every_part():
    assert parts(16, 2048, 50_000) == (1, 32)
    assert parts(8, 64, 100) == (1, 1)
    assert parts(4096, 38, 30_522) == (2, 38)
    shape, names = (4, 2, 2, 1, 1), ("data", "fsdp", "sequence", "tensor", "expert")
    with jax.sharding.use_abstract_mesh(AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * 5)):
        assert parts(16, 2048, 50_000) == (1, 2)  # 2 rows of 1,024 positions on each of 16
        assert parts(16, 2 * 614, 2**20) == (1, 20)  # 614 has no divisor near: filled up
        assert parts(4096, 2, 2**22) == (32, 1)
