"""The published hybrids: the fields of their config.json, and the names of their tensors.

Source: transformers' configuration_*.py and modeling_*.py of these names; arXiv:2403.19887 (Jamba), 2507.22448
(Falcon-H1), 2504.03624 (Nemotron-H).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ssm
from zoo.layers.attention import AttentionConfig
from zoo.models.causal import CausalLMConfig
from zoo.published.layout_options import json_number, write_number
from zoo.published.llama_layout import ACTIVATIONS, read_rope
from zoo.published.tensors import Json
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import LETTERS, Word, mixer_name, parse_pattern

Words = tuple[Word, ...]


class Family(NamedTuple):
    """A published kind of hybrid."""

    architecture: str
    """The class in transformers."""
    defaults: Json
    """What transformers takes where a config leaves a field out."""
    fields: dict[str, str]
    """Their fields to ours, "attn.n_heads" for the number of heads of attention."""
    only: dict[str, Any]
    """Fields with the one value that there is something for here."""
    read: Callable[[Json], dict[str, Any]]
    """What of ours follows from a config otherwise, "words" among it: those of the pattern."""
    write: Callable[[CausalLMConfig, Words, Mapping[str, Any]], Json]
    """What of theirs follows from a model otherwise, given its words and the options of its mixers in full."""
    words: frozenset[str]
    """The words that its blocks are made of, without options."""
    renamed: tuple[tuple[str, str], ...]
    """Our names of tensors to theirs."""
    prefix: str
    """Of all names but the head's."""


# ---------------------------------------------------------------------------------------------------- what they share

_BASE: Json = {"num_hidden_layers": 32, "hidden_size": 4096, "tie_word_embeddings": False, "hidden_act": "silu"}
_BASE |= {"num_attention_heads": 32, "rms_norm_eps": 1e-5}
_BASE_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
    "num_attention_heads": "attn.n_heads",
}
_MLP_FIELDS = {"intermediate_size": "mlp.d_ff", "hidden_act": "mlp.activation", "mlp_bias": "mlp.bias"}
_MAMBA2: Json = {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256}
_MAMBA2 |= {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False}
_MAMBA2 |= {"time_step_limit": [0.0, math.inf]}
_MAMBA2_FIELDS = {
    "mamba_n_groups": "mamba2.n_groups",
    "mamba_d_state": "mamba2.d_state",
    "mamba_d_conv": "mamba2.d_conv",
    "mamba_conv_bias": "mamba2.conv_bias",
    "time_step_limit": "mamba2.dt_limit",
}
_LAYER_TYPES = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attn", "full_attention": "attn"}


