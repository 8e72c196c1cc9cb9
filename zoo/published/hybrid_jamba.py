"""Jamba in transformers' layout: Mamba-1 and attention, each with an MLP or a mixture of experts.

Source: transformers' configuration_jamba.py and modeling_jamba.py; Lieber et al. 2024, arXiv:2403.19887.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.models.causal import CausalLMConfig
from zoo.published.hybrid_family import BASE, BASE_FIELDS, BLOCK_NAMES, Family, Words, read_attention, write_attention
from zoo.published.tensors import Json


def _read(raw: Json) -> dict[str, Any]:
    n, mixtures = raw["num_hidden_layers"], raw["num_experts"] > 1
    words = []
    for i in range(n):
        attends = i % raw["attn_layer_period"] == raw["attn_layer_offset"]
        mixture = mixtures and i % raw["expert_layer_period"] == raw["expert_layer_offset"]
        words.append(f"{'attn' if attends else 'mamba'}/{'moe' if mixture else 'mlp'}")
    rank, usual = raw["mamba_dt_rank"], math.ceil(raw["hidden_size"] / 16)
    experts = {"moe.n_experts": raw["num_experts"], "moe.top_k": raw["num_experts_per_tok"]}
    return {
        "words": words,
        "mamba.dt_rank": None if rank in ("auto", usual) else rank,
        "mamba.bcdt_rms": True,
        "mamba.bcdt_rms_weight": True,
        "mamba.bcdt_rms_eps": float(raw["rms_norm_eps"]),
        "attn.position": "none",
        "moe.weights": "softmax",
        "moe.d_ff": raw["intermediate_size"],
        **(experts if mixtures else {}),
        **read_attention(raw),
    }


def _period(places: Sequence[int], n: int) -> tuple[int, int]:
    """(period, offset) of places among n; that of no place where they have none, as what is read back then shows."""
    for period in range(1, n + 1 if places else 0):
        if list(range(places[0], n, period)) == list(places) and places[0] < period:
            return period, places[0]
    return n + 1, n


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    attention = _period([i for i, word in enumerate(words) if word.mixers == ("attn",)], len(words))
    experts = _period([i for i, word in enumerate(words) if word.channel == "moe"], len(words))
    moe = options.get("moe")
    channel = options.get("mlp", moe)
    return {
        **dict(zip(("attn_layer_period", "attn_layer_offset"), attention, strict=True)),
        **dict(zip(("expert_layer_period", "expert_layer_offset"), experts, strict=True)),
        "mamba_dt_rank": options["mamba"].dt_rank,
        "num_experts": moe.n_experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "intermediate_size": channel.d_ff,
        "mamba_expand": round(options["mamba"].expand),
        **write_attention(options["attn"]),
    }


JAMBA = Family(
    architecture="JambaForCausalLM",
    defaults=BASE
    | {"vocab_size": 65_536, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-6}
    | {"num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
    | {"mamba_dt_rank": "auto", "mamba_conv_bias": True, "mamba_proj_bias": False},
    fields=BASE_FIELDS
    | {"intermediate_size": "mlp.d_ff", "mamba_d_state": "mamba.d_state", "mamba_d_conv": "mamba.d_conv"}
    | {"mamba_expand": "mamba.expand", "mamba_conv_bias": "mamba.conv_bias", "mamba_proj_bias": "mamba.bias"},
    only={"hidden_act": "silu"},
    read=_read,
    write=_write,
    words=frozenset({"mamba/mlp", "mamba/moe", "attn/mlp", "attn/moe"}),
    renamed=(
        *BLOCK_NAMES,
        (r"\.dt_norm\.", ".dt_layernorm."),
        (r"\.B_norm\.", ".b_layernorm."),
        (r"\.C_norm\.", ".c_layernorm."),
    ),
    prefix="model.",
)
