"""What maps read, and what is made up for by it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.zoo.reuse.models import IDS, causal
from zoo.reuse.codes import quantize_groups
from zoo.reuse.compensation import cost, refit, round_in_order
from zoo.reuse.linear_maps import linear_maps
from zoo.reuse.quantize import quantized_weights


def correlated(n, d, seed=0):
    """Inputs that follow from half as many numbers, and a little noise."""
    draw = np.random.default_rng(seed).standard_normal
    return jnp.asarray(draw((n, d // 2)) @ draw((d // 2, d)) + 0.1 * draw((n, d)), jnp.float32)


def test_moments_are_those_of_what_a_map_reads_where_positions_are():
    model = causal("linear_attn/moe m2/monarch")
    mask = jnp.asarray(np.arange(7) < np.array([[7], [4]]))
    moments = zoo.calibrate(model, [{"ids": IDS, "mask": mask}] * 2)
    layer = model.backbone.layers[0]
    x = np.asarray(layer.norm(model.embedding(IDS)))[np.asarray(mask)]
    np.testing.assert_allclose(moments["backbone.layers.0.mixer.q_proj.kernel"], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    maps = linear_maps(model)
    assert maps.keys() <= moments.keys()
    for name, linear in maps.items():
        blocks, d_in = linear.weight.shape[:-2], linear.weight.shape[linear.axes.d_in]
        assert moments[name].shape == (*blocks, d_in, d_in), name
    # A token goes to two of three experts, and its vector is in the moments of both.
    blocks = moments["backbone.layers.1.mlp.gated_layers.kernel"]
    whole = moments["backbone.layers.1.mixer.in_linear.kernel"]
    assert blocks.shape == (4, 2, 2)
    assert whole.shape == (8, 8)
    with pytest.raises(ValueError, match=r"batches=\(\), expected one at least"):
        zoo.calibrate(model, [])


def test_layers_in_loops_are_looked_at_one_by_one():
    looped = causal("mamba/mlp", scan_layers=True)
    plain: dict = {"remat": True, "remat_rounds": True, "remat_positions": 4}
    looped = zoo.CausalLM(dataclasses.replace(looped.config, **plain), rngs=nnx.Rngs(0))
    moments = zoo.calibrate(looped, [{"ids": IDS}])
    assert {name for name in moments if "down_proj" in name} == {
        f"backbone.layers.{i}.mlp.down_proj.kernel" for i in range(2)
    }


def test_what_follows_from_other_inputs_can_go_at_no_cost():
    draw = np.random.default_rng(1).standard_normal
    x = jnp.asarray(draw((50, 4)) @ draw((4, 6)), jnp.float32)  # any four say the other two
    moment, W = x.T @ x / 50, jnp.asarray(draw((6, 3)), jnp.float32)
    kept = np.array([0, 2, 3, 5])
    np.testing.assert_allclose(x[:, kept] @ refit(W, moment, kept), x @ W, atol=2e-2)
    x = correlated(200, 8)
    moment, W = x.T @ x / 200, jnp.asarray(draw((8, 5)), jnp.float32)
    plain = jnp.zeros_like(W).at[kept].set(W[kept])
    fitted = jnp.zeros_like(W).at[kept].set(refit(W, moment, kept))
    assert cost(fitted - W, moment) < 0.5 * cost(plain - W, moment)
    np.testing.assert_allclose(refit(W, moment, np.arange(8)), W, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_in_order_costs_less_than_rounding(bits):
    x, levels = correlated(300, 20), 2 ** (bits - 1) - 1
    moment = x.T @ x / 300
    W = jnp.asarray(np.random.default_rng(2).standard_normal((20, 9)), jnp.float32)

    def lost(codes, scales):
        return cost((codes * scales).reshape(-1, 9)[:20] - W, moment)

    in_order = lost(*round_in_order(W, moment, levels=levels, group_size=8))
    assert in_order < 0.7 * lost(*quantize_groups(W, bits, 8))
    # Inputs that say nothing of one another have nothing to make up for.
    codes, _ = round_in_order(W, jnp.eye(20), levels=levels, group_size=8)
    assert np.array_equal(codes, quantize_groups(W, bits, 8)[0])


@pytest.mark.slow
def test_every_map_of_a_model_costs_less_than_rounded():
    model = zoo.CausalLM(causal("mamba2/mlp linear_attn/moe m2/monarch").config, rngs=nnx.Rngs(0))
    moments = zoo.calibrate(model, [{"ids": IDS}])
    rounded, better = (
        zoo.quantize(model, bits=3, group_size=4, method=method, moments=moments) for method in ("round", "hessian")
    )
    total = {"rounded": 0.0, "better": 0.0}
    for name, linear in linear_maps(model).items():
        turn = (lambda w: w) if linear.axes.d_in == -2 else (lambda w: jnp.swapaxes(w, -1, -2))
        for key, other in (("rounded", rounded), ("better", better)):
            change = quantized_weights(other)[name].weight[...] - linear.weight[...]
            total[key] += float(jnp.sum(cost(turn(change), moments[name])))
    assert total["better"] < 0.8 * total["rounded"]
    with pytest.raises(ValueError, match="method='hessian', expected moments of these maps"):
        zoo.quantize(model, method="hessian")
