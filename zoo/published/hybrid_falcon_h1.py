"""Falcon-H1 in transformers' layout: Mamba-2 beside attention in every block, with multipliers.

Source: transformers' configuration_falcon_h1.py and modeling_falcon_h1.py; Zuo et al. 2025, arXiv:2507.22448.
"""

import math
from collections.abc import Mapping
from typing import Any

from zoo.models.causal import CausalLMConfig
from zoo.published.hybrid_family import (
    BASE,
    BASE_FIELDS,
    BLOCK_NAMES,
    MAMBA2,
    MAMBA2_FIELDS,
    MLP_FIELDS,
    Family,
    Words,
    read_attention,
    read_mamba2,
    read_rotary,
    write_attention,
    write_mamba2,
    write_rotary,
)
from zoo.published.tensors import Json
from zoo.published.transformers_fields import write_number


def _read(raw: Json) -> dict[str, Any]:
    inner = raw["mamba_d_ssm"] or int(raw["mamba_expand"] * raw["hidden_size"])
    gate, down = raw["mlp_multipliers"] or (1.0, 1.0)
    attention = read_attention(raw)
    head_dim = attention["attn.head_dim"] or raw["hidden_size"] // raw["num_attention_heads"]
    # The multiplier of the keys is one of their products with the queries.
    scale = None if raw["key_multiplier"] == 1 else raw["key_multiplier"] / math.sqrt(head_dim)
    return {
        "words": ["mamba2+attn/mlp"] * raw["num_hidden_layers"],
        "mamba2.multipliers": tuple(map(float, raw["ssm_multipliers"] or (1,) * 5)),
        "mlp.gate_multiplier": float(gate),
        "mlp.out_multiplier": float(down),
        "attn.softmax_scale": scale,
        **attention,
        **read_rotary(raw),
        **read_mamba2(raw, inner),
    }


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    attn, mamba2, mlp = (options[name] for name in ("attn", "mamba2", "mlp"))
    scale, root = attn.softmax_scale, math.sqrt(attn.head_dim)
    return {
        "mamba_d_ssm": round(mamba2.expand * config.d_model),
        "ssm_multipliers": list(mamba2.multipliers),
        "mlp_multipliers": [mlp.gate_multiplier, mlp.out_multiplier],
        "key_multiplier": write_number(scale, scale * root, lambda x: x / root),
        **write_mamba2(config, mamba2),
        **write_attention(attn),
        **write_rotary(attn),
    }


FALCON_H1 = Family(
    architecture="FalconH1ForCausalLM",
    defaults=BASE
    | MAMBA2
    | {"vocab_size": 128_000, "num_key_value_heads": 8, "intermediate_size": 14_336, "mamba_d_ssm": 1024}
    | {"attention_bias": False, "mlp_bias": False, "projectors_bias": False}
    | {"mamba_rms_norm": False, "mamba_norm_before_gate": True, "mlp_multipliers": None, "ssm_multipliers": None}
    | dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier"), 1.0)
    | dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0)
    | dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
    fields=BASE_FIELDS
    | MLP_FIELDS
    | MAMBA2_FIELDS
    | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias", "projectors_bias": "mamba2.out_bias"}
    | {"mamba_rms_norm": "mamba2.rmsnorm", "mamba_norm_before_gate": "mamba2.norm_before_gate"}
    | {"lm_head_multiplier": "logits_multiplier", "embedding_multiplier": "embedding_multiplier"}
    | {"attention_in_multiplier": "attn.in_multiplier", "attention_out_multiplier": "attn.out_multiplier"}
    | {"ssm_in_multiplier": "mamba2.in_multiplier", "ssm_out_multiplier": "mamba2.out_multiplier"},
    only={"hidden_act": "silu"},
    read=_read,
    write=_write,
    words=frozenset({"mamba2+attn/mlp", "attn+mamba2/mlp"}),
    renamed=BLOCK_NAMES,
    prefix="model.",
)
