"""Training in few bits: the weights are those of a quantised model, the gradient is theirs, and goes to the floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, jitted
from tests.zoo.reuse.models import FAMILIES, IDS, causal
from zoo.reuse.codes import quantize_groups
from zoo.reuse.linear_maps import linear_maps
from zoo.reuse.quantize import quantized_weights

OPTIONS = {"bits": 4, "group_size": 4}


def arrays(model):
    return {".".join(map(str, path)): p[...] for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def straight(model, **options):
    """`straight_through` inside a program."""
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.jit(lambda s: nnx.state(zoo.straight_through(nnx.merge(graphdef, s), **options)))(state)
    )


def value_and_gradients(model, **options):
    """A loss that no two models have alike, of the model as it is or, with options, as it is rounded; by names."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        logits = (zoo.straight_through(model, **options) if options else model)(IDS)
        return jnp.sum(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape))

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return value, {".".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(gradients)}


@pytest.mark.parametrize(
    ("bits", "pattern"),
    [(1, "attn/mlp"), (4, "m2/monarch"), *(pytest.param(b, None, marks=pytest.mark.slow) for b in (1, 2, 3, 4, 8))],
)
def test_every_weight_is_that_of_the_quantised_model_to_the_bit(bits, pattern):
    model = causal() if pattern is None else causal(pattern)
    options = {"bits": bits, "group_size": 4, "embeddings": True}
    before, small = arrays(model), zoo.quantize(model, **options)
    found, expected = arrays(straight(model, **options)), arrays(zoo.dequantize(small))
    assert found.keys() == before.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in before)
    changed = {name for name in before if not np.array_equal(found[name], before[name])}
    assert changed == {*linear_maps(model), "embedding.embedding"} == set(quantized_weights(small))
    assert nnx.split(zoo.straight_through(model, **options))[0] == nnx.split(model)[0]
    assert all(np.array_equal(x, before[name]) for name, x in arrays(model).items())


@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=[] if p == "attn/mlp" else pytest.mark.slow) for p in FAMILIES]
)
def test_it_computes_what_the_quantised_model_does_and_its_gradient_is_that_at_the_rounded_weights(pattern):
    model = causal(pattern)
    small = zoo.quantize(model, **OPTIONS)
    (run, params), (again, same) = jitted(zoo.dequantize(small)), jitted(zoo.straight_through(model, **OPTIONS))
    exact = run(params, IDS)
    assert np.array_equal(again(same, IDS), exact)
    # Other programs of the same numbers, in which products may be summed in another order.
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda s: zoo.straight_through(nnx.merge(graphdef, s), **OPTIONS)(IDS))(state)
    run, params = jitted(small)
    assert_close(logits, exact, tolerance=1e-6)
    assert_close(run(params, IDS), exact, tolerance=1e-6)
    value, gradients = value_and_gradients(model, **OPTIONS)
    there, expected = value_and_gradients(zoo.dequantize(small))
    assert_close(value, there)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], gradient=True, name=name)
    assert all(np.any(gradients[name]) for name in linear_maps(model) if "experts" not in name)


@pytest.mark.slow
def test_layers_in_loops_and_computed_again_have_the_same_gradients():
    model = causal("attn/mlp", scan_layers=True)
    config = zoo.CausalLMConfig(**{**vars(model.config), "scan_layers": False})
    plain = nnx.merge(nnx.split(zoo.CausalLM(config, rngs=nnx.Rngs(0)))[0], nnx.state(model))
    config = zoo.CausalLMConfig(**{**vars(model.config), "remat": True})
    again = nnx.merge(nnx.split(zoo.CausalLM(config, rngs=nnx.Rngs(0)))[0], nnx.state(model))
    value, gradients = value_and_gradients(plain, **OPTIONS)
    there, found = value_and_gradients(again, **OPTIONS)
    assert_close(there, value)
    assert_close(found, gradients, gradient=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_that_lie_on_their_grid_stay_there(bits):
    options = {"bits": bits, "group_size": 4}
    model = zoo.dequantize(zoo.quantize(causal("mamba2/mlp"), **options))
    before, after = arrays(model), arrays(zoo.straight_through(model, **options))
    if bits == 2:  # a scale is the largest weight itself; others are divided and multiplied again, to a rounding
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert_close(after, before, tolerance=2e-7)
    for name, linear in linear_maps(model).items():
        axes = (-2, -1) if linear.axes == (-2, -1) else (-1, -2)
        first, second = (quantize_groups(jnp.moveaxis(x[name], axes, (-2, -1)), bits, 4) for x in (before, after))
        assert np.array_equal(first[0], second[0])


def test_what_quantize_refuses_is_refused(unchecked):
    model = causal("attn/mlp")
    with pytest.raises(ValueError, match="bits=5, expected one of 1, 2, 3, 4, 8"):
        zoo.straight_through(model, bits=5)
    with pytest.raises(ValueError, match="group_size=0, expected at least 1"):
        zoo.straight_through(model, bits=4, group_size=0)
    with pytest.raises(ValueError, match="targets='q_prj' matches nothing"):
        zoo.straight_through(model, bits=4, targets="q_prj")
    with pytest.raises(ValueError, match="kernel is a QuantizedWeight, expected a parameter"):
        zoo.straight_through(zoo.quantize(model, **OPTIONS), bits=4)
    with pytest.raises(ValueError, match="kernel is a LoRAWeight, expected a parameter"):
        zoo.straight_through(zoo.add_lora(model, rank=2, rngs=nnx.Rngs(0)), bits=4)