def _attention(raw: Json) -> dict[str, Any]:
    """Key and value heads, and the width of a head."""
    heads = raw["num_attention_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads
    return {
        "attn.n_kv_heads": None if kv_heads == heads else kv_heads,
        "attn.head_dim": None if head_dim * heads == raw["hidden_size"] else head_dim,
    }


def _write_attention(attn: AttentionConfig) -> Json:
    return {"num_key_value_heads": attn.n_kv_heads, "head_dim": attn.head_dim}


def _mamba2(raw: Json, inner: int) -> dict[str, Any]:
    """The width of Mamba-2 and of its heads."""
    heads, head_dim = raw["mamba_n_heads"], raw["mamba_d_head"]
    head_dim = inner // heads if head_dim == "auto" else head_dim
    if heads * head_dim != inner:
        raise ValueError(f"mamba_n_heads * mamba_d_head={heads * head_dim}, expected the inner width {inner}")
    return {
        "mamba2.head_dim": head_dim,
        "mamba2.expand": inner / raw["hidden_size"],
        "mamba2.norm_eps": float(raw["rms_norm_eps"]),
    }


def _write_mamba2(config: CausalLMConfig, mamba2: ssm.Mamba2Config) -> Json:
    inner = round(mamba2.expand * config.d_model)
    return {"mamba_n_heads": inner // mamba2.head_dim, "mamba_d_head": mamba2.head_dim}


def activation(options: Any) -> str:
    """Their name of an activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == options.activation)


def _whole_expand(name: str, expand: float) -> int:
    if expand != int(expand):
        raise ValueError(f"{name}.expand={expand} cannot be written in the transformers layout, only integers")
    return int(expand)


def _layer_types(types: Sequence[str], n_layers: int) -> list[str]:
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ValueError(f"layer_types: {kind!r}, expected one of {', '.join(_LAYER_TYPES)}")
    if len(types) != n_layers:
        raise ValueError(f"layer_types has {len(types)} layers, expected num_hidden_layers={n_layers}")
    return [_LAYER_TYPES[kind] for kind in types]


def _rope(raw: Json, part: float = 1.0, *, any_part: bool = False) -> dict[str, Any]:
    """The rotary embedding, of `part` of a head where the config does not say."""
    base, said = read_rope(raw, part, any_part=any_part)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    turned = int(head_dim * said)
    return {"attn.rope_base": base, "attn.rope_dim": None if turned == head_dim else turned}


def _write_rope(attn: AttentionConfig, part: float = 1.0) -> Json:
    """As `_rope` reads it."""
    said: Json = {"rope_type": "default", "rope_theta": attn.rope_base}
    width = attn.head_dim or 1
    turned = attn.rope_dim or width
    if turned != int(width * part):
        share = turned / width
        said["partial_rotary_factor"] = share if int(width * share) == turned else math.nextafter(share, 1)
    return {"rope_theta": attn.rope_base, "rope_parameters": said}


# Names that all but Nemotron-H share.
_BLOCK_NAMES = (
    (r"^backbone\.layers\.(\d+)\.norm\.", r"layers.\1.input_layernorm."),
    (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.pre_ff_layernorm."),
    (r"^backbone\.layers\.(\d+)\.mlp\.", r"layers.\1.feed_forward."),
    (r"^backbone\.layers\.", "layers."),
    (r"^backbone\.norm_f\.", "final_layernorm."),
    (r"^embedding\.", "embed_tokens."),
)


# -------------------------------------------------------------------------------------------------------------- Jamba


def _read_jamba(raw: Json) -> dict[str, Any]:
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
        **_attention(raw),
    }


def _period(places: Sequence[int], n: int, what: str) -> tuple[int, int]:
    """(period, offset) of places among n."""
    if not places:
        return n + 1, n
    for period in range(1, n + 1):
        if list(range(places[0], n, period)) == list(places) and places[0] < period:
            return period, places[0]
    raise ValueError(f"{what} in layers {list(places)} cannot be written in the transformers layout of jamba")


def _write_jamba(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    attention = _period([i for i, word in enumerate(words) if word.mixers == ("attn",)], len(words), "attention")
    experts = _period([i for i, word in enumerate(words) if word.channel == "moe"], len(words), "mixtures of experts")
    moe = options.get("moe")
    channel = options.get("mlp", moe)
    return {
        **dict(zip(("attn_layer_period", "attn_layer_offset"), attention, strict=True)),
        **dict(zip(("expert_layer_period", "expert_layer_offset"), experts, strict=True)),
        "mamba_dt_rank": options["mamba"].dt_rank,
        "num_experts": moe.n_experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "intermediate_size": channel.d_ff,
        "mamba_expand": _whole_expand("mamba", options["mamba"].expand),
        **_write_attention(options["attn"]),
    }


_JAMBA = Family(
    architecture="JambaForCausalLM",
    defaults=_BASE
    | {"vocab_size": 65_536, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-6}
    | {"num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
    | {"mamba_dt_rank": "auto", "mamba_conv_bias": True, "mamba_proj_bias": False},
    fields=_BASE_FIELDS
    | {"intermediate_size": "mlp.d_ff", "mamba_d_state": "mamba.d_state", "mamba_d_conv": "mamba.d_conv"}
    | {"mamba_expand": "mamba.expand", "mamba_conv_bias": "mamba.conv_bias", "mamba_proj_bias": "mamba.bias"},
    only={"hidden_act": "silu"},
    read=_read_jamba,
    write=_write_jamba,
    words=frozenset({"mamba/mlp", "mamba/moe", "attn/mlp", "attn/moe"}),
    renamed=(
        *_BLOCK_NAMES,
        (r"\.dt_norm\.", ".dt_layernorm."),
        (r"\.B_norm\.", ".b_layernorm."),
        (r"\.C_norm\.", ".c_layernorm."),
    ),
    prefix="model.",
)


# -------------------------------------------------------------------------------------------------------------- Bamba


def _read_bamba(raw: Json) -> dict[str, Any]:
    attends = set(raw["attn_layer_indices"] or ())
    return {
        "words": ["attn/mlp" if i in attends else "mamba2/mlp" for i in range(raw["num_hidden_layers"])],
        **_attention(raw),
        **_rope(raw, 0.5, any_part=True),
        **_mamba2(raw, int(raw["mamba_expand"] * raw["hidden_size"])),
    }


def _write_bamba(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    return {
        "attn_layer_indices": [i for i, word in enumerate(words) if word.mixers == ("attn",)],
        "mamba_expand": _whole_expand("mamba2", options["mamba2"].expand),
        **_write_mamba2(config, options["mamba2"]),
        **_write_attention(options["attn"]),
        **_write_rope(options["attn"], 0.5),
    }


_BAMBA = Family(
    architecture="BambaForCausalLM",
    defaults=_BASE
    | _MAMBA2
    | {"vocab_size": 128_000, "num_key_value_heads": 8, "intermediate_size": 14_336, "attn_layer_indices": None}
    | {"attention_bias": False, "mlp_bias": False},
    fields=_BASE_FIELDS
    | _MLP_FIELDS
    | _MAMBA2_FIELDS
    | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias"},
    only={"hidden_act": "silu"},
    read=_read_bamba,
    write=_write_bamba,
    words=frozenset({"mamba2/mlp", "attn/mlp"}),
    renamed=_BLOCK_NAMES,
    prefix="model.",
)


# ---------------------------------------------------------------------------------------------------------- Falcon-H1


def _read_falcon(raw: Json) -> dict[str, Any]:
    inner = raw["mamba_d_ssm"] or int(raw["mamba_expand"] * raw["hidden_size"])
    gate, down = raw["mlp_multipliers"] or (1.0, 1.0)
    attention = _attention(raw)
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
        **_rope(raw),
        **_mamba2(raw, inner),
    }


def _write_falcon(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    attn, mamba2, mlp = (options[name] for name in ("attn", "mamba2", "mlp"))
    scale, root = attn.softmax_scale, math.sqrt(attn.head_dim)
    return {
        "mamba_d_ssm": round(mamba2.expand * config.d_model),
        "ssm_multipliers": list(mamba2.multipliers),
        "mlp_multipliers": [mlp.gate_multiplier, mlp.out_multiplier],
        "key_multiplier": write_number(scale, scale * root, lambda x: x / root),
        **_write_mamba2(config, mamba2),
        **_write_attention(attn),
        **_write_rope(attn),
    }


_FALCON_H1 = Family(
    architecture="FalconH1ForCausalLM",
    defaults=_BASE
    | _MAMBA2
    | {"vocab_size": 128_000, "num_key_value_heads": 8, "intermediate_size": 14_336, "mamba_d_ssm": 1024}
    | {"attention_bias": False, "mlp_bias": False, "projectors_bias": False}
    | {"mamba_rms_norm": False, "mamba_norm_before_gate": True, "mlp_multipliers": None, "ssm_multipliers": None}
    | dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier"), 1.0)
    | dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0)
    | dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
    fields=_BASE_FIELDS
    | _MLP_FIELDS
    | _MAMBA2_FIELDS
    | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias", "projectors_bias": "mamba2.out_bias"}
    | {"mamba_rms_norm": "mamba2.rmsnorm", "mamba_norm_before_gate": "mamba2.norm_before_gate"}
    | {"lm_head_multiplier": "logits_multiplier", "embedding_multiplier": "embedding_multiplier"}
    | {"attention_in_multiplier": "attn.in_multiplier", "attention_out_multiplier": "attn.out_multiplier"}
    | {"ssm_in_multiplier": "mamba2.in_multiplier", "ssm_out_multiplier": "mamba2.out_multiplier"},
    only={"hidden_act": "silu"},
    read=_read_falcon,
    write=_write_falcon,
    words=frozenset({"mamba2+attn/mlp", "attn+mamba2/mlp"}),
    renamed=_BLOCK_NAMES,
    prefix="model.",
)


# ------------------------------------------------------------------------------------------------------------ Granite


def _read_granite(raw: Json) -> dict[str, Any]:
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
        "words": [f"{mixer}/{channel}" for mixer in _layer_types(types, n)],
        "attn.position": "rope" if turns else "none",
        "logits_multiplier": 1 / raw["logits_scaling"],
        **(experts if channel == "moe" else dense),
        **_attention(raw),
        **(_rope(raw) if turns else {}),
        **_mamba2(raw, int(raw["mamba_expand"] * raw["hidden_size"])),
    }


def _write_granite(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
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
        "mamba_expand": _whole_expand("mamba2", options["mamba2"].expand),
        **channel,
        **_write_mamba2(config, options["mamba2"]),
        **_write_attention(attn),
        **(_write_rope(attn) if attn.position == "rope" else {}),
    }


_GRANITE = Family(
    architecture="GraniteMoeHybridForCausalLM",
    defaults=_BASE
    | _MAMBA2
    | {"vocab_size": 32_000, "intermediate_size": 11_008, "rms_norm_eps": 1e-6, "attention_bias": False}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024}
    | {"position_embedding_type": None}
    | dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0),
    fields=_BASE_FIELDS
    | _MAMBA2_FIELDS
    | {"attention_bias": "attn.bias", "mamba_proj_bias": "mamba2.bias", "attention_multiplier": "attn.softmax_scale"}
    | {"embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier"},
    only={"hidden_act": "silu"},
    read=_read_granite,
    write=_write_granite,
    words=frozenset({"mamba2/mlp", "attn/mlp", "mamba2/moe", "attn/moe"}),
    renamed=(
        (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.post_attention_layernorm."),
        (r"\.mlp\.router\.", ".block_sparse_moe.router.layer."),
        (r"\.mlp\.experts\.up_proj\.", ".block_sparse_moe.input_linear."),
        (r"\.mlp\.experts\.down_proj\.", ".block_sparse_moe.output_linear."),
        (r"\.mlp\.(shared\.)?up_proj\.", ".shared_mlp.input_linear."),
        (r"\.mlp\.(shared\.)?down_proj\.", ".shared_mlp.output_linear."),
        (r"^backbone\.norm_f\.", "norm."),
        *_BLOCK_NAMES,
    ),
    prefix="model.",
)


# ---------------------------------------------------------------------------------------------------------- Nemotron-H

_NEMOTRON_LAYERS = {"M": "mamba2", "*": "attn", "-": "mlp", "E": "moe"}


def _read_nemotron(raw: Json) -> dict[str, Any]:
    letters = raw.get("hybrid_override_pattern")
    types = raw.get("layers_block_type") or raw.get("layer_types")
    if types is None:
        types = [_NEMOTRON_LAYERS[letter] for letter in letters] if letters else ["mamba2", "moe", "attn", "mlp"]
    kinds = [_LAYER_TYPES.get(kind, kind) for kind in types]
    for kind in kinds:
        if kind not in _NEMOTRON_LAYERS.values():
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
        # transformers' lower limit, whatever time_step_limit says.
        "mamba2.dt_limit": (float(raw["time_step_min"]), math.inf),
        **attention,
        **(experts if "moe" in kinds else {}),
    }


def _write_nemotron(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
    letters = {word: letter for letter, word in LETTERS.items()}
    attn, moe, mamba2 = options["attn"], options.get("moe"), options["mamba2"]
    raw: Json = {
        "hybrid_override_pattern": "".join(letters[str(word.plain)] for word in words),
        "num_hidden_layers": len(words),
        "tie_word_embeddings": False,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "mamba_num_heads": round(mamba2.expand * config.d_model) // mamba2.head_dim,
        "time_step_min": mamba2.dt_limit[0],
        "time_step_limit": [json_number(x) for x in mamba2.dt_limit],
    }
    if moe and "mlp" not in options:
        raw["mlp_hidden_act"] = activation(moe)
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


_NEMOTRON_H = Family(
    architecture="NemotronHForCausalLM",
    defaults={"vocab_size": 131_072, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"head_dim": 128, "intermediate_size": 21_504, "mlp_hidden_act": "relu2", "mlp_bias": False}
    | {"ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "n_groups": 8}
    | {"conv_kernel": 4, "time_step_min": 0.001, "use_conv_bias": True, "use_bias": False, "layer_norm_epsilon": 1e-5}
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
    read=_read_nemotron,
    write=_write_nemotron,
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


# ------------------------------------------------------------------------------------------------------------- Zamba2

_ZAMBA2_HYBRIDS = frozenset({6, 12, 18, 24, 30, 36, 42, 47, 51})  # where a config does not say


def _read_zamba2(raw: Json) -> dict[str, Any]:
    n, d_model = raw["num_hidden_layers"], raw["hidden_size"]
    usual = ["hybrid" if i in _ZAMBA2_HYBRIDS else "mamba" for i in range(n)]
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
        "mamba2.dt_limit": (float(raw["time_step_min"]), math.inf),
    }


def _write_zamba2(config: CausalLMConfig, words: Words, options: Mapping[str, Any]) -> Json:
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
        "mamba_expand": _whole_expand("mamba2", mamba2.expand),
        "mamba_headdim": mamba2.head_dim,
        "time_step_min": mamba2.dt_limit[0],
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
    }


_ZAMBA2 = Family(
    architecture="Zamba2ForCausalLM",
    defaults={"vocab_size": 32_000, "hidden_size": 2560, "num_hidden_layers": 54, "mamba_d_state": 64}
    | {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "time_step_min": 0.001, "n_mamba_heads": 8}
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
    read=_read_zamba2,
    write=_write_zamba2,
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
        *_BLOCK_NAMES[:1],
        (r"^backbone\.layers\.(\d+)\.mixer\.", r"layers.\1.mamba."),
        *_BLOCK_NAMES[4:],
    ),
    prefix="model.",
)


FAMILIES: dict[str, Family] = {
    "jamba": _JAMBA,
    "bamba": _BAMBA,
    "falcon_h1": _FALCON_H1,
    "granitemoehybrid": _GRANITE,
    "nemotron_h": _NEMOTRON_H,
    "zamba2": _ZAMBA2,
}
"""By `model_type`. Of those whose words a model has, the first that can describe it is written."""
