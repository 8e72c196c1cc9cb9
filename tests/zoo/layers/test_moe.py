"""The mixture of experts against every expert at every position, and against the published formulas."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from ssm.absent import blank
from tests.numerics import assert_close, jitted, normal, with_random_parameters
from tests.places import ROOT
from zoo.layers import reference
from zoo.layers.routing import balance_loss, choose, z_loss

D_MODEL, N_EXPERTS, D_FF = 5, 4, 3
SMALL = zoo.MoEConfig(n_experts=N_EXPERTS, d_ff=D_FF)


def make_mixture(dtype="float64", **options):
    config = dataclasses.replace(SMALL, **options)
    dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    return with_random_parameters(lambda: zoo.MoE(D_MODEL, config, **dtypes, rngs=nnx.Rngs(0)))


def make_input(length=6, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


def make_mask(length=6):
    mask = np.ones((2, length), bool)
    mask[0, -2:] = mask[1, 0] = False
    return jnp.asarray(mask)


def expert(mixture, e):
    """One expert as a dense perceptron."""
    config = mixture.config.expert()
    dtypes = {"dtype": mixture.experts.up_proj.dtype, "param_dtype": mixture.experts.up_proj.kernel.dtype}
    mlp = zoo.MLP(mixture.config.d_latent or D_MODEL, config, **dtypes, rngs=nnx.Rngs(0))
    for name in ("gate_proj", "up_proj", "down_proj"):
        stacked, dense = getattr(mixture.experts, name), getattr(mlp, name)
        if stacked is not None:
            dense.kernel.set_value(stacked.kernel[e])
            if stacked.bias is not None:
                dense.bias.set_value(stacked.bias[e])
    return mlp


def run_every_expert(mixture, x, mask=None, room=None):
    """The mixture by its twin. `room` (b l e) is False where an expert has none for a position."""
    config, x = mixture.config, blank(mask, x)
    correction = 0.0 if mixture.correction is None else jax.lax.stop_gradient(mixture.correction[...])
    groups = (config.n_groups, config.top_groups)
    logits = x @ mixture.router.kernel[...]
    counts = config.weights_scale * reference.expert_weights(logits, config.top_k, config.weights, correction, *groups)
    for allowed in (None if mask is None else mask[..., None], room):
        counts = counts if allowed is None else jnp.where(allowed, counts, 0)
    narrow = x if mixture.reduce is None else mixture.reduce(x)
    y = reference.mixture(narrow, counts, [expert(mixture, e) for e in range(config.n_experts)])
    y = y if mixture.expand is None else mixture.expand(y)
    if mixture.shared is not None:
        shared = mixture.shared(x)
        y = y + (shared if mixture.shared_gate is None else jax.nn.sigmoid(mixture.shared_gate(x)) * shared)
    return y


def value_and_gradients(function, mixture, x, *args):
    """The output, weighted at random, and its gradient in the input and every parameter."""
    graphdef, params = nnx.split(mixture)
    weight = normal(jax.random.key(2), *x.shape)

    def total(params, x):
        y = function(nnx.merge(graphdef, params), x, *args)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, x)
    return y, jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"weights": "softmax", "bias": True, "n_shared": 2, "d_ff_shared": 2, "shared_gate": True}, True),
        ({"weights": "unit", "gated": False, "activation": "gelu", "out_bias": True, "top_k": 1}, False),
        ({"weights": "softmax", "top_k": N_EXPERTS}, True),
        ({"weights": "sigmoid", "correction": True, "d_latent": 2, "bias": True}, False),
        ({"weights": "sigmoid_renormalised", "n_groups": 2, "correction": True, "weights_scale": 2.5}, True),
        ({"weights": "softmax", "n_groups": 2, "n_shared": 1}, False),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_mixture_is_every_expert_at_every_position_weighted(x64, options, masked):
    mixture, x = make_mixture(**options), make_input()
    mask = make_mask() if masked else None
    actual = value_and_gradients(lambda m, x, mask: m(x, mask=mask), mixture, x, mask)
    assert_close(actual, value_and_gradients(run_every_expert, mixture, x, mask))


@pytest.mark.parametrize("length", [1, 65])
def test_any_number_of_positions_may_choose_the_same_experts(x64, length):
    mixture, x = make_mixture(), make_input(length)
    run, params = jitted(mixture)
    expected = jax.jit(lambda x: run_every_expert(mixture, x))(x)
    assert_close(run(params, x), expected)
    params["router"]["kernel"].set_value(jnp.zeros((D_MODEL, N_EXPERTS)))  # the first two, being equal
    both = jax.jit(lambda x: (expert(mixture, 0)(x) + expert(mixture, 1)(x)) / 2)(x)
    assert_close(run(params, x), both)


@pytest.mark.parametrize("masked", [False, True])
def test_enough_capacity_drops_nothing(x64, masked):
    dropless, x = make_mixture(bias=True), make_input()
    roomy = make_mixture(bias=True, capacity_factor=N_EXPERTS / 2)
    mask = make_mask() if masked else None
    run = lambda m, x, mask: m(x, mask=mask)  # noqa: E731
    assert_close(value_and_gradients(run, roomy, x, mask), value_and_gradients(run, dropless, x, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_beyond_its_capacity_an_expert_takes_no_later_positions(x64, masked):
    length, factor = 9, 0.8
    mixture, x = make_mixture(bias=True, capacity_factor=factor), make_input(length)
    mask = make_mask(length) if masked else None
    capacity = math.ceil(factor * 2 * length / N_EXPERTS)
    counts = jax.jit(lambda x: reference.expert_weights(x @ mixture.router.kernel[...], 2, "renormalised"))(x)
    counts = np.asarray(counts)
    room, taken = np.zeros(counts.shape, bool), np.zeros((2, N_EXPERTS), int)
    for row, position, e in np.ndindex(counts.shape):
        if counts[row, position, e] > 0 and (mask is None or mask[row, position]):
            room[row, position, e] = taken[row, e] < capacity
            taken[row, e] += 1
    assert (taken > capacity).any()
    actual = value_and_gradients(lambda m, x, mask: m(x, mask=mask), mixture, x, mask)
    assert_close(actual, value_and_gradients(run_every_expert, mixture, x, mask, jnp.asarray(room)))


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_neither_padding_nor_rows_nor_what_follows_change_a_position(x64, capacity_factor):
    mixture, x = make_mixture(capacity_factor=capacity_factor), make_input(8)
    run, params = jitted(mixture)
    y = run(params, x)
    changed = x.at[1].set(9.0).at[0, 5:].set(7.0)
    assert_close(run(params, changed)[0, :5], y[0, :5])
    mask = jnp.arange(8)[None] >= jnp.array([[3], [0]])
    late = run(params, jnp.concatenate([normal(jax.random.key(5), 1, 3, D_MODEL), x[:1, :5]], axis=1), mask=mask[:1])
    assert_close(late[0, 3:], y[0, :5])


def test_the_auxiliary_losses_reach_the_router_with_their_weights(x64):
    x, mask = make_input(), make_mask()
    weights = {"balance_weight": 0.3, "z_weight": 0.2}
    mixture = make_mixture(**weights)

    def of_logits(kernel):
        logits = x @ kernel
        return 0.3 * balance_loss(logits, choose(logits, 2)[0], mask) + 0.2 * z_loss(logits, mask)

    graphdef, params = nnx.split(mixture)
    of_mixture = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graphdef, params).run(x, mask=mask)[1]))
    loss, gradient = of_mixture(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(of_logits))(mixture.router.kernel[...])
    assert_close(loss, expected)
    assert_close(gradient.router.kernel[...], expected_gradient)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.experts))


@pytest.mark.parametrize("masked", [False, True])
def test_a_correction_s_gradient_is_its_expert_s_excess(x64, masked):
    mixture, x, mask = (
        make_mixture(correction=True, correction_weight=0.5),
        make_input(),
        make_mask() if masked else None,
    )
    graphdef, params = nnx.split(mixture)
    run = jax.jit(jax.value_and_grad(lambda params, x: nnx.merge(graphdef, params).run(x, mask=mask)[1]))
    value, gradient = run(params, x)
    experts, _ = choose(x @ mixture.router.kernel[...], 2, correction=mixture.correction[...])
    there = np.ones((2, 6), bool) if mask is None else np.asarray(mask)
    often = np.bincount(np.asarray(experts)[there].ravel(), minlength=N_EXPERTS) / there.sum()
    assert_close(gradient.correction[...], jnp.asarray(0.5 * (often - 2 / N_EXPERTS)))
    mixture.config = dataclasses.replace(mixture.config, correction_weight=0.0)
    assert_close(value, jax.jit(lambda x: mixture.run(x, mask=mask)[1])(x))  # it adds nothing


def test_corrections_that_are_trained_give_all_experts_as_much_to_do():
    """By the source's rule, the sign of the gradient, with a router that prefers the first experts and stays so."""
    mixture, x = make_mixture("float32", correction=True, weights="sigmoid", top_k=1), make_input(64)
    kernel = mixture.router.kernel[...]
    mixture.router.kernel.set_value(0.2 * kernel.at[:, 0].add(jnp.sign(x.mean(axis=(0, 1)))))
    mixture.correction.set_value(jnp.zeros(N_EXPERTS))
    graphdef, params = nnx.split(mixture)

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda params: nnx.merge(graphdef, params).run(x)[1])(params).correction[...]
        logits = x @ params.router.kernel[...]
        experts, _ = choose(logits, 1, "sigmoid", correction=params.correction[...])
        return params.correction[...] - 0.004 * jnp.sign(gradient), jnp.bincount(experts.ravel(), length=N_EXPERTS)

    loads = []
    for _ in range(200):
        correction, load = step(params)
        params.correction.set_value(correction)
        loads.append(np.asarray(load))
    even = 2 * 64 / N_EXPERTS
    assert loads[0].max() > 1.8 * even
    assert np.max(loads[-10:]) < 1.25 * even


