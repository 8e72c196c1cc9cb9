"""Experts in their own numbers of bits: what they are, what they cost, who gets how many, and files of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, jitted
from tests.zoo.reuse.models import IDS, causal
from zoo.models.build import abstract
from zoo.reuse.codes import QuantizedWeight
from zoo.reuse.expert_bits import QuantizedExperts
from zoo.reuse.linear_maps import Axes, linear_maps
from zoo.reuse.quantize import options_of, quantized_weights, with_options

EXPERTS = r"experts\.\w+"
WEIGHT = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 5)), jnp.float32)
READ = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 9)), jnp.float32)
MOMENT = jnp.einsum("eit,ejt->eij", READ, READ)


@pytest.mark.parametrize("moment", [None, MOMENT])
def test_each_expert_is_as_in_its_bits_alone(moment):
    bits = (8, 2, 4, 2)
    made = QuantizedExperts(WEIGHT, Axes(-2, -1), bits=bits, group_size=4, moment=moment)
    alone = [
        QuantizedWeight(
            WEIGHT[e : e + 1], Axes(-2, -1), bits=b, group_size=4, moment=None if moment is None else moment[e : e + 1]
        )
        for e, b in enumerate(bits)
    ]
    assert np.array_equal(made[...], jnp.concatenate([each[...] for each in alone]))
    assert made.nbytes == sum(each.nbytes for each in alone)
    assert made.shape == WEIGHT.shape
    same = QuantizedExperts(WEIGHT, Axes(-2, -1), bits=(4,) * 4, group_size=4)
    assert np.array_equal(same[...], QuantizedWeight(WEIGHT, Axes(-2, -1), bits=4, group_size=4)[...])
    assert all(leaf.dtype in (jnp.uint8, jnp.int8, jnp.float32) for leaf in jax.tree.leaves(nnx.state(made)))
    with pytest.raises(ValueError, match=r"bits=\(4, 4\), expected those of 4 experts"):
        QuantizedExperts(WEIGHT, Axes(-2, -1), bits=(4, 4), group_size=4)


def test_moments_of_experts_say_how_often_each_is_chosen():
    model = causal("linear_attn/moe")
    layer, name = model.backbone.layers[0], "backbone.layers.0.mlp.experts.up_proj.kernel"
    moments = zoo.calibrate(model, [{"ids": IDS}, {"ids": IDS[:, ::-1]}])[name]
    total = 0
    for ids in (IDS, IDS[:, ::-1]):
        x = layer.norm2(layer.mix(model.embedding(ids), lambda x: layer.mixer(x)))
        rows = x.reshape(-1, 8)
        total += rows.T @ rows / len(rows) / 2
    assert moments.shape == (3, 8, 8)
    assert_close(jnp.sum(moments, axis=0), total, tolerance=1e-4)


@pytest.mark.slow
def test_bits_follow_what_experts_are_worth_within_the_budget():
    model = causal("linear_attn/moe")
    names = list(linear_maps(model, EXPERTS))
    moments = zoo.calibrate(model, [{"ids": IDS}])
    never = {name: moments[name].at[1].set(0) for name in names}  # nobody chooses the second
    sizes = [
        sum(w.weight.nbytes for w in quantized_weights(zoo.quantize(model, bits=b, targets=EXPERTS)).values())
        for b in (2, 4)
    ]
    small = zoo.quantize(model, targets=EXPERTS, moments=never, mixed=sizes[1])
    weights = {name: linear.weight for name, linear in quantized_weights(small).items()}
    assert set(weights) == set(names)
    assert sizes[0] < sum(w.nbytes for w in weights.values()) <= sizes[1]
    assert all(w.bits[1] == 2 and max(w.bits) > 2 for w in weights.values())
    whole = zoo.quantize(model, targets=EXPERTS, moments=never, mixed=sizes[1], by_expert=False)
    assert all(isinstance(linear.weight, QuantizedWeight) for linear in quantized_weights(whole).values())
    # With bytes enough all have 8 bits, and are what they are in 8.
    plain = zoo.quantize(model, bits=8, targets=EXPERTS)
    all_of_it = zoo.quantize(model, targets=EXPERTS, moments=moments, mixed=10**6)
    assert nnx.split(all_of_it)[0] == nnx.split(plain)[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(all_of_it), nnx.state(plain)))


@pytest.mark.slow
def test_such_a_model_runs_comes_back_from_files_and_is_dequantised(tmp_path):
    model = causal("linear_attn/moe")
    moments = zoo.calibrate(model, [{"ids": IDS}])
    never = {name: moment.at[1].set(0) if "experts" in name else moment for name, moment in moments.items()}
    small = zoo.quantize(model, targets=EXPERTS, moments=never, mixed=2000)
    assert any(isinstance(linear.weight, QuantizedExperts) for linear in quantized_weights(small).values())
    run, params = jitted(small)
    exact, dense = run(params, IDS), jitted(zoo.dequantize(small))
    assert_close(dense[0](dense[1], IDS), exact, tolerance=1e-6)
    zoo.save_pretrained(small, tmp_path)
    again = zoo.from_pretrained(tmp_path)
    assert nnx.split(again)[0] == nnx.split(small)[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(again), nnx.state(small)))
    with pytest.raises(ValueError, match=r"in_proj\.kernel is quantised in bits=.2, 4., expected one"):
        with_options(
            abstract(causal("mamba").config),
            {"backbone.layers.0.mixer.in_proj.kernel": {"bits": [2, 4], "group_size": 4}},
        )
    assert options_of(small)
