"""The layout of transformers' Llama: a causal Transformer with RoPE, grouped heads and SwiGLU.

Its rotary embedding turns the pairs (i, i + p/2) as ours does, so queries and keys go in and out as they are. Only
plain RoPE is known: a file with frequencies that are scaled is an error. Probabilities of attention are never dropped
here: attention_dropout means nothing.

Source: transformers' configuration_llama.py and modeling_llama.py; Touvron et al. 2023,
arXiv:2302.13971.
"""

from typing import Any

import numpy as np
from flax import nnx

from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.published.layout_options import FREE, model_differences, require_held, resolved
from zoo.published.tensors import Entry, Json, Table, renamed
from zoo.published.transformers_fields import (
    NO_SPECIAL_TOKENS,
    read_activation,
    read_heads,
    read_rope,
    require_numbers,
    write_activation,
)
from zoo.stack.pattern import Word, parse_pattern

WORD_EMBEDDINGS = "embed_tokens.weight"

# What transformers takes where a config leaves a field out.
_DEFAULTS: Json = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11_008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Options that may differ when a written config is read back.
_FREE = FREE | {"residual_in_fp32", "norm_bias", "vocab_size", "pad_vocab_multiple"}


def is_llama(raw: Json) -> bool:
    """Whether a config is of this layout."""
    return raw.get("model_type") == "llama"


def describes(config: CausalLMConfig) -> bool:
    """Whether a model has this layout's blocks, attention and a dense channel mixer each, whatever their options."""
    return {word.plain for word in parse_pattern(config.pattern, config.n_layers)} == {Word(("attn",), "mlp")}


def read_config(raw: Json) -> CausalLMConfig:
    """The model that a config of Llama describes.

    Raises:
      ValueError: an option that there is none for here, such as scaled RoPE: names it.
    """
    raw = _DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, _DEFAULTS)
    activation = read_activation(raw["hidden_act"])
    base, _ = read_rope(raw)
    return CausalLMConfig(
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        pattern="attn/mlp",
        norm_eps=float(raw["rms_norm_eps"]),
        vocab_size=raw["vocab_size"],
        pad_vocab_multiple=1,
        tie_embeddings=raw["tie_word_embeddings"],
        attn=AttentionConfig(
            n_heads=raw["num_attention_heads"], rope_base=base, bias=raw["attention_bias"], **read_heads(raw)
        ),
        mlp=MLPConfig(d_ff=raw["intermediate_size"], activation=activation, bias=raw["mlp_bias"]),
    )


def write_config(config: CausalLMConfig) -> Json:
    """The config.json of a Llama, as `read_config` reads it.

    Args:
      config: one that this layout `describes`.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    words = parse_pattern(config.pattern, config.n_layers)
    attn, mlp = resolved(config, words[0].mixers[0]), resolved(config, words[0].channel or "")
    raw: Json = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.padded_vocab_size,  # padding rows are tokens like others there
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_kv_heads,
        "head_dim": attn.head_dim,
        "intermediate_size": mlp.d_ff,
        "hidden_act": write_activation(mlp.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attn.rope_base,  # where transformers before 5 look
        "rope_parameters": {"rope_type": "default", "rope_theta": attn.rope_base},
        "attention_bias": attn.bias,
        "attention_dropout": 0.0,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.param_dtype,
        **NO_SPECIAL_TOKENS,
    }
    require_held(model_differences(config, read_config(raw), free=_FREE), "transformers layout of llama")
    return raw


# Our names to theirs, applied one after the other.
_RENAMED = (
    (r"^backbone\.layers\.(\d+)\.mixer\.", r"layers.\1.self_attn."),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"layers.\1.input_layernorm."),
    (r"^backbone\.layers\.(\d+)\.norm2\.", r"layers.\1.post_attention_layernorm."),
    (r"^backbone\.layers\.", "layers."),
    (r"^backbone\.norm_f\.", "norm."),
    (r"^embedding\.", "embed_tokens."),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def tensor_table(model: CausalLM) -> Table:
    """The tensors of a model's file under their short names, and what else a file may hold."""
    entries: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = renamed(".".join(map(str, path)), _RENAMED)
        entries[name] = Entry((path,), "linear" if path[-1] == "kernel" else "same")
    copies = {"lm_head.weight": WORD_EMBEDDINGS} if model.config.tie_embeddings else {}
    # Older files hold the rotary frequencies of each layer.
    constants = {}
    for i, layer in enumerate(model.backbone.layers):
        mixer: Any = layer.mixer
        half = mixer.head_dim // 2
        frequencies = mixer.config.rope_base ** (-np.arange(half) / half)
        constants[f"layers.{i}.self_attn.rotary_emb.inv_freq"] = frequencies
    return Table(entries, copies, constants)


def full_name(name: str) -> str:
    """A tensor's name in the file, out of the short one."""
    return name if name.startswith("lm_head.") else f"model.{name}"
