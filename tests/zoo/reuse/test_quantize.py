"""Weights in few bits: how far off they are, how many bytes they take, and that a model goes on as before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import assert_close, jitted, rms_ratio
from tests.zoo.reuse.models import IDS, causal, encoder
from zoo.reuse.codes import QuantizedWeight, pack, quantize_groups, unpack
from zoo.reuse.compensation import round_in_order
from zoo.reuse.linear_maps import linear_maps
from zoo.reuse.mixed_bits import Choice, allocate
from zoo.reuse.quantize import quantized_weights


def logits(model):
    run, params = jitted(model)
    return run(params, IDS)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_weight_is_within_half_a_step_of_its_group_and_codes_come_back(bits):
    weight = np.random.default_rng(0).standard_normal((3, 10, 5)).astype(np.float32)
    weight[1, :4, 2] = 0  # a group of nothing
    codes, scales = quantize_groups(jnp.asarray(weight), bits, 4)
    assert codes.shape == (3, 3, 4, 5)
    assert scales.shape == (3, 3, 1, 5)
    assert int(jnp.abs(codes).max()) == 2 ** (bits - 1) - 1
    back = (codes * scales).reshape(3, 12, 5)[:, :10]
    groups = np.pad(np.abs(weight), [(0, 0), (0, 2), (0, 0)]).reshape(3, 3, 4, 5).max(2, keepdims=True)
    step = np.broadcast_to(groups / (2 ** (bits - 1) - 1), codes.shape).reshape(3, 12, 5)[:, :10]
    assert np.all(np.abs(back - weight) <= step / 2 + 1e-6)
    assert np.array_equal(unpack(pack(codes, bits), bits, 4), codes)
    assert pack(codes, bits).nbytes == codes.size * {2: 2, 3: 4, 4: 4, 8: 8}[bits] // 8
    odd, _ = quantize_groups(jnp.asarray(weight), bits, 3)  # groups that bytes do not divide
    assert np.array_equal(unpack(pack(odd, bits), bits, 3), odd)


def test_one_bit_is_the_sign_and_the_mean_size():
    weight = np.random.default_rng(0).standard_normal((10, 5)).astype(np.float32)
    codes, scales = quantize_groups(jnp.asarray(weight), 1, 4)
    assert np.array_equal((codes.reshape(12, 5)[:10] > 0), weight >= 0)
    sizes = [np.abs(weight[start : start + 4]).mean(0) for start in (0, 4, 8)]
    np.testing.assert_allclose(scales[:, 0], sizes, rtol=1e-6)
    assert np.array_equal(unpack(pack(codes, 1), 1, 4), codes)
    assert pack(codes, 1).nbytes == 3 * 1 * 5
    moment = jnp.eye(10)
    in_order, also = round_in_order(jnp.asarray(weight), moment, levels=0, group_size=4)  # nothing to make up for
    assert np.array_equal(in_order.reshape(12, 5)[:10], codes.reshape(12, 5)[:10])
    np.testing.assert_allclose(also, scales, rtol=1e-5)


@pytest.mark.slow
def test_bits_go_where_rounding_costs_most_and_fit_the_budget():
    steps = {"a": [Choice(2, 10, 1.0), Choice(4, 20, 0.1)], "b": [Choice(2, 10, 0.2), Choice(4, 20, 0.1)]}
    assert allocate(steps, 20) == {"a": 2, "b": 2}
    assert allocate(steps, 35) == {"a": 4, "b": 2}
    assert allocate(steps, 40) == {"a": 4, "b": 4}
    assert allocate({"a": [Choice(2, 10, 1.0), Choice(4, 20, 1.0), Choice(8, 40, 0.0)]}, 40) == {"a": 8}
    with pytest.raises(ValueError, match="mixed=19, expected at least 20 bytes"):
        allocate(steps, 19)
    model = causal("mamba/mlp")
    moments = zoo.calibrate(model, [{"ids": IDS}])
    sizes = [
        sum(w.weight.nbytes for w in quantized_weights(zoo.quantize(model, bits=b, group_size=4)).values())
        for b in (2, 4)
    ]
    budget = sum(sizes) // 2
    mixed = quantized_weights(zoo.quantize(model, group_size=4, moments=moments, mixed=budget))
    assert sizes[0] < sum(w.weight.nbytes for w in mixed.values()) <= budget
    assert len({w.weight.bits for w in mixed.values()}) > 1
    with pytest.raises(ValueError, match="mixed=1000, expected moments"):
        zoo.quantize(model, mixed=1000)


@pytest.mark.slow
def test_every_family_is_kept_in_few_bits_and_generates():
    model = zoo.CausalLM(causal("mamba2/mlp linear_attn/moe m2/monarch").config, rngs=nnx.Rngs(0))
    exact, off = logits(model), []
    for bits in (8, 4):
        small = zoo.quantize(model, bits=bits, group_size=4, embeddings=True)
        off.append(rms_ratio(logits(small), exact))
        assert_close(logits(zoo.dequantize(small)), logits(small), tolerance=1e-6)
    assert off[0] < 0.05 < off[1] < 1, off
    assert nnx.split(zoo.dequantize(small))[0] == nnx.split(model)[0]
    assert set(quantized_weights(small)) == {*linear_maps(model), "embedding.embedding"}


def test_a_quantised_model_extends_as_it_reads_the_whole():
    model = zoo.quantize(causal("mamba/mlp"), bits=4, group_size=4)
    tokens = zoo.generate(model, IDS, max_new_tokens=3)
    run, params = jitted(model)
    whole = run(params, tokens)
    assert np.array_equal(tokens[:, -3:], jnp.argmax(whole[:, -4:-1, :11], -1))


def test_bytes_are_those_of_codes_and_scales(unchecked):
    model = causal("attn/mlp")
    small = zoo.quantize(model, bits=4, group_size=8)
    for linear in quantized_weights(small).values():
        assert linear.weight.nbytes == linear.weight.scales[...].nbytes + np.prod(linear.weight.shape) / 2
    with pytest.raises(ValueError, match="bits=5, expected one of 1, 2, 3, 4, 8"):
        zoo.quantize(model, bits=5)
    with pytest.raises(ValueError, match="group_size=0, expected at least 1"):
        zoo.quantize(model, group_size=0)
    with pytest.raises(ValueError, match="kernel is a QuantizedWeight, expected a parameter"):
        zoo.quantize(small)
    assert jax.tree.leaves(nnx.state(small, nnx.Param))
    adapted = zoo.add_lora(small, rank=1, rngs=nnx.Rngs(0))
    whole = zoo.dequantize(adapted)  # below adapters, too
    assert not [module for _, module in nnx.iter_modules(whole) if isinstance(module, QuantizedWeight)]
    assert_close(logits(whole), logits(small), tolerance=1e-6)


def test_networks_that_make_filters_both_ways_are_quantised_adapted_and_looked_at_as_one_way():
    model = encoder("m2/monarch")
    moments = zoo.calibrate(model, [{"ids": IDS}])
    assert linear_maps(model).keys() == moments.keys() - {"dense.kernel"}
    assert not [name for name in moments if "filter" in name]
    exact = logits(model)
    for targets in (None, r".*implicit_filter_rev\..*"):  # the second: networks of two kinds, side by side
        small = zoo.quantize(
            model, group_size=4, targets=targets, method="round" if targets else "hessian", moments=moments
        )
        assert 0 < rms_ratio(logits(small), exact) < 0.05
    assert_close(logits(zoo.add_lora(model, rank=1, rngs=nnx.Rngs(0))), exact, tolerance=0.0)
    other = {"encoder.backbone.layers.0.mixer.in_linear.kernel": jnp.eye(9)}
    with pytest.raises(ValueError, match=r"in_linear\.kernel are of 9 inputs, expected its 8"):
        zoo.quantize(model, method="hessian", moments=other)
