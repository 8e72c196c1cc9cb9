"""Nemotron-H and Nemotron-3 in transformers' layout: Mamba-2, attention, MLPs and mixtures, each a block of its own.

The step sizes of Mamba-2 are limited as `time_step_limit` says, (0, infinity) in the published models, which were made
so. transformers (5.24) passes it by and raises each step to `time_step_min`, which is of the initialisation: its
logits are others, and `from_pretrained(as_transformers=True)` gives those. What is written names the lower limit in
both fields, so that transformers computes the same; an upper one it does not keep.

Source: transformers' configuration_nemotron_h.py and modeling_nemotron_h.py; arXiv:2504.03624.
"""

import math
from collections.abc import Mapping
from typing import Any

from zoo.models.causal import CausalLMConfig
from zoo.published.hybrid_family import LAYER_TYPES, Family, Words, write_step_limit
from zoo.published.tensors import Json
from zoo.published.transformers_fields import write_activation
from zoo.stack.pattern import LETTERS

_LAYERS = {"M": "mamba2", "*": "attn", "-": "mlp", "E": "moe"}


def _read(raw: Json) -> dict[str, Any]:
    letters = (raw.get("hybrid_override_pattern") or "").replace("|", "")  # it parts a pipeline's stages
    if unknown := sorted({*letters} - _LAYERS.keys()):
        raise ValueError(f"hybrid_override_pattern: {unknown[0]!r}, expected letters among {', '.join(_LAYERS)}")
    types = raw.get("layers_block_type") or raw.get("layer_types")
    if types is None:
        types = [_LAYERS[letter] for letter in letters] if letters else ["mamba2", "moe", "attn", "mlp"]
    kinds = [LAYER_TYPES.get(kind, kind) for kind in types]
    for kind in kinds:
        if kind not in _LAYERS.values():
            raise ValueError(f"layers_block_type: {kind!r}, expected linear_attention, full_attention, mlp or moe")
    if raw["mlp_bias"] and "moe" in kinds:
        raise ValueError("mlp_bias=True is not supported beside mixtures of experts, only False")
    attention = {"attn.head_dim": raw["head_dim"], "attn.n_kv_heads": raw["num_key_value_heads"]}
    inner = raw["mamba_num_heads"] * raw["mamba_head_dim"]
    experts = {
        "moe.n_experts": raw["n_routed_experts"],
        "moe.top_k": raw["num_experts_per_tok"],
        "moe.d_ff": raw["moe_intermediate_size"],
        "moe.activation": raw["mlp_hidden_act"],
        "moe.gated": False,
        "moe.weights": "sigmoid_renormalised" if raw["norm_topk_prob"] else "sigmoid",
        "moe.weights_scale": float(raw["routed_scaling_factor"]),
        "moe.correction": True,
        "moe.n_groups": raw["n_group"],
        "moe.top_groups": raw["topk_group"],
        "moe.n_shared": 1,
        "moe.d_ff_shared": raw["moe_shared_expert_intermediate_size"],
        "moe.d_latent": raw.get("moe_latent_size"),
    }
    return {
        "words": [f"-/{kind}" if kind in ("mlp", "moe") else kind for kind in kinds],
        "n_layers": len(kinds),
        "tie_embeddings": False,
        "mlp.gated": False,
        "attn.position": "none",
        "mamba2.expand": inner / raw["hidden_size"],
        "mamba2.norm_eps": float(raw["layer_norm_epsilon"]),
        "mamba2.dt_limit": raw.get("mamba_dt_limit", raw["time_step_limit"]),
        **attention,
        **(experts if "moe" in kinds else {}),
    }


def _write(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    letters = {word: letter for letter, word in LETTERS.items()}
    attn, moe, mamba2 = options["attn"], options.get("moe"), options["mamba2"]
    raw: Json = {
        "hybrid_override_pattern": "".join(letters[str(word.plain)] for word in words),
        "num_hidden_layers": len(words),
        "tie_word_embeddings": False,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "mamba_num_heads": round(mamba2.expand * config.d_model) // mamba2.head_dim,
        **write_step_limit(mamba2.dt_limit),
    }
    if moe and "mlp" not in options:
        raw["mlp_hidden_act"] = write_activation(moe.activation)
    if moe:
        raw |= {
            "n_routed_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_ff,
            "norm_topk_prob": moe.weights == "sigmoid_renormalised",
            "routed_scaling_factor": moe.weights_scale,
            "n_group": moe.n_groups,
            "topk_group": moe.top_groups,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": moe.d_ff_shared,
            "moe_latent_size": moe.d_latent,
        }
    return raw


NEMOTRON_H = Family(
    architecture="NemotronHForCausalLM",
    defaults={"vocab_size": 131_072, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"head_dim": 128, "intermediate_size": 21_504, "mlp_hidden_act": "relu2", "mlp_bias": False}
    | {"ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "n_groups": 8}
    | {
        "conv_kernel": 4,
        "time_step_limit": [0.0, math.inf],
        "use_conv_bias": True,
        "use_bias": False,
        "layer_norm_epsilon": 1e-5,
    }
    | {"n_routed_experts": 8, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688}
    | {"num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    | {"num_nextn_predict_layers": 0},
    fields={
        "hidden_size": "d_model",
        "layer_norm_epsilon": "norm_eps",
        "num_attention_heads": "attn.n_heads",
        "intermediate_size": "mlp.d_ff",
        "mlp_hidden_act": "mlp.activation",
        "mlp_bias": "mlp.bias",
        "ssm_state_size": "mamba2.d_state",
        "mamba_head_dim": "mamba2.head_dim",
        "n_groups": "mamba2.n_groups",
        "conv_kernel": "mamba2.d_conv",
        "use_conv_bias": "mamba2.conv_bias",
        "use_bias": "mamba2.bias",
    },
    only={"mamba_hidden_act": "silu"},
    read=_read,
    write=_write,
    words=frozenset({"mamba2", "attn", "-/mlp", "-/moe"}),
    renamed=(
        (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.norm."),
        (r"\.mlp\.router\.", ".mixer.gate."),
        (r"\.mlp\.correction$", ".mixer.gate.e_score_correction_bias"),
        (r"\.mlp\.reduce\.", ".mixer.fc1_latent_proj."),
        (r"\.mlp\.expand\.", ".mixer.fc2_latent_proj."),
        (r"\.mlp\.shared\.", ".mixer.shared_experts."),
        (r"\.mlp\.", ".mixer."),
        (r"^backbone\.", ""),
        (r"^embedding\.", "embeddings."),
    ),
    prefix="backbone.",
)
