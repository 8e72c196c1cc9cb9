"""Gates before units: nothing changes until they are drawn, and those that the output does not need are found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, jitted, with_random_parameters
from tests.zoo.reuse.models import IDS, OPTIONS, causal
from zoo.reuse.gates import Gates, gates_of

slow = pytest.mark.slow
GROUPED = {"attn": zoo.AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=2)}
CASES = [
    ("attn/mlp", {"d_ff": 4, "n_heads": 1}),
    pytest.param("mamba/mlp", {"d_ff": 4, "n_heads": 8}, marks=slow),
    pytest.param("mamba2/monarch", {"d_ff": 4, "n_heads": 2}, marks=slow),
    pytest.param("mamba3/moe", {"d_ff": 2, "n_heads": 2}, marks=slow),
    pytest.param("linear_attn", {"n_heads": 1}, marks=slow),
]


def output(model):
    run, params = jitted(model)
    return run(params, IDS)


def without_norm(pattern):
    """A norm behind the heads sees those of a gate of 0, and not those that are gone."""
    plain = {"mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, n_groups=2, rmsnorm=False)}
    config = zoo.CausalLMConfig(pattern=pattern, n_layers=1, **OPTIONS | plain)
    return with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))


def set_all(gated, **values):
    for gates in gates_of(gated):
        for name, value in values.items():
            variable = getattr(gates, name)
            variable[...] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), variable.shape)


@pytest.mark.parametrize(("pattern", "widths"), CASES)
def test_gates_of_mean_1_change_nothing_and_one_of_0_is_the_unit_gone(pattern, widths):
    model = causal(pattern) if "mamba2" not in pattern else without_norm(pattern)
    gated = zoo.add_gates(model, **widths)
    trained = [path for path, _ in nnx.to_flat_state(nnx.state(gated, nnx.Param))]
    assert {path[-1] for path in trained} == {"mean", "log_variance"}
    assert_close(output(gated), output(model), tolerance=1e-6)
    set_all(gated, log_variance=-jnp.inf)
    zoo.draw_gates(gated, jax.random.key(0))
    assert_close(output(gated), output(model), tolerance=1e-6)  # a draw of no variance
    set_all(gated, log_variance=0.0)
    assert float(jnp.abs(output(gated) - output(model)).max()) > 1e-3
    # Units of which nothing is read: what is left is the model without them, and pruning by the scores is the same.
    set_all(gated, draw=0.0)
    scores = zoo.gate_scores(gated)
    for gates in gates_of(gated):
        n = gates.mean.shape[0]
        gates.mean[...] = jnp.arange(n) % 2.0
        assert scores[gates.width].shape == (n,)
    small = zoo.prune(model, [{"ids": IDS}], **widths, importance=zoo.gate_scores(gated), compensate=False)
    assert_close(output(small), output(gated), tolerance=2e-4)
    assert_close(output(zoo.without_gates(gated)), output(gated), tolerance=1e-6)
    assert (
        nnx.state(zoo.without_gates(gated), nnx.Param).flat_state().paths
        == nnx.state(model, nnx.Param).flat_state().paths
    )


def test_heads_of_a_group_of_keys_go_in_equal_numbers():
    config = zoo.CausalLMConfig(pattern="attn", n_layers=1, **OPTIONS | GROUPED)
    model = zoo.CausalLM(config, rngs=nnx.Rngs(0))
    scores = {"backbone.layers.0.mixer.n_heads": np.array([3.0, 2, 1, 0])}
    small = zoo.prune(model, [{"ids": IDS}], n_heads=2, importance=scores, compensate=False)
    q = model.backbone.layers[0].mixer.q_proj.kernel[...].reshape(8, 4, 2)
    assert jnp.array_equal(small.backbone.layers[0].mixer.q_proj.kernel[...].reshape(8, 2, 2), q[:, jnp.array([0, 2])])


def test_the_penalty_is_the_divergence_and_training_finds_units_that_do_nothing():
    gates = Gates("d_ff", 2)
    gates.mean[...], gates.log_variance[...] = jnp.array([2.0, 0.0]), jnp.log(jnp.array([4.0, 1.0]))
    model = nnx.Dict(gates=gates)
    np.testing.assert_allclose(zoo.gate_penalty(model), 0.5 * np.log(2), rtol=1e-6)

    whole = causal("mamba/mlp")
    mlp = whole.backbone.layers[0].mlp
    unused = jnp.arange(8) % 2 == 0
    dead = nnx.merge(*nnx.split(whole))
    dead.backbone.layers[0].mlp.down_proj.kernel = mlp.down_proj.kernel.replace(
        jnp.where(unused[:, None], 0, mlp.down_proj.kernel[...])
    )
    gated = zoo.add_gates(dead, d_ff=4)
    graphdef, params, rest = nnx.split(gated, nnx.Param, ...)
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    expected = dead(IDS)

    @jax.jit
    def step(params, state, rest, key):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            zoo.draw_gates(model, key)
            return jnp.mean((model(IDS) - expected) ** 2) + 1e-4 * zoo.gate_penalty(model)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(0), 60):
        params, state = step(params, state, rest, key)
    (scores,) = zoo.gate_scores(nnx.merge(graphdef, params, rest)).values()
    assert scores[unused].max() < scores[~unused].min()


def test_what_has_no_gates_is_said():
    model = causal("mamba/mlp")
    with pytest.raises(ValueError, match="expected d_ff or n_heads: which widths have gates"):
        zoo.add_gates(model)
    scores = {"backbone.layers.0.mlp.d_ff": np.zeros(8)}
    with pytest.raises(ValueError, match=r"importance of backbone\.layers\.0\.mlp\.d_ff, which shall not shrink"):
        zoo.prune(model, [{"ids": IDS}], n_heads=8, importance=scores)
    with pytest.raises(ValueError, match=r"is of \(3,\), expected one for each of 8"):
        zoo.prune(model, [{"ids": IDS}], d_ff=4, importance={"backbone.layers.0.mlp.d_ff": np.zeros(3)})
    with pytest.raises(ValueError, match="importance with n_layers"):
        zoo.prune(model, [{"ids": IDS}], d_ff=4, n_layers=1, importance=scores)
