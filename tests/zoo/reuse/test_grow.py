"""Models made larger and smaller: the same output where that can be, and what cannot be changed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m2
import ssm
import zoo
from tests.numerics import assert_close, jitted, rms_ratio, with_random_parameters
from tests.zoo.reuse.models import IDS, OPTIONS, causal, encoder

slow = pytest.mark.slow
FAMILIES = ["mamba2/mlp", "m2/monarch"]
FAMILIES += [pytest.param(pattern, marks=slow) for pattern in ("mamba", "mamba3", "linear_attn/moe", "attn/mlp")]


def output(model):
    run, params = jitted(model)
    return run(params, IDS)


def variables(model):
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("pattern", FAMILIES)
def test_a_larger_model_starts_with_the_output_of_the_small_one(pattern):
    model = causal(pattern)
    large = zoo.grow(model, d_model=24, n_layers=2, d_ff=24, rngs=nnx.Rngs(0))
    assert (large.config.d_model, large.config.n_layers) == (24, 2)
    assert_close(output(large), output(model), tolerance=1e-5)
    small = zoo.coalesce(zoo.grow(model, d_model=24, rngs=nnx.Rngs(0)), d_model=8)
    for name, value in variables(small).items():
        np.testing.assert_allclose(value, variables(model)[name], rtol=1e-6, err_msg=name)
    # It is a config like any other, from which a model with these parameters is built.
    assert nnx.split(zoo.CausalLM(large.config, rngs=nnx.Rngs(0)))[0] == nnx.split(large)[0]


HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 2}
MAMBA2 = ssm.Mamba2Config(d_state=4, head_dim=4, n_groups=2, D_has_hdim=True, d_ssm=8, bias=True)
MAMBA3 = ssm.Mamba3Config(d_state=4, head_dim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True)
PLAIN = {"m2": m2.M2Config(l_max=16, residual_long_conv=True), "monarch": m2.MonarchMLPConfig(gated=False)}


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("attn/mlp", {"attn": zoo.AttentionConfig(**HEADS, bias=True, d_conv=3, qk_norm=True)}),
        pytest.param(
            "attn/mlp",
            {"norm": "layer", "tie_embeddings": False, "layer_scale": 0.5, "residual_multiplier": 0.3},
            marks=slow,
        ),
        (
            "mamba2",
            {"mamba2": ssm.Mamba2Config(d_state=4, head_dim=4, n_groups=2, D_has_hdim=True, d_ssm=8, bias=True)},
        ),
        pytest.param(
            "mamba",
            {"mamba": ssm.MambaConfig(d_state=4, dt_rank=2, bcdt_rms=True, bcdt_rms_weight=True, bias=True)},
            marks=slow,
        ),
        (
            "mamba3",
            {"mamba3": ssm.Mamba3Config(d_state=4, head_dim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True)},
        ),
        (
            "m2/monarch",
            {"m2": m2.M2Config(l_max=16, residual_long_conv=True), "monarch": m2.MonarchMLPConfig(gated=False)},
        ),
        ("mamba2+attn/mlp", {}),
        # A head that is the embedding reads what the last block's norm gives, without one of its own.
        ("attn/mlp", {"norm_place": "post"}),
        pytest.param("m2/mlp", {"norm_place": "post", "mixer_residual": False, "norm": "layer"}, marks=slow),
        # What training adds to blocks: a second way around, terms of an activation, a router of positions.
        ("mamba:0.5", {"shortcut_rank": 2, "adapter_width": 2}),
        pytest.param("attn/mlp", {"mlp": zoo.MLPConfig(d_ff=8, series=2)}, marks=slow),
    ],
)
def test_options_that_change_what_widths_are_side_by_side(pattern, options):
    config = zoo.CausalLMConfig(pattern=pattern, n_layers=1, **(OPTIONS | options))
    model = with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    assert_close(output(zoo.grow(model, d_model=16, rngs=nnx.Rngs(0))), output(model), tolerance=1e-5)


@pytest.mark.parametrize(
    "pattern", ["m2/monarch", pytest.param("mamba2/mlp", marks=slow), pytest.param("attn/mlp", marks=slow)]
)
def test_encoders_that_look_both_ways_grow_too(pattern):
    model = encoder(pattern)
    assert_close(output(zoo.grow(model, d_model=16, rngs=nnx.Rngs(0))), output(model), tolerance=1e-5)


def test_widths_that_are_no_multiple_are_near_and_say_so_where_they_cannot_be():
    model = zoo.CausalLM(causal("mamba/mlp").config, rngs=nnx.Rngs(0))
    near = zoo.grow(model, d_model=12, rngs=nnx.Rngs(0))
    assert rms_ratio(output(near), output(model)) < 1
    # Heads and hidden units are not what norms are over: any number of them is exact.
    assert_close(output(zoo.grow(model, d_ff=11, rngs=nnx.Rngs(0))), output(model), tolerance=1e-5)
    with pytest.raises(ValueError, match=r"expected a multiple of 8: it is cut into blocks"):
        zoo.grow(causal("-/monarch"), d_model=12, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="d_model=4, expected at least the model's 8"):
        zoo.grow(model, d_model=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="d_ff=5, expected at least the model's 8"):
        zoo.grow(model, d_ff=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="d_ff=0, expected at least 1"):
        zoo.grow(model, d_ff=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="says n_heads, a width"):
        zoo.grow(causal("attn[n_heads=4]/mlp"), d_model=16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a kind of module whose widths cannot be changed"):
        zoo.grow(causal("zamba2 mamba2"), d_model=16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="d_model=3, expected a divisor of the model's 8"):
        zoo.coalesce(model, d_model=3)


def test_copies_learn_apart_with_the_layer_above():
    model = causal("attn/mlp attn/mlp")
    own, above = (zoo.grow(model, d_model=16, method=method, rngs=nnx.Rngs(0)) for method in ("fpi", "aki"))
    q = "backbone.layers.{}.mixer.q_proj.kernel"
    small = variables(model)
    twice = {i: np.repeat(small[q.format(i)], 2, axis=0) / 2 for i in (0, 1)}  # what it reads
    got = np.asarray(variables(above)[q.format(0)])
    np.testing.assert_allclose(got[:, :4], twice[0][:, :4], rtol=1e-6)  # the first head, and then its copy
    np.testing.assert_allclose(got[:, 4:8], twice[1][:, :4], rtol=1e-6)
    assert np.array_equal(variables(above)[q.format(1)], variables(own)[q.format(1)])  # none is above


def test_depth_by_blocks_that_add_nothing_or_are_there_again():
    model = causal("mamba2/mlp attn/mlp")
    deep = zoo.grow(model, n_layers=5, rngs=nnx.Rngs(0))
    assert_close(output(deep), output(model), tolerance=0.0)
    assert deep.config.pattern == model.config.pattern

    assert all(float(jnp.abs(value).max()) > 0 for name, value in variables(deep).items() if "layers.4.norm" in name)
    twice = zoo.grow(model, n_layers=4, depth="copy", rngs=nnx.Rngs(0))
    assert [type(layer.mixer).__name__ for layer in twice.backbone.layers] == ["Mamba2"] * 2 + ["Attention"] * 2
    back = zoo.coalesce(twice, n_layers=2)
    assert back.config.pattern == "mamba2/mlp attn/mlp"
    assert_close(variables(back), variables(model), tolerance=1e-6)
    post = zoo.CausalLM(dataclasses.replace(causal("attn/mlp").config, norm_place="post"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="depth='zero' with norm_place='post'"):
        zoo.grow(post, n_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers 0 to 1 are not of one word"):
        zoo.coalesce(model, n_layers=1)


def test_the_way_back_of_the_v_cycle_is_a_mean():
    one, two = (zoo.CausalLM(causal("mamba").config, rngs=nnx.Rngs(seed)) for seed in range(2))
    between = variables(zoo.interpolate(one, two, 0.25))
    for name, value in variables(one).items():
        np.testing.assert_allclose(between[name], 0.75 * value + 0.25 * variables(two)[name], atol=1e-6)
    with pytest.raises(ValueError, match=r"alpha=2\.0, expected 0 to 1"):
        zoo.interpolate(one, two, 2.0)
    with pytest.raises(ValueError, match="other has other parameters than the first model"):
        zoo.interpolate(one, causal("mamba2/mlp"))


def test_what_is_decoalesced_comes_back_whole():
    config = dataclasses.replace(causal("attn/mlp").config, norm_place="post", n_layers=2)
    small = with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    back = zoo.coalesce(zoo.decoalesce(small, d_model=16, n_layers=4), d_model=8, n_layers=2)
    assert back.config.logits_multiplier == 1.0
    assert_close(variables(back), variables(small), tolerance=1e-6)
    with pytest.raises(ValueError, match="n_layers=3, expected a multiple of the model's 2"):
        zoo.decoalesce(small, n_layers=3)


def test_what_is_no_plain_language_model_is_said_before_it_is_made_of_another_size():
    model, batches = causal("mamba/mlp"), [{"ids": IDS}]
    quantized, adapted = zoo.quantize(model, group_size=4), zoo.add_lora(model, rank=1, rngs=nnx.Rngs(0))
    for other, words in ((quantized, "zoo.dequantize"), (adapted, "zoo.merge_lora")):
        for change in (
            lambda m: zoo.grow(m, n_layers=2, rngs=nnx.Rngs(0)),
            lambda m: zoo.coalesce(m, d_model=4),
            lambda m: zoo.prune(m, batches, d_ff=4),
            lambda m: zoo.factorize(m, batches, n_blocks=2),
            lambda m: zoo.add_gates(m, d_ff=4),
            lambda m: zoo.add_adapters(m, rngs=nnx.Rngs(0)),
        ):
            with pytest.raises(ValueError, match=rf"kernel is a \w+, expected a parameter: {words} makes it one"):
                change(other)
    with pytest.raises(ValueError, match="expected one of d_model, d_ff, n_heads, n_layers and vocabulary"):
        zoo.prune(model, batches)
