"""Bamba in transformers' layout: Mamba-2 and attention, each with an MLP; half of a head is rotated.

Source: transformers' configuration_bamba.py and modeling_bamba.py.
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


def _read(raw: Json) -> dict[str, Any]:
    attends = set(raw["attn_layer_indices"] or ())
    return {
        "words": ["attn/mlp" if i in attends else "mamba2/mlp" for i in range(raw["num_hidden_layers"])],
        **read_attention(raw),
        **(read_rotary(raw, 0.5, any_part=True) if attends else {}),  # heads that are nowhere need not be even
        **read_mamba2(raw, int(raw["mamba_expand"] * raw["hidden_size"])),
    }


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    return {
        "attn_layer_indices": [i for i, word in enumerate(words) if word.mixers == ("attn",)],
        "mamba_expand": round(options["mamba2"].expand),
        **write_mamba2(config, options["mamba2"]),
        **write_attention(options["attn"]),
        **write_rotary(options["attn"], 0.5),
    }


BAMBA = Family(
    architecture="BambaForCausalLM",
    defaults=BASE
    | MAMBA2
    | {"vocab_size": 128_000, "num_key_value_heads": 8, "intermediate_size": 14_336, "attn_layer_indices": None}
    | {"attention_bias": False, "mlp_bias": False},
    fields=BASE_FIELDS | MLP_FIELDS | MAMBA2_FIELDS | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias"},
    only={"hidden_act": "silu"},
    read=_read,
    write=_write,
    words=frozenset({"mamba2/mlp", "attn/mlp"}),
    renamed=BLOCK_NAMES,
    prefix="model.",
)
