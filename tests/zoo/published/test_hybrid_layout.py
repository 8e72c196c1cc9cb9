"""Configs of published hybrids: what they mean, what goes out, what their layouts have no word for."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.places import PUBLISHED
from zoo.published.ssm_layout import read_config, write_config
from zoo.published.weight_files import open_weights, save_weights

JAMBA = "mamba/mlp mamba/moe attn/mlp mamba/moe"


def lm(pattern, n_layers=4, **fields):
    """A small model whose mixers may have options, those of Jamba's Mamba among them."""
    options = {"d_model": 16, "vocab_size": 29, "norm_eps": 1e-5, "mamba": mamba(), "attn": attention()}
    options |= {"mamba2": ssm.Mamba2Config(head_dim=8, d_state=4), "moe": zoo.MoEConfig(n_experts=3)}
    return zoo.CausalLMConfig(pattern=pattern, n_layers=n_layers, **options | fields)


def mamba(**options):
    return ssm.MambaConfig(**{"bcdt_rms": True, "bcdt_rms_weight": True, "bcdt_rms_eps": 1e-5} | options)


def attention(**options):
    return zoo.AttentionConfig(**{"n_heads": 4, "position": "none"} | options)


def experts(**options):
    return zoo.MoEConfig(**{"n_experts": 4, "d_ff": 12} | options)


