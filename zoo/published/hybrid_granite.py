"""Granite 4 in transformers' layout: Mamba-2 and attention, each with a mixture of experts, or an MLP.

Source: transformers' configuration_granitemoehybrid.py and modeling_granitemoehybrid.py.
"""

from collections.abc import Mapping
from typing import Any

from zoo.models.causal import CausalLMConfig
from zoo.published.hybrid_family import (
    BASE,
    BASE_FIELDS,
    BLOCK_NAMES,
    MAMBA2,
    MAMBA2_FIELDS,
    Family,
    Words,
    read_attention,
    read_layer_types,
    read_mamba2,
    read_rotary,
    write_attention,
    write_mamba2,
    write_rotary,
)
from zoo.published.tensors import Json
from zoo.published.transformers_fields import write_number


def _read(raw: Json) -> dict[str, Any]:
    n = raw["num_hidden_layers"]
    channel = "moe" if raw["num_local_experts"] else "mlp"
    types = raw.get("layer_types") or raw.get("layers_block_type") or ["mamba"] * n
    turns = raw["position_embedding_type"] == "rope"
    experts = {
        "moe.n_experts": raw["num_local_experts"],
        "moe.top_k": raw["num_experts_per_tok"],
        "moe.d_ff": raw["intermediate_size"],
        "moe.activation": raw["hidden_act"],
        "moe.n_shared": 1,
        "moe.d_ff_shared": raw["shared_intermediate_size"],
    }
    dense = {"mlp.d_ff": raw["shared_intermediate_size"], "mlp.activation": raw["hidden_act"]}
    return {
        "words": [f"{mixer}/{channel}" for mixer in read_layer_types(types, n)],
        "attn.position": "rope" if turns else "none",
        "logits_multiplier": 1 / raw["logits_scaling"],
        **(experts if channel == "moe" else dense),
        **read_attention(raw),
        **(read_rotary(raw) if turns else {}),
        **read_mamba2(raw, int(raw["mamba_expand"] * raw["hidden_size"])),
    }


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    attn, moe = options["attn"], options.get("moe")
    if moe:
        channel = {"num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k, "intermediate_size": moe.d_ff}
        channel["shared_intermediate_size"] = moe.d_ff_shared
    else:
        channel = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": options["mlp"].d_ff}
        channel["shared_intermediate_size"] = options["mlp"].d_ff
    return {
        "layer_types": ["attention" if word.mixers == ("attn",) else "mamba" for word in words],
        "position_embedding_type": "rope" if attn.position == "rope" else "nope",
        "logits_scaling": write_number(config.logits_multiplier, 1 / config.logits_multiplier, lambda x: 1 / x),
        "mamba_expand": round(options["mamba2"].expand),
        **channel,
        **write_mamba2(config, options["mamba2"]),
        **write_attention(attn),
        **(write_rotary(attn) if attn.position == "rope" else {}),
    }


GRANITE = Family(
    architecture="GraniteMoeHybridForCausalLM",
    defaults=BASE
    | MAMBA2
    | {"vocab_size": 32_000, "intermediate_size": 11_008, "rms_norm_eps": 1e-6, "attention_bias": False}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024}
    | {"position_embedding_type": None}
    | dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0),
    fields=BASE_FIELDS
    | MAMBA2_FIELDS
    | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias", "attention_multiplier": "attn.softmax_scale"}
    | {"embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier"},
    only={"hidden_act": "silu"},
    read=_read,
    write=_write,
    words=frozenset({"mamba2/mlp", "attn/mlp", "mamba2/moe", "attn/moe"}),
    renamed=(
        (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.post_attention_layernorm."),
        (r"\.mlp\.router\.", ".block_sparse_moe.router.layer."),
        (r"\.mlp\.experts\.up_proj\.", ".block_sparse_moe.input_linear."),
        (r"\.mlp\.experts\.down_proj\.", ".block_sparse_moe.output_linear."),
        (r"\.mlp\.(shared\.)?up_proj\.", ".shared_mlp.input_linear."),
        (r"\.mlp\.(shared\.)?down_proj\.", ".shared_mlp.output_linear."),
        (r"^backbone\.norm_f\.", "norm."),
        *BLOCK_NAMES,
    ),
    prefix="model.",
)
