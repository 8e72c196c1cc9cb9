"""What says which hybrid a published config is of, and the fields and names that several of them have in common.

Source: transformers' configuration_*.py and modeling_*.py of their names.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ssm
from zoo.layers.attention import AttentionConfig
from zoo.models.causal import CausalLMConfig
from zoo.published.tensors import Json
from zoo.published.transformers_fields import json_number, read_heads, read_rope
from zoo.stack.pattern import Word

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


# What transformers takes where a config leaves a field out, and {their field: ours}, in more than one family.
BASE: Json = {"num_hidden_layers": 32, "hidden_size": 4096, "tie_word_embeddings": False, "hidden_act": "silu"}
BASE |= {"num_attention_heads": 32, "rms_norm_eps": 1e-5}
BASE_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
    "num_attention_heads": "attn.n_heads",
}
MLP_FIELDS = {"intermediate_size": "mlp.d_ff", "hidden_act": "mlp.activation", "mlp_bias": "mlp.bias"}
MAMBA2: Json = {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256}
MAMBA2 |= {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False}
MAMBA2 |= {"time_step_limit": [0.0, math.inf]}
MAMBA2_FIELDS = {
    "mamba_n_groups": "mamba2.n_groups",
    "mamba_d_state": "mamba2.d_state",
    "mamba_d_conv": "mamba2.d_conv",
    "mamba_conv_bias": "mamba2.conv_bias",
    "time_step_limit": "mamba2.dt_limit",
}
# Their words for mixers in old files and new ones to ours.
LAYER_TYPES = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attn", "full_attention": "attn"}


def read_attention(raw: Json) -> dict[str, Any]:
    """Key and value heads, and the width of a head."""
    return {f"attn.{name}": value for name, value in read_heads(raw).items()}


def write_attention(attn: AttentionConfig) -> Json:
    """As `read_attention` reads it."""
    return {"num_key_value_heads": attn.n_kv_heads, "head_dim": attn.head_dim}


def read_mamba2(raw: Json, inner: int) -> dict[str, Any]:
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


def write_mamba2(config: CausalLMConfig, mamba2: ssm.Mamba2Config) -> Json:
    """As `read_mamba2` reads it."""
    inner = round(mamba2.expand * config.d_model)
    return {"mamba_n_heads": inner // mamba2.head_dim, "mamba_d_head": mamba2.head_dim}


def write_step_limit(limit: tuple[float, float]) -> Json:
    """The limits of step sizes for layouts of which transformers takes `time_step_min` for the lower, and no upper."""
    if limit[1] != math.inf:
        warnings.warn(f"mamba2.dt_limit={limit} is written, but transformers limits no step from above", stacklevel=2)
    # It takes the logarithm of the minimum too: this one is below every step.
    return {"time_step_limit": [json_number(x) for x in limit], "time_step_min": limit[0] or 1e-30}


def floored_steps(raw: Json) -> Json:
    """A config with the limits of steps that transformers takes, whatever it says: `time_step_min` alone."""
    if raw.get("model_type") not in ("nemotron_h", "zamba2"):
        return raw
    said = raw.get("mamba_dt_min", raw.get("time_step_min"))
    limit = [0.001 if said is None else said, math.inf]
    return {name: value for name, value in raw.items() if name != "mamba_dt_limit"} | {"time_step_limit": limit}


def read_layer_types(types: Sequence[str], n_layers: int) -> list[str]:
    """Our words for the mixers of so many layers."""
    for kind in types:
        if kind not in LAYER_TYPES:
            raise ValueError(f"layer_types: {kind!r}, expected one of {', '.join(LAYER_TYPES)}")
    if len(types) != n_layers:
        raise ValueError(f"layer_types has {len(types)} layers, expected num_hidden_layers={n_layers}")
    return [LAYER_TYPES[kind] for kind in types]


def read_rotary(raw: Json, part: float = 1.0, *, any_part: bool = False) -> dict[str, Any]:
    """The rotary embedding, of `part` of a head where the config does not say."""
    base, said = read_rope(raw, part, any_part=any_part)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    turned = int(head_dim * said)
    return {"attn.rope_base": base, "attn.rope_dim": None if turned == head_dim else turned}


def write_rotary(attn: AttentionConfig, part: float = 1.0) -> Json:
    """As `read_rotary` reads it."""
    said: Json = {"rope_type": "default", "rope_theta": attn.rope_base}
    width = attn.head_dim or 1
    turned = attn.rope_dim or width
    if turned != int(width * part):
        share = turned / width
        said["partial_rotary_factor"] = share if int(width * share) == turned else math.nextafter(share, 1)
    return {"rope_theta": attn.rope_base, "rope_parameters": said}


# Names that all but Nemotron-H share.
BLOCK_NAMES = (
    (r"^backbone\.layers\.(\d+)\.norm\.", r"layers.\1.input_layernorm."),
    (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.pre_ff_layernorm."),
    (r"^backbone\.layers\.(\d+)\.mlp\.", r"layers.\1.feed_forward."),
    (r"^backbone\.layers\.", "layers."),
    (r"^backbone\.norm_f\.", "final_layernorm."),
    (r"^embedding\.", "embed_tokens."),
)
