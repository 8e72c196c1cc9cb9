"""Llama, Mistral and Qwens: what does not fit their files, and what has no word there. Numbers: test_published.py."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.places import PUBLISHED
from zoo.published.layout_options import FREE, model_differences, resolved
from zoo.published.ssm_layout import read_config, write_config
from zoo.published.weight_files import open_weights, save_weights

HEAD = "lm_head.weight"
FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip

QWEN2 = zoo.AttentionConfig(n_heads=4, bias=True, out_bias=False)
QWEN3 = zoo.AttentionConfig(n_heads=4, head_dim=6, qk_norm=True, qk_norm_eps=1e-5)


def arrays(folder):
    return {key: tensor.read() for key, tensor in open_weights(folder).items()}


def config_file(name):
    return json.loads((PUBLISHED / name / "config.json").read_text())


def lm(**fields):
    options = {"d_model": 16, "n_layers": 2, "vocab_size": 29, "pattern": "attn/mlp"}
    return zoo.CausalLMConfig(**options | {"attn": zoo.AttentionConfig(n_heads=4)} | fields)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama_tied", lambda t: t.pop("model.norm.weight"), "1 missing in the file: norm.weight"),
        ("llama_untied", lambda t: t.pop(HEAD), "1 missing in the file: lm_head.weight"),
        (
            "llama_untied",
            lambda t: t.pop("model.layers.0.mlp.down_proj.bias"),
            r"1 missing in the file: layers\.0\.mlp\.down_proj\.bias",
        ),
        (
            "llama_tied",
            lambda t: t.update({"score.weight": np.ones((2, 32), np.float32)}),
            "1 in the file that the model does not have: score.weight",
        ),
        (
            "llama_tied",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
            r"in the file that the model does not have: layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            "llama_tied",
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.ones((32, 32), np.float32)}),
            r"1 of another shape: layers\.1\.self_attn\.k_proj\.weight is \(32, 32\), expected \(16, 32\)",
        ),
        (
            "llama_tied",
            lambda t: t.update({HEAD: np.ones((61, 32), np.float32)}),
            "lm_head.weight differs from embed_tokens.weight, which the config says it is tied to",
        ),
        (
            "llama_tied",
            lambda t: t.update({FREQUENCIES: np.array([1, 0.1, 0.01, 0.001], np.float32)}),
            "inv_freq is not what follows from the config",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, message, tmp_path):
    tensors = arrays(PUBLISHED / name)
    change(tensors)
    save_weights(tmp_path, tensors, format="bin")
    shutil.copy(PUBLISHED / name / "config.json", tmp_path)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


def test_what_a_file_may_hold_twice_is_read(tmp_path):
    """A head beside the embedding that it is tied to, and frequencies that the config says."""
    tensors = arrays(PUBLISHED / "llama_tied")
    frequencies = (1e5 ** (-np.arange(4) / 4)).astype(np.float32)
    save_weights(
        tmp_path, tensors | {HEAD: tensors["model.embed_tokens.weight"], FREQUENCIES: frequencies}, format="bin"
    )
    shutil.copy(PUBLISHED / "llama_tied" / "config.json", tmp_path)
    ours, expected = (nnx.state(zoo.from_pretrained(folder)) for folder in (tmp_path, PUBLISHED / "llama_tied"))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": 500, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 7.0},  # as transformers does
    ],
)
def test_the_base_is_read_as_old_files_and_new_ones_spell_it(rope):
    raw = config_file("llama_untied")
    assert read_config(raw | rope) == read_config(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "tanh"}, "config.json: hidden_act='tanh', expected one of silu, "),
        ({"rope_parameters": LLAMA3}, "config.json: rope_parameters: rope_type='llama3' is not supported, only 'defa"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: rope_type='linear' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic' is not supp"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type='yarn' is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor=2.0 is not supported without a rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not s"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantised"),
        ({"num_hidden_layers": 3}, r"9 missing in the file: layers\.2\.input_layernorm\.weight"),
        ({"num_key_value_heads": 4}, r"4 of another shape: layers\.0\.self_attn\.k_proj\.weight is \(16, 32\), expec"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"head_dim": 4}, "8 of another shape"),
        ({"vocab_size": 64}, r"1 of another shape: embed_tokens\.weight is \(61, 32\), expected \(64, 32\)"),
        ({"tie_word_embeddings": False}, "1 missing in the file: lm_head.weight"),
        ({"attention_bias": True}, r"8 missing in the file: layers\.0\.self_attn\.k_proj\.bias"),
        ({"mlp_bias": True}, r"6 missing in the file: layers\.0\.mlp\.down_proj\.bias"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(change, message, tmp_path):
    folder = shutil.copytree(PUBLISHED / "llama_tied", tmp_path / "llama")
    (folder / "config.json").write_text(json.dumps(config_file("llama_tied") | change))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "norm='layer' cannot be written in the transformers layout of llama, only 'rms'"),
        ({"norm_place": "post"}, "norm_place='post' cannot be written"),
        ({"layer_scale": 0.1}, "layer_scale=0.1 cannot be written"),
        ({"first_norm": False}, "first_norm=False cannot be written"),
        ({"attn": zoo.AttentionConfig(position="alibi")}, "attn.position='alibi' cannot be written"),
        ({"attn": zoo.AttentionConfig(window=8, bias=True)}, "cannot be written"),
        ({"attn": dataclasses.replace(QWEN3, qk_norm_eps=0.1)}, "attn.qk_norm_eps=0.1 cannot be written in the tran"),
        ({"pattern": "attn/mlp attn[qk_norm=true]/mlp"}, "attn.qk_norm="),
        ({"pattern": "mamba/mlp attn/mlp", "attn": QWEN3}, "attn.qk_norm=True"),
        ({"mlp": zoo.MLPConfig(gated=False)}, "mlp.gated=False cannot be written"),
        ({"mlp": zoo.MLPConfig(out_bias=True)}, "mlp.out_bias=True cannot be written"),
        (
            {"pattern": "attn/mlp attn[window=8]/mlp"},
            "attn.window=8 cannot be written in the transformers layout of llama",
        ),
        (
            {"pattern": "attn"},
            "attn.position='rope' cannot be written in the transformers layout of nemotron_h, only 'none'",
        ),
        ({"pattern": "mamba attn/mlp"}, "pattern='mamba attn/mlp' has no transformers layout"),
    ],
)
def test_what_the_layout_has_no_word_for_is_an_error(fields, message, tmp_path):
    model = nnx.eval_shape(lambda: zoo.CausalLM(lm(**fields), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_the_official_layout_has_no_llama(tmp_path):
    with pytest.raises(ValueError, match="pattern='attn/mlp' has no official layout"):
        zoo.save_pretrained(zoo.from_pretrained(PUBLISHED / "llama_tied"), tmp_path, "official")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"attn": zoo.AttentionConfig(n_heads=4, bias=True)}, "llama"),
        ({"attn": zoo.AttentionConfig(n_heads=4, window=8)}, "mistral"),
        ({"attn": zoo.AttentionConfig(n_heads=4, bias=True, out_bias=False)}, "qwen2"),
        ({"attn": zoo.AttentionConfig(n_heads=4, bias=True, out_bias=False, window=3)}, "qwen2"),
        ({"attn": QWEN3}, "qwen3"),
        ({"attn": dataclasses.replace(QWEN3, bias=True, window=3)}, "qwen3"),
        ({"pattern": "attn[window=3]/mlp attn/mlp", "attn": QWEN3, "n_layers": 4}, "qwen3"),
        ({"pattern": "(attn[window=3]/mlp attn/mlp)", "n_layers": 4}, None),
        ({"pattern": "attn[window=3]/mlp attn/mlp", "attn": QWEN2, "n_layers": 4}, "qwen2"),
        ({"pattern": "attn[window=3]/mlp attn[window=5]/mlp", "attn": QWEN2}, None),
    ],
)
def test_the_layout_is_the_first_that_holds_all_options(fields, kind):
    """Biases of queries, keys and values alone are Qwen2's, and windows of some layers; a window of all, Mistral's."""
    config = lm(**fields)
    if kind is None:
        with pytest.raises(ValueError, match=r"attn\.window"):
            write_config(config, "transformers")
        return
    raw = json.loads(json.dumps(write_config(config, "transformers")))
    assert raw["model_type"] == kind
    back = read_config(raw)
    assert write_config(back, "transformers") == raw
    assert not model_differences(config, back, free={"vocab_size", "pad_vocab_multiple"} | FREE)


def test_silence_and_null_are_two_things_in_mistral_s_window():
    raw = {name: value for name, value in config_file("mistral").items() if name != "sliding_window"}
    assert read_config(raw).attn.window == 4096
    assert read_config(raw | {"sliding_window": None}).attn.window is None
    assert read_config(raw | {"sliding_window": 7}).attn.window == 7


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"layer_types": None}, [None, 5]),
        ({"layer_types": None, "max_window_layers": 0}, [5, 5]),
        ({"layer_types": None, "use_sliding_window": False}, [None, None]),
        ({"use_sliding_window": False, "layer_types": ["full_attention"] * 2}, [None, None]),
        ({"layer_types": ["sliding_attention", "full_attention"]}, [5, None]),
    ],
)
def test_which_layers_of_a_qwen2_have_a_window(change, windows):
    config = read_config(config_file("qwen2") | change)
    mixers = [word.mixers[0] for word in zoo.parse_pattern(config.pattern, config.n_layers)]
    assert [resolved(config, mixer).window for mixer in mixers] == windows


@pytest.mark.parametrize("said", ["sliding_attention", ["sliding_attention"], ["full_attention", "chunked_attention"]])
def test_kinds_of_layers_that_there_are_not_are_named(said):
    with pytest.raises(ValueError, match=r"layer_types=.*, expected one of full_attention and sliding_attention for"):
        read_config(config_file("qwen2") | {"layer_types": said})


@pytest.mark.parametrize(
    "config",
    [
        lm(attn=zoo.AttentionConfig()),
        lm(vocab_size=32, dropout=0.1, drop_path=0.2, remat=True, mlp=zoo.MLPConfig(dropout=0.1, init="uniform")),
        lm(pattern="attn[bias=true,rope_base=77]/mlp[activation=gelu_tanh,bias=true]"),
        lm(attn=zoo.AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=10), tie_embeddings=False, norm_eps=1e-3),
    ],
)
def test_configs_go_out_and_in(config):
    raw = json.loads(json.dumps(write_config(config, "transformers")))
    back = read_config(raw)
    assert write_config(back, "transformers") == raw
    assert back.vocab_size == config.padded_vocab_size  # padding rows are tokens like others there
    shapes = [
        jax.tree.map(np.shape, nnx.eval_shape(lambda c=c: nnx.state(zoo.CausalLM(c, rngs=nnx.Rngs(0)))))
        for c in (config, back)
    ]
    assert shapes[0] == shapes[1]


def test_options_that_follow_from_others_are_left_out_and_the_rest_is_kept():
    raw = write_config(lm(pattern="attn[bias=true,rope_base=77]/mlp[activation=gelu_tanh,bias=true]"), "transformers")
    assert read_config(raw).attn == zoo.AttentionConfig(n_heads=4, rope_base=77.0, bias=True)
    assert read_config(raw).mlp == zoo.MLPConfig(d_ff=48, activation="gelu_tanh", bias=True)


def test_the_published_config_describes_the_preset():
    config, preset = read_config(SMOLLM2), zoo.presets["smollm2-135m"]
    assert config == dataclasses.replace(preset, pad_vocab_multiple=1)
    assert preset.padded_vocab_size == config.vocab_size


@pytest.mark.parametrize(
    "said",
    [
        {"type": "linear", "factor": 1.0},
        {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "default", "factor": 8.0},
        {"rope_type": "default", "original_max_position_embeddings": 2048},
        {"factor": 1.0},
    ],
)
def test_rotary_settings_that_change_nothing_are_taken(said):
    """transformers reads what belongs to a kind of scaling where that kind is named, and nowhere else."""
    raw = {name: value for name, value in config_file("llama_tied").items() if name != "rope_parameters"}
    raw |= {"rope_theta": 5000.0}
    assert read_config(raw | {"rope_scaling": said}) == read_config(raw)
