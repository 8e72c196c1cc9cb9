"""Llamas and hybrids that transformers writes give its numbers here, and those written here give ours there.

Runs where torch and transformers are installed; what they once gave is kept in published/ for everywhere else.
"""

import numpy as np
import pytest

import zoo
from tests.numerics import jitted
from zoo.published.ssm_layout import read_config
from zoo.published.weight_files import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

BASE = {"hidden_size": 24, "vocab_size": 29, "intermediate_size": 20, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_state": 8}
EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 10}
NEMOTRON = {"mamba_num_heads": 6, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 8, "head_dim": 8}
ZAMBA2 = {"num_hidden_layers": 5, "n_mamba_heads": 6, "mamba_d_state": 8, "adapter_rank": 3, "num_key_value_heads": 4}
NO_CACHE = {"use_cache": False}
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3}
CASES = {
    "llama": ("Llama", LLAMA),
    "llama, one pair of key and value heads": (
        "Llama",
        LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama with biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama, wide heads, another base": (
        "Llama",
        LLAMA | {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 3, "head_dim": 12}),
    "mistral without a window": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2, windows of some layers": (
        "Qwen2",
        LLAMA | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen3, biases and windows of some layers": (
        "Qwen3",
        LLAMA
        | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"head_dim": 6, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama, another activation": ("Llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "jamba": ("Jamba", {"num_hidden_layers": 4, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "jamba without experts": (
        "Jamba",
        {"num_hidden_layers": 3, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 0}
        | {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 3, "mamba_d_conv": 3, "mamba_d_state": 5}
        | {"mamba_expand": 3, "tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    ),
    "bamba": ("Bamba", MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1], "head_dim": 8}),
    "bamba with biases": (
        "Bamba",
        MAMBA2
        | {"num_hidden_layers": 2, "attn_layer_indices": [0], "mamba_n_groups": 2, "attention_bias": True}
        | {"mlp_bias": True, "mamba_proj_bias": True, "time_step_limit": (0.01, 0.9), "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "num_attention_heads": 3}
        | {"num_key_value_heads": 3, "head_dim": 16},
    ),
    "bamba, a quarter of a head": (
        "Bamba",
        MAMBA2
        | {"num_hidden_layers": 2, "attn_layer_indices": [0], "head_dim": 16}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.25}},
    ),
    "falcon_h1": ("FalconH1", MAMBA2 | {"num_hidden_layers": 2, "mamba_d_ssm": 36}),
    "falcon_h1 with multipliers": (
        "FalconH1",
        MAMBA2
        | {"num_hidden_layers": 2, "mamba_d_ssm": 48, "mamba_rms_norm": True, "mamba_n_groups": 2}
        | {"lm_head_multiplier": 0.3, "embedding_multiplier": 5.65, "key_multiplier": 0.39, "ssm_in_multiplier": 1.25}
        | {"mlp_multipliers": [0.88, 0.31], "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.35], "mamba_proj_bias": True}
        | {"attention_in_multiplier": 0.7, "attention_out_multiplier": 0.9, "ssm_out_multiplier": 0.23},
    ),
    "falcon_h1, the norm behind the gate": (
        "FalconH1",
        MAMBA2
        | {"num_hidden_layers": 2, "mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_norm_before_gate": False}
        | {"projectors_bias": True, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite": (
        "GraniteMoeHybrid",
        MAMBA2
        | {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4}
        | {"shared_intermediate_size": 12, "embedding_multiplier": 12, "logits_scaling": 3.0}
        | {"residual_multiplier": 0.22, "attention_multiplier": 0.0625, "tie_word_embeddings": True},
    ),
    "granite without experts": (
        "GraniteMoeHybrid",
        MAMBA2
        | {"num_hidden_layers": 2, "layer_types": ["attention", "mamba"], "num_local_experts": 0}
        | {"shared_intermediate_size": 12, "position_embedding_type": "rope", "attention_bias": True},
    ),
    "nemotron_h": ("NemotronH", NEMOTRON | {"hybrid_override_pattern": "M-M*-"}),
    "nemotron_h with experts": (
        "NemotronH",
        NEMOTRON
        | EXPERTS
        | {"hybrid_override_pattern": "ME*E", "use_bias": True, "n_group": 2, "routed_scaling_factor": 2.5}
        | {"moe_latent_size": 16, "mlp_hidden_act": "silu", "use_conv_bias": False},
    ),
    "zamba2": ("Zamba2", ZAMBA2 | {"num_mem_blocks": 2, "layers_block_type": ["mamba", *["hybrid"] * 3, "mamba"]}),
    "zamba2 with adapters": (
        "Zamba2",
        ZAMBA2
        | {"use_shared_attention_adapter": True, "use_mem_rope": True, "mamba_ngroups": 2, "hidden_act": "silu"}
        | {"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3},
    ),
    # Without one of their kinds. Without attention transformers computes them, but not with a cache.
    "jamba without attention": (
        "Jamba",
        NO_CACHE
        | {"num_hidden_layers": 2, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 2}
        | {"num_experts_per_tok": 1},
    ),
    "jamba without Mamba": (
        "Jamba",
        {"num_hidden_layers": 2, "num_experts": 2, "attn_layer_period": 1, "attn_layer_offset": 0}
        | {"num_experts_per_tok": 1},
    ),
    "bamba without attention": ("Bamba", MAMBA2 | NO_CACHE | {"num_hidden_layers": 2, "attn_layer_indices": []}),
    "bamba without Mamba-2": (
        "Bamba",
        MAMBA2 | {"num_hidden_layers": 2, "attn_layer_indices": [0, 1], "head_dim": 8},
    ),
    "granite without attention": (
        "GraniteMoeHybrid",
        MAMBA2
        | NO_CACHE
        | {"num_hidden_layers": 2, "layer_types": ["mamba"] * 2, "num_local_experts": 3, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 12, "logits_scaling": 2.0},
    ),
    "granite without Mamba-2": (
        "GraniteMoeHybrid",
        MAMBA2
        | {"num_hidden_layers": 2, "layer_types": ["attention"] * 2, "num_local_experts": 0}
        | {"shared_intermediate_size": 12, "position_embedding_type": "nope", "attention_multiplier": 0.3},
    ),
    "nemotron_h without attention": ("NemotronH", NEMOTRON | NO_CACHE | {"hybrid_override_pattern": "M-M-"}),
    "nemotron_h without Mamba-2": ("NemotronH", NEMOTRON | EXPERTS | {"hybrid_override_pattern": "*E*"}),
    "nemotron_h without channel mixers": ("NemotronH", NEMOTRON | {"hybrid_override_pattern": "M*"}),
    "nemotron_h of attention alone": ("NemotronH", NEMOTRON | {"hybrid_override_pattern": "**"}),
    "zamba2 with attention everywhere": (
        "Zamba2",
        ZAMBA2 | {"num_mem_blocks": 2, "layers_block_type": ["hybrid"] * 3, "num_hidden_layers": 3},
    ),
}


def make(name, **more):
    kind, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**BASE | options | more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint by transformers, every parameter its own: its folder, the model, ours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make(request.param)
    generator = torch.Generator().manual_seed(0)
    size = 0.8 if model.config.model_type in ("zamba2", "jamba") else 1.5  # float32 tells no more of larger ones
    for name, param in [*model.named_parameters(), *model.named_buffers()]:
        if not param.is_floating_point() or any(part in name for part in ("inv_freq", "mup_vector")):
            continue
        noise = torch.randn(param.shape, generator=generator)
        scale = 0.5 if "embed" in name else 0.3 if param.ndim == 1 or "A_log" in name else size / param.shape[-1] ** 0.5
        param.data.copy_(scale * noise + ("norm" in name) - 2 * ("dt_" in name and "bias" in name))
    model.save_pretrained(folder)
    return folder, model, zoo.from_pretrained(folder, as_transformers=True)


def theirs(model, ids, **options):
    with torch.no_grad():
        return model(torch.as_tensor(ids), **options).logits.numpy()


def test_logits_and_continuations_agree_with_padding_on_the_left(case):
    _, model, ours = case
    ids, mask = np.random.default_rng(0).integers(1, 29, (2, 65)), np.ones((2, 65), bool)
    # A bias on the way into a mixer gets from padding into the convolution there.
    biased = any(getattr(model.config, name, False) for name in ("mamba_proj_bias", "use_bias"))
    mask[1, : 0 if biased else 20] = False
    call, params = jitted(ours)
    options = {"position_ids": torch.as_tensor(np.maximum(mask.cumsum(axis=1) - 1, 0))}
    expected = theirs(model, ids, attention_mask=torch.as_tensor(mask).long(), **options)
    np.testing.assert_allclose(call(params, ids, mask)[mask], expected[mask], rtol=0, atol=1e-4)
    assert expected.std() > (0.5 if model.config.model_type == "llama" else 0.3)
    # Of the Bamba whose step sizes are limited, transformers' `generate` leaves at token 17 what its own logits of the
    # whole row say is likeliest (by 0.4, in float64 too).
    n = 12 if tuple(getattr(model.config, "time_step_limit", ())) == (0.01, 0.9) else 20
    prompts = torch.as_tensor(ids[:, :30] * mask[:, :30])
    options = {"attention_mask": torch.as_tensor(mask[:, :30]).long(), "max_new_tokens": n, "do_sample": False}
    rows = zoo.generate(ours, [row[there].tolist() for row, there in zip(ids[:, :30], mask[:, :30], strict=True)], n)
    assert np.array_equal(rows[:, -n:], model.generate(prompts, **options).numpy()[:, -n:])


def test_export_is_loaded_and_gives_the_same(case, tmp_path):
    folder, model, ours = case
    zoo.save_pretrained(ours, tmp_path, "transformers")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = np.random.default_rng(1).integers(0, 29, (2, 20))
    assert np.array_equal(theirs(again.eval(), ids), theirs(model, ids))
    stored, ours = open_weights(folder), open_weights(tmp_path)
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in stored.items()}
    for key, tensor in stored.items():
        assert np.array_equal(tensor.read(), ours[key].read()), key


@pytest.mark.parametrize("kind", ["Llama", "Jamba", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Zamba2"])
def test_a_config_with_nothing_but_its_type_means_what_it_means_there(kind):
    expected = getattr(transformers, f"{kind}Config")()
    if kind == "FalconH1":
        expected.mamba_d_head = 8
    ours = read_config({"model_type": expected.model_type})
    assert ours == read_config(expected.to_dict())
    assert ours == read_config({"model_type": expected.model_type} | expected.to_diff_dict())


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_frequencies_are_refused_as_transformers_writes_them(kind, tmp_path):
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    make("llama", rope_parameters=scaling).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"rope_type='{kind}' is not supported"):
        zoo.from_pretrained(tmp_path)