DENSE = experts(weights="softmax", d_ff=48)
RELU2 = zoo.MLPConfig(gated=False, activation="relu2")
NEMOTRON3 = experts(gated=False, activation="relu2", weights="sigmoid_renormalised", correction=True, n_shared=1)
LOWEST = ssm.Mamba2Config(head_dim=8, d_state=4, dt_limit=(0.001, float("inf")))
ZAMBAS = dataclasses.replace(LOWEST, n_groups=2)
BIASED = dataclasses.replace(LOWEST, bias=True)
FOUR_HEADS = zoo.Zamba2Config(n_heads=4)
SMALL_ZAMBA2 = zoo.Zamba2Config(n_heads=4, n_kv_heads=2, d_ff=20, adapter_rank=2, rope=True, rope_base=77.0)
CONFIGS = {
    "jamba": lm(JAMBA, moe=DENSE),
    "jamba, experts everywhere": lm("mamba/moe attn/moe", moe=experts(weights="softmax", top_k=1)),
    "jamba, attention first": lm("attn/mlp mamba/mlp*2", 3, mamba=mamba(dt_rank=3, expand=3.0, bias=True)),
    "bamba": lm("mamba2/mlp attn/mlp", attn=attention(position="rope", rope_dim=2, bias=True)),
    "bamba, all of a head": lm("mamba2/mlp attn/mlp", attn=attention(position="rope", head_dim=14)),
    "bamba, seven of a head": lm("attn/mlp mamba2/mlp", attn=attention(position="rope", head_dim=50, rope_dim=14)),
    "jamba without Mamba": lm("attn/mlp attn/moe", moe=DENSE),
    "jamba without attention": lm("mamba/mlp mamba/moe", moe=DENSE),
    "jamba without mixtures": lm("mamba/mlp", attn=attention(position="rope", head_dim=6)),
    "bamba without attention": lm("mamba2/mlp", mamba=mamba(expand=2.5), zamba2=zoo.Zamba2Config(n_heads=5)),
    "bamba without Mamba": lm("attn/mlp", attn=attention(rope_dim=2, position="rope"), mamba2=ssm.Mamba2Config()),
    "granite without attention": lm("mamba2/mlp", residual_multiplier=0.2),
    "granite without Mamba": lm("attn/mlp", attn=attention(softmax_scale=0.1), mamba2=ssm.Mamba2Config(expand=2.2)),
    "nemotron_h without MLPs": lm("M*", mamba2=LOWEST, tie_embeddings=False),
    "nemotron_h without attention": lm("M-", mlp=RELU2, mamba2=LOWEST, tie_embeddings=False),
    "nemotron_h without Mamba": lm("*-", mlp=RELU2, mamba2=ssm.Mamba2Config(dt_limit=(0.0, 9.0)), tie_embeddings=False),
    "nemotron_h without mixers": lm("-/mlp", mlp=RELU2, tie_embeddings=False),
    "nemotron_h without all but attention": lm("*", tie_embeddings=False),
    "zamba2 without Mamba": lm("zamba2 zamba2[block=1]", zamba2=SMALL_ZAMBA2, mamba2=ZAMBAS),
    "falcon_h1": lm("attn+mamba2/mlp", 2, attn=attention(position="rope", softmax_scale=0.3), logits_multiplier=0.1),
    "granite": lm("mamba2/moe*3 attn/moe", moe=experts(n_shared=2), residual_multiplier=0.2, logits_multiplier=1 / 3),
    "granite, dense": lm("mamba2/mlp*3 attn/mlp", attn=attention(softmax_scale=0.1)),
    "granite, rotated": lm("mamba2/moe attn/moe", moe=experts(n_shared=1), attn=attention(position="rope")),
    "nemotron_h": lm("M-*-", mlp=RELU2, mamba2=LOWEST, tie_embeddings=False),
    "nemotron_h, experts": lm("ME*E", moe=NEMOTRON3, mamba2=LOWEST, tie_embeddings=False),
    "zamba2": lm("mamba2 zamba2 mamba2 zamba2[block=1]", zamba2=SMALL_ZAMBA2, mamba2=ZAMBAS),
    "zamba2, one transformer": lm("mamba2 zamba2", zamba2=zoo.Zamba2Config(n_heads=4, bias=True), mamba2=BIASED),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if " without " in name else name for name in CONFIGS]
)
def test_configs_go_out_and_in(name):
    config = CONFIGS[name]
    raw = json.loads(json.dumps(write_config(config, "transformers")))
    assert raw["model_type"] == {"granite": "granitemoehybrid"}.get(kind := name.split(" with")[0].split(",")[0], kind)
    back = read_config(raw)
    assert write_config(back, "transformers") == raw
    assert read_config(write_config(back, "transformers")) == back
    assert raw.get("use_cache", True) == any(
        mixer in config.pattern.replace("*", "attn") for mixer in ("attn", "zamba")
    )
    assert back.vocab_size == config.padded_vocab_size  # padding rows are tokens like others there
    shapes = [
        sorted(map(np.shape, jax.tree.leaves(nnx.eval_shape(lambda c=c: nnx.state(zoo.CausalLM(c, rngs=nnx.Rngs(0)))))))
        for c in (config, back)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lm(JAMBA), "moe.weights='renormalised' cannot be written in the transformers layout of jamba, only 'softmax'"),
        (lm(JAMBA, mamba=ssm.MambaConfig()), "mamba.bcdt_rms=False cannot be written"),
        (lm(JAMBA, mamba=mamba(bcdt_rms_eps=1e-3)), "mamba.bcdt_rms_eps=0.001 cannot be written"),
        (
            lm(JAMBA, mamba=mamba(expand=2.5)),
            "mamba.expand=2.5 cannot be written in the transformers layout of jamba, on",
        ),
        (
            lm(JAMBA, moe=experts(weights="softmax")),
            "moe.d_ff=12 cannot be written in the transformers layout of jamba",
        ),
        (lm("attn/mlp*2 mamba/mlp"), r"attn in layers \[0, 1, 3\] cannot be written"),
        (lm(JAMBA.replace("attn", "attn[window=3]"), moe=DENSE), "attn.window=3 cannot be written"),
        (lm("mamba2/mlp attn[window=3]/mlp"), "attn.window=3 cannot be written in the transformers layout of gran"),
        (
            lm("mamba2+attn/mlp", attn=attention(position="rope"), mamba2=ssm.Mamba2Config(head_dim=8, d_ssm=16)),
            "mamba2.d_ssm=16 cannot be written in the transformers layout of falcon_h1",
        ),
        (lm("mamba2/moe attn/moe"), "moe.n_shared=0 cannot be written in the transformers layout of granitemoehybrid"),
        (lm("M-*-", mamba2=LOWEST, tie_embeddings=False), "mlp.gated=True cannot be written"),
        (lm("M-*-", mlp=RELU2, mamba2=LOWEST), "tie_embeddings=True cannot be written"),
        (lm("ME*E", mamba2=LOWEST, tie_embeddings=False), "moe.gated=True cannot be written"),
        (lm("mamba2/mlp attn/mlp@a", attn=attention(position="rope")), "has no transformers layout; those that have"),
        (
            lm("mamba3/mlp attn/mlp", mamba3=ssm.Mamba3Config(head_dim=8)),
            "has no transformers layout; those that have one: .* jamba, bamba, fal",
        ),
        (
            lm("attn[window=3]/mlp mamba2/mlp", mamba2=ssm.Mamba2Config(head_dim=8, expand=2.5), norm="layer"),
            "attn.window=3 cannot be written in the transformers layout of granitemoehybrid, only None; nor "
            "mamba2.expand=2.5, only 2.0; nor norm='layer', only 'rms'; layout='native' holds every model",
        ),
        (
            lm("mamba/mlp mamba/moe*2", norm="layer", mamba=ssm.MambaConfig(bias=True)),
            r"moe in layers \[1, 2\] cannot be written in the transformers layout of jamba; nor "
            "mamba.bcdt_rms=False, only True; nor mamba.bcdt_rms_weight=False, only True; nor "
            "norm='layer', only 'rms'; layout='native' holds",
        ),
        (
            lm("zamba2", zamba2=FOUR_HEADS, mamba2=ssm.Mamba2Config(head_dim=8, d_ssm=16)),
            "mamba2.d_ssm=16 cannot be written in the transformers layout of zamba2, only None; layout='native'",
        ),
        (lm("mamba2 zamba2[block=1] zamba2"), "mamba2.dt_limit|zamba2.block=1 cannot be written"),
        (lm("mamba2 zamba2", mamba2=BIASED, zamba2=FOUR_HEADS), "mamba2.bias=True cannot be written"),
    ],
)
def test_what_a_layout_has_no_word_for_is_an_error(config, message, tmp_path):
    model = nnx.eval_shape(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("jamba", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported in jamba, only 'silu'"),
        ("jamba", {"num_experts": 4}, r"missing in the file: layers\.1\.feed_forward\.experts\.3\.down_proj\.weight"),
        ("jamba", {"num_experts": 2}, "in the file that the model does not have: .*experts.2.down_proj.weight"),
        ("jamba", {"num_experts": 1}, "in the file that the model does not have: .*experts.0.down_proj.weight"),
        ("jamba", {"intermediate_size": 8}, r"experts\.0\.down_proj\.weight is \(16, 12\), expected \(16, 8\)"),
        ("jamba", {"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantised"),
        ("bamba", {"mamba_n_heads": 4}, "mamba_n_heads \\* mamba_d_head=16, expected the inner width 32"),
        ("bamba", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        (
            "granite",
            {"position_embedding_type": "rope", "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not",
        ),
        ("falcon_h1", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
        ("granite", {"layer_types": ["mamba"] * 2}, "layer_types has 2 layers, expected num_hidden_layers=3"),
        ("granite", {"layer_types": ["mlp"] * 3}, "layer_types: 'mlp', expected one of mamba, linear_attention, att"),
        ("nemotron_h", {"mlp_hidden_act": "tanh"}, "hidden_act='tanh', expected one of silu, "),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias=True is not supported beside mixtures of experts, only False"),
        (
            "zamba2",
            {"layers_block_type": ["mamba"] * 4 + ["attention"]},
            "layers_block_type: 'attention', expected",
        ),
        ("zamba2", {"num_hidden_layers": 4}, "layers_block_type has 5 layers, expected num_hidden_layers=4"),
        ("zamba2", {"use_long_context": True}, "use_long_context=True is not supported"),
        ("zamba2", {"num_mem_blocks": 1}, "missing in the file: layers.1.shared_transformer"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "conv"]},
            "layers_block_type: 'conv', expected linear_a",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(name, change, message, tmp_path):
    config = json.loads((PUBLISHED / name / "config.json").read_text())
    save_weights(tmp_path, {key: t.read() for key, t in open_weights(PUBLISHED / name).items()}, format="bin")
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


def test_layers_are_read_as_old_files_and_new_ones_spell_them():
    raw = json.loads((PUBLISHED / "nemotron_h" / "config.json").read_text())
    types = raw.pop("layers_block_type")
    old = {"hybrid_override_pattern": "ME*-M", "num_hidden_layers": 5}
    assert len(types) == 5
    assert read_config(raw | old) == read_config(raw | {"layers_block_type": types})
    granite = json.loads((PUBLISHED / "granite" / "config.json").read_text())
    assert read_config(granite | {"layer_types": ["mamba", "attention", "mamba"]}) == read_config(granite)


def test_the_heads_of_keys_and_values_are_those_of_queries_where_null_says_so():
    raw = json.loads((PUBLISHED / "bamba" / "config.json").read_text())
    assert read_config(raw | {"num_key_value_heads": None}).attn.n_kv_heads is None


def test_experts_may_be_on_several_devices(tmp_path):
    mesh = jax.make_mesh((1,), ("expert",))
    model = zoo.from_pretrained(PUBLISHED / "jamba", sharding=zoo.shard_experts(mesh), dtype="bfloat16")
    plain = zoo.from_pretrained(PUBLISHED / "jamba", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(plain))


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, (0.0, math.inf)),
        ({"time_step_limit": [0.0, 0.01]}, (0.0, 0.01)),
        ({"time_step_limit": [0.002, {"__float__": "Infinity"}], "time_step_min": 0.5}, (0.002, math.inf)),
        ({"time_step_limit": None}, (0.0, math.inf)),
        ({"time_step_min": 0.5}, (0.0, math.inf)),
    ],
)
@pytest.mark.parametrize("name", ["nemotron_h", "zamba2"])
def test_steps_are_limited_as_the_config_says(name, change, limit, tmp_path):
    """Not as transformers (5.24) limits them, unless that is asked for: by time_step_min, whatever the config says.

    With the limits of the config put into its modules, transformers' logits are ours to 1e-4; else they are 0.08 off.
    """
    folder = shutil.copytree(PUBLISHED / name, tmp_path / name)
    raw = json.loads((folder / "config.json").read_text())
    raw = {field: value for field, value in raw.items() if not field.startswith("time_step")} | change
    (folder / "config.json").write_text(json.dumps(raw))
    model = zoo.from_pretrained(folder)
    assert model.config.mamba2.dt_limit == limit
    floored = zoo.from_pretrained(folder, as_transformers=True)
    assert floored.config.mamba2.dt_limit == (change.get("time_step_min", 0.001), math.inf)
    if limit[1] == math.inf:
        wrote = write_config(model.config, "transformers")
        assert wrote["time_step_min"] == (limit[0] or 1e-30)  # transformers takes its logarithm
    else:
        with pytest.warns(UserWarning, match="transformers limits no step from above"):
            wrote = write_config(model.config, "transformers")
    assert read_config(json.loads(json.dumps(wrote))).mamba2.dt_limit == limit


def test_the_borders_of_a_pipeline_change_no_layer():
    raw = {"model_type": "nemotron_h", "hidden_size": 32, "hybrid_override_pattern": "M-|M*|-"}
    assert read_config(raw) == read_config(raw | {"hybrid_override_pattern": "M-M*-"})
    with pytest.raises(ValueError, match=r"hybrid_override_pattern: 'X', expected letters among M, \*, -, E"):
        read_config(raw | {"hybrid_override_pattern": "M-X"})