def multiplications(jaxpr) -> int:
    """Of all matrix products, those of a loop as often as it runs: XLA's cost analysis takes a loop's body once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            out, left = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
            total += math.prod(out) * math.prod(left[i] for i in contracting)
        inner = sum(map(multiplications, jax.extend.core.jaxprs_in_params(equation.params)))
        total += inner * equation.params.get("length", 1)
    return total


def test_work_grows_with_top_k_and_not_with_the_number_of_experts():
    x = jax.ShapeDtypeStruct((1, 1024, 16), jnp.float32)

    def work(n_experts, top_k, function=lambda m, x: m(x)):
        config = zoo.MoEConfig(n_experts=n_experts, top_k=top_k, d_ff=64)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.MoE(16, config, rngs=nnx.Rngs(0))))
        jaxpr = jax.make_jaxpr(lambda params, x: function(nnx.merge(graphdef, params), x))(params, x)
        return multiplications(jaxpr.jaxpr) - 1024 * 16 * n_experts  # the router

    perceptron = 1024 * 3 * 16 * 64
    assert perceptron <= work(4, 1) <= work(16, 1) < 1.6 * perceptron
    assert 2 * perceptron <= work(16, 2) < 2 * 1.6 * perceptron
    gradient = lambda m, x: jax.grad(lambda x, m: m(x).sum())(x, m)  # noqa: E731
    assert work(16, 2, gradient) < 3.1 * 2 * 1.6 * perceptron


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"gated": True, "bias": True}, None),
        ({"gated": False, "activation": "relu", "out_bias": True}, [5, 0, 3, 1, 2, 4, 7, 6]),
    ],
)
def test_a_dense_perceptron_is_the_sum_of_the_experts_it_is_cut_into(x64, options, order):
    config = zoo.MLPConfig(d_ff=8, **options)
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    mlp = with_random_parameters(lambda: zoo.MLP(D_MODEL, config, **dtypes, rngs=nnx.Rngs(0)))
    x, order = make_input(), None if order is None else jnp.array(order)
    mixture = zoo.MoE.from_dense(mlp, 4, 4, order=order)
    assert_close(jax.jit(mixture)(x), jax.jit(mlp)(x))
    units = np.arange(8) if order is None else np.asarray(order)
    gates = mlp.up_proj if mlp.gate_proj is None else mlp.gate_proj
    keys = np.asarray(gates.kernel[...])[:, units].reshape(D_MODEL, 4, 2).mean(axis=2)
    chosen = np.argmax(np.asarray(x) @ keys, axis=-1)
    busy = (units.reshape(4, 2)[chosen][..., None] == np.arange(8)).any(axis=-2)  # b l f

    def with_idle_units(x):
        up = mlp.up_proj(x)
        hidden = jax.nn.relu(up) if mlp.gate_proj is None else jax.nn.silu(mlp.gate_proj(x)) * up
        return mlp.down_proj(jnp.where(busy, hidden, 0))

    few = zoo.MoE.from_dense(mlp, 4, 1, order=order, balance_weight=0.0)
    assert few.config.balance_weight == 0
    assert_close(jax.jit(few)(x), jax.jit(with_idle_units)(x))


def test_experts_must_divide_the_perceptron_they_are_cut_from():
    mlp = zoo.MLP(D_MODEL, zoo.MLPConfig(d_ff=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="n_experts=3 must divide d_ff=8"):
        zoo.MoE.from_dense(mlp, 3, 1)


def test_bfloat16_computes_in_bfloat16_but_for_the_router():
    mixture, x = make_mixture("bfloat16", n_shared=1), make_input()
    run, params = jitted(mixture, "run")
    y, loss = run(params, x.astype(jnp.bfloat16))
    assert (y.dtype, loss.dtype) == (jnp.bfloat16, jnp.float32)
    assert mixture.router.kernel.dtype == jnp.float32
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    half = nnx.eval_shape(lambda: zoo.MoE(D_MODEL, SMALL, **dtypes, rngs=nnx.Rngs(0)))
    assert half.experts.up_proj.kernel.dtype == jnp.bfloat16
    assert half.router.kernel.dtype == jnp.float32
    run, params = jitted(make_mixture("float32", n_shared=1))
    assert_close(y, run(params, x.astype(jnp.bfloat16).astype(jnp.float32)))


def test_dropout_is_off_without_rngs_and_a_function_of_the_key_with_them():
    mixture, x = make_mixture("float32", dropout=0.5), make_input()
    run = jax.jit(lambda x, key: mixture(x, rngs=nnx.Rngs(dropout=key)))
    once, again, other = (run(x, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(once, again)
    assert not np.allclose(once, other, atol=1e-3)
    assert np.array_equal(jax.jit(mixture)(x), jax.jit(make_mixture("float32"))(x))


def test_widths_and_what_goes_without_weight_decay():
    config = zoo.MoEConfig(n_experts=6, bias=True, n_shared=3, d_ff_shared=5, shared_gate=True)
    mixture = nnx.eval_shape(lambda: zoo.MoE(48, config, rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(mixture))
    shapes = {path: param.shape for path, param in params}
    assert shapes[("router", "kernel")] == (48, 6)
    assert shapes[("experts", "gate_proj", "kernel")] == shapes[("experts", "up_proj", "kernel")] == (6, 48, 128)
    assert shapes[("experts", "down_proj", "kernel")] == (6, 128, 48)
    assert shapes[("experts", "down_proj", "bias")] == (6, 48)
    assert shapes[("shared", "up_proj", "kernel")] == (48, 15)
    assert shapes[("shared_gate", "kernel")] == (48, 1)
    without = {path for path, param in params if param.get_metadata("decay", True) is False}
    assert without == {path for path in shapes if path[-1] == "bias"}


PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import zoo

mesh = jax.make_mesh((2, 2), ("expert", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rule = zoo.shard_experts(mesh)
x = jax.random.normal(jax.random.key(1), (2, 12, 16))
spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
for capacity_factor in (None, 1.0):
    config = zoo.MoEConfig(n_experts=4, d_ff=32, bias=True, n_shared=1, capacity_factor=capacity_factor)
    graphdef, whole = nnx.split(zoo.MoE(16, config, rngs=nnx.Rngs(0)))
    cut = [(path, p.replace(jax.device_put(p[...], rule(path, p.shape)))) for path, p in nnx.to_flat_state(whole)]
    for path, p in cut:
        parts = {shard.data.shape for shard in p[...].addressable_shards}
        assert parts == {(2, *p.shape[1:]) if "experts" in path else p.shape}, path

    def loss(params, x):
        y, auxiliary = nnx.merge(graphdef, params).run(x)
        return 1e6 * jnp.sum(jnp.square(y)) + auxiliary, y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = run.lower(nnx.from_flat_state(cut), spread).compile()
    actual, expected = compiled(nnx.from_flat_state(cut), spread), run(whole, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    gathered = re.findall(r"= f32\\[4,(?:16,32|32,16)\\]\\S* all-gather", compiled.as_text())
    assert bool(gathered) == (capacity_factor is None), gathered
"""


