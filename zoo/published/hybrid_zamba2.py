"""Zamba2 in transformers' layout: Mamba-2, at some depths behind a transformer that several share.

The step sizes of Mamba-2 are limited as `time_step_limit` says; null, as the published models have it, is no limit.
transformers (5.24) passes it by and raises each step to `time_step_min`, as in Nemotron-H: see `hybrid_nemotron_h`.

Source: transformers' configuration_zamba2.py and modeling_zamba2.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from zoo.models.causal import CausalLMConfig
from zoo.published.hybrid_family import BLOCK_NAMES, Family, Words, write_step_limit
from zoo.published.tensors import Json
from zoo.published.transformers_fields import read_rope
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import mixer_name, parse_pattern

_HYBRIDS = frozenset({6, 12, 18, 24, 30, 36, 42, 47, 51})  # where a config does not say


def _read(raw: Json) -> dict[str, Any]:
    n, d_model = raw["num_hidden_layers"], raw["hidden_size"]
    usual = ["hybrid" if i in _HYBRIDS else "mamba" for i in range(n)]
    types = raw.get("layers_block_type") or raw.get("layer_types") or usual
    if unknown := {*types} - {"mamba", "linear_attention", "hybrid"}:
        raise ValueError(f"layers_block_type: {min(unknown)!r}, expected mamba, linear_attention or hybrid")
    if len(types) != n:
        raise ValueError(f"layers_block_type has {len(types)} layers, expected num_hidden_layers={n}")
    words = ["mamba2"] * n
    for order, depth in enumerate(i for i, kind in enumerate(types) if kind == "hybrid"):
        words[depth] = f"zamba2[block={order % raw['num_mem_blocks']}]"
    inner, heads, kv_heads = int(raw["mamba_expand"] * d_model), raw["num_attention_heads"], raw["num_key_value_heads"]
    base, _ = read_rope(raw)
    return {
        "words": words,
        "zamba2.n_kv_heads": None if kv_heads in (None, heads) else kv_heads,
        "zamba2.rope_base": base if raw["use_mem_rope"] else 10_000.0,
        "zamba2.d_ff": raw["intermediate_size"] or 4 * d_model,
        "mamba2.bias": raw["add_bias_linear"],
        "mamba2.expand": inner / d_model,
        "mamba2.head_dim": inner // raw["n_mamba_heads"],
        "mamba2.norm_eps": 1e-5,
        "mamba2.dt_limit": raw.get("time_step_limit") or [0.0, math.inf],
    }


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    zamba2, mamba2 = options["zamba2"], options["mamba2"]
    given = [mixer for word in parse_pattern(config.pattern, config.n_layers) for mixer in word.mixers]
    blocks = {word_config(config, mixer).block for mixer in given if mixer_name(mixer) == "zamba2"}
    base = zamba2.rope_base or 10_000.0
    return {
        "layers_block_type": ["hybrid" if word.mixers == ("zamba2",) else "mamba" for word in words],
        "num_mem_blocks": len(blocks),
        "num_key_value_heads": zamba2.n_kv_heads,
        "intermediate_size": zamba2.d_ff,
        "n_mamba_heads": round(mamba2.expand * config.d_model) // mamba2.head_dim,
        "mamba_expand": round(mamba2.expand),
        "mamba_headdim": mamba2.head_dim,
        **write_step_limit(mamba2.dt_limit),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }


ZAMBA2 = Family(
    architecture="Zamba2ForCausalLM",
    defaults={"vocab_size": 32_000, "hidden_size": 2560, "num_hidden_layers": 54, "mamba_d_state": 64}
    | {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8}
    | {"use_conv_bias": True, "add_bias_linear": False, "intermediate_size": None, "hidden_act": "gelu"}
    | {"num_attention_heads": 32, "num_key_value_heads": None, "num_mem_blocks": 1, "adapter_rank": 128}
    | {"use_shared_attention_adapter": False, "use_mem_rope": False, "rms_norm_eps": 1e-5, "use_long_context": False}
    | {"tie_word_embeddings": True},
    fields={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "tie_word_embeddings": "tie_embeddings",
        "rms_norm_eps": "norm_eps",
        "num_attention_heads": "zamba2.n_heads",
        "hidden_act": "zamba2.activation",
        "add_bias_linear": "zamba2.bias",
        "adapter_rank": "zamba2.adapter_rank",
        "use_shared_attention_adapter": "zamba2.attention_adapter",
        "use_mem_rope": "zamba2.rope",
        "mamba_d_state": "mamba2.d_state",
        "mamba_d_conv": "mamba2.d_conv",
        "mamba_ngroups": "mamba2.n_groups",
        "use_conv_bias": "mamba2.conv_bias",
    },
    only={"use_long_context": False},
    read=_read,
    write=_write,
    words=frozenset({"mamba2", "zamba2"}),
    # `hybrid_layout` puts numbers for FIRST, the first depth with the same transformer, and ORDER, how many depths
    # with one come before.
    renamed=(
        (r"^backbone\.layers\.(\d+)\.mixer\.linear\.", r"layers.\1.linear."),
        (r"^backbone\.layers\.(\d+)\.mixer\.mamba2\.", r"layers.\1.mamba_decoder.mamba."),
        (r"^backbone\.shared\.\d+\.norm\.", "SHARED.input_layernorm."),
        (r"^backbone\.shared\.\d+\.norm2\.", "SHARED.pre_ff_layernorm."),
        (r"^backbone\.shared\.\d+\.attention\.", "SHARED.self_attn."),
        (r"^backbone\.shared\.\d+\.up_proj\.", "SHARED.feed_forward.gate_up_proj."),
        (r"^backbone\.shared\.\d+\.down_proj\.", "SHARED.feed_forward.down_proj."),
        (r"^backbone\..*\.mixer\.adapter\.", "SHARED.feed_forward.gate_up_proj_adapter_list.ORDER."),
        (r"^backbone\..*\.mixer\.qkv_adapters\.0\.", "SHARED.self_attn.linear_q_adapter_list.ORDER."),
        (r"^backbone\..*\.mixer\.qkv_adapters\.1\.", "SHARED.self_attn.linear_k_adapter_list.ORDER."),
        (r"^backbone\..*\.mixer\.qkv_adapters\.2\.", "SHARED.self_attn.linear_v_adapter_list.ORDER."),
        (r"(_adapter_list\.ORDER\.)down_proj\.", r"\g<1>0."),
        (r"(_adapter_list\.ORDER\.)up_proj\.", r"\g<1>1."),
        (r"^SHARED\.", "layers.FIRST.shared_transformer."),
        *BLOCK_NAMES[:1],
        (r"^backbone\.layers\.(\d+)\.mixer\.", r"layers.\1.mamba."),
        *BLOCK_NAMES[4:],
    ),
    prefix="model.",
)
