"""Low-rank adapters: nothing changes at first, little is trained, and what was trained goes into the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import Loss, init_state, make_train_step, split_model
from tests.numerics import assert_close, jitted
from tests.zoo.reuse.models import FAMILIES, IDS, causal
from zoo.reuse.linear_maps import linear_maps, module_name


def logits(model):
    run, params = jitted(model)
    return run(params, IDS)


def moved(model, seed=1):
    """A model whose trained parameters have moved."""
    graphdef, params, rest = split_model(model)
    noise = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * noise.standard_normal(x.shape), x.dtype), params)
    return nnx.merge(graphdef, params, rest)


@pytest.mark.parametrize(
    ("dora", "pattern"),
    [
        (False, "mamba/mlp"),
        (True, "mamba2 m2/monarch"),
        pytest.param(True, " ".join(FAMILIES), marks=pytest.mark.slow),
    ],
)
def test_adapters_change_nothing_at_first_and_merge_into_every_family(dora, pattern):
    model = causal(pattern)
    adapted = zoo.add_lora(model, rank=2, alpha=3.0, dora=dora, rngs=nnx.Rngs(0))
    tolerance = 1e-5 if dora else 0.0  # DoRA divides by a norm and multiplies by it
    assert_close(logits(adapted), logits(model), tolerance=tolerance)
    trained = moved(adapted)
    merged = zoo.merge_lora(trained)
    assert nnx.split(merged)[0] == nnx.split(model)[0]  # an ordinary model, metadata and all
    assert_close(logits(merged), logits(trained), tolerance=1e-5)
    assert float(jnp.abs(logits(merged) - logits(model)).max()) > 0.1
    changed = {name for name, linear in linear_maps(model).items()}
    assert {f"{name}.lora_A" for name in changed} <= {
        ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))
    }


def test_layers_that_are_not_alike_are_no_loop():
    model = causal("-/mlp", scan_layers=True)
    one = zoo.add_lora(model, rank=2, alpha=1.0, targets=r"layers\.0\..*", rngs=0)
    assert one.backbone.looped_layers == ()
    both = moved(zoo.add_lora(one, rank=2, alpha=9.0, targets=r"layers\.1\..*", rngs=1))  # of one shape
    assert_close(logits(both), logits(zoo.merge_lora(both)), tolerance=1e-5)
    assert zoo.add_lora(model, rank=2, rngs=0).backbone.looped_layers == ((0, 1),)


def test_what_is_trained_as_it_is_has_no_adapter():
    model = zoo.MLP(4, zoo.MLPConfig(d_ff=6), rngs=nnx.Rngs(0))
    adapted = zoo.add_lora(model, rank=1, targets=".*", trained="up_proj.kernel", rngs=0)
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))}
    assert {name for name in trained if name.startswith("up_proj")} == {"up_proj.kernel"}
    with pytest.raises(ValueError, match="targets='up_proj', expected maps besides those that trained="):
        zoo.add_lora(model, targets="up_proj", trained="up_proj.kernel", rngs=0)
    with pytest.raises(ValueError, match="alpha=nan, expected more than 0"):
        zoo.add_lora(model, alpha=float("nan"), rngs=0)


def test_a_merged_weight_is_the_sum_that_the_papers_write():
    model = zoo.MLP(4, zoo.MLPConfig(d_ff=6), rngs=nnx.Rngs(0))
    for dora in (False, True):
        adapted = moved(zoo.add_lora(model, rank=2, alpha=6.0, targets=".*", dora=dora, rngs=nnx.Rngs(1)))
        weight = adapted.up_proj.kernel
        W = np.asarray(model.up_proj.kernel[...], np.float64)
        W = W + 6 / 2 * np.asarray(weight.lora_A[...], np.float64) @ np.asarray(weight.lora_B[...], np.float64)
        if dora:
            W = np.asarray(weight.magnitude[...]) * W / np.linalg.norm(W, axis=0)
        np.testing.assert_allclose(zoo.merge_lora(adapted).up_proj.kernel[...], W, rtol=1e-5)


def test_a_step_trains_adapters_and_what_is_named_alone():
    model = causal("mamba2/mlp", scan_layers=True)
    adapted = zoo.add_lora(model, rank=1, targets="in_proj|out_proj", trained="norm_f.*", rngs=nnx.Rngs(0))
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))]
    each = [
        f"backbone.layers.{i}.mixer.{m}.kernel.lora_{x}" for i in (0, 1) for m in ("in_proj", "out_proj") for x in "AB"
    ]
    assert sorted(names) == sorted([*each, "backbone.norm_f.scale"])

    def loss(model, batch, rngs):
        return Loss(jnp.sum(model(batch) ** 2), jnp.float32(1))

    optimizer = make_optimizer(OptimConfig(warmup_steps=0), 2, adapted)
    graphdef, _, rest = split_model(adapted)
    state = init_state(adapted, optimizer, jax.random.key(0))
    n_trained = sum(x.size for x in jax.tree.leaves(state.params))
    assert n_trained == sum(x.size for x in jax.tree.leaves(nnx.state(adapted, nnx.Param)))
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x)]
    assert sum(x.size for x in moments) == 2 * n_trained
    state, _ = make_train_step(adapted, loss, optimizer)(state, IDS)
    after = nnx.merge(graphdef, zoo.unstack_layers(state.params), rest)
    frozen = model.backbone.layers[0].mlp.up_proj.kernel[...]
    assert np.array_equal(after.backbone.layers[0].mlp.up_proj.kernel[...], frozen)
    assert float(jnp.abs(after.backbone.layers[1].mixer.in_proj.kernel.lora_B[...]).max()) > 0


@pytest.mark.slow
def test_adapters_lie_upon_adapters_and_upon_quantised_weights():
    model = causal("mamba/mlp")
    twice = moved(zoo.add_lora(moved(zoo.add_lora(model, rank=1, rngs=nnx.Rngs(0))), rank=2, rngs=nnx.Rngs(1)), seed=2)
    assert_close(logits(zoo.merge_lora(twice)), logits(twice), tolerance=1e-5)
    small = moved(zoo.add_lora(zoo.quantize(model, bits=4, group_size=4), rank=1, rngs=nnx.Rngs(0)))
    assert_close(logits(zoo.merge_lora(small)), logits(small), tolerance=1e-5)


def test_what_cannot_be_adapted_is_said():
    model = causal("mamba/mlp")
    with pytest.raises(ValueError, match=r"targets='in_prj' matches nothing, expected names that end in .*in_proj"):
        zoo.add_lora(model, targets="in_prj", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank=0, expected at least 1"):
        zoo.add_lora(model, rank=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"alpha=-1\.0, expected more than 0"):
        zoo.add_lora(model, alpha=-1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"targets='\(', expected a regular expression"):
        zoo.add_lora(model, targets="(", rngs=nnx.Rngs(0))
    assert {module_name(name).split(".")[-1] for name in linear_maps(causal("linear_attn/moe"))}.isdisjoint({"router"})