@pytest.mark.slow
def test_devices_that_hold_a_part_of_the_experts_give_what_one_gives():
    """With a capacity, no device asks for the experts of another."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("unchecked")  # a mesh without devices is none to the annotation
def test_shard_experts_cuts_experts_alone():
    mesh = jax.sharding.AbstractMesh((4, 2), ("expert", "data"))
    rule = zoo.shard_experts(mesh)
    assert rule(("mlp", "experts", "up_proj", "kernel"), (8, 5, 7)).spec == jax.P("expert")
    assert rule(("mlp", "shared", "up_proj", "kernel"), (8, 16)).spec == jax.P()
    with pytest.raises(ValueError, match="n_experts=6, expected a multiple of 4, the size of 'expert'"):
        rule(("experts", "up_proj", "kernel"), (6, 5, 7))
    with pytest.raises(ValueError, match="axis='experts', expected one of expert, data"):
        zoo.shard_experts(mesh, "experts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9, expected 1 to n_experts=8"),
        ({"top_k": 0}, "top_k=0, expected 1 to n_experts=8"),
        ({"activation": "sillu"}, "unknown activation 'sillu', did you mean 'silu'"),
        ({"weights": "soft"}, "unknown weights 'soft', did you mean 'softmax'"),
        ({"d_ff": 0}, "d_ff=0, expected None or at least 1"),
        ({"shared_gate": True}, "shared_gate=True with n_shared=0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0, expected None or more than 0"),
        ({"z_weight": -1.0}, "z_weight=-1.0, expected at least 0"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
        ({"d_latent": 0}, "d_latent=0, expected None or at least 1"),
        ({"n_groups": 3}, "n_groups=3 and top_groups=1, expected a divisor of n_experts=8, and 1 to as many"),
        ({"n_groups": 4, "top_groups": 5}, "n_groups=4 and top_groups=5, expected"),
        ({"n_groups": 4, "top_k": 3}, "top_k=3, more than there are experts in top_groups=1 groups"),
    ],
)
def test_config_errors_name_the_option(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.MoEConfig(**options)
