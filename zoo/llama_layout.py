"""The layout of transformers' Llama: a causal Transformer with RoPE, grouped heads and SwiGLU.

Its rotary embedding turns the pairs (i, i + p/2) as ours does, so queries and keys go in and out as they are. Only
plain RoPE is known: a file with frequencies that are scaled is an error. Probabilities of attention are never dropped
here: attention_dropout means nothing.

Source: transformers' configuration_llama.py, modeling_llama.py and modeling_rope_utils.py; Touvron et al. 2023,
arXiv:2302.13971.
"""

import dataclasses
import re
from typing import Any

import numpy as np
from flax import nnx

from zoo.attention import AttentionConfig
from zoo.backbone import word_config
from zoo.mixers import CHANNEL_MIXERS, MIXERS
from zoo.mlp import MLPConfig
from zoo.models import CausalLM, CausalLMConfig
from zoo.pattern import Word, parse_pattern
from zoo.tensors import Entry, Json, Table

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
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Options that the file has no word for and that do not change what a model computes, and those of other mixers.
_FREE = frozenset(
    [
        "dtype",
        "param_dtype",
        "residual_in_fp32",
        "remat",
        "scan_layers",
        "pattern",
        "dropout",
        "drop_path",
        "norm_bias",
        "vocab_size",
        "pad_vocab_multiple",
        *MIXERS,
        *CHANNEL_MIXERS,
    ]
)


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
    if "quantization_config" in raw:
        raise ValueError(f"quantization_config={raw['quantization_config']!r} is not supported, only plain weights")
    if raw["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={raw['hidden_act']!r}, expected one of {', '.join(_ACTIVATIONS)}")
    d_model, heads = raw["hidden_size"], raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads", heads)
    head_dim = raw.get("head_dim", d_model // heads)
    return CausalLMConfig(
        d_model=d_model,
        n_layers=raw["num_hidden_layers"],
        pattern="attn/mlp",
        norm_eps=float(raw["rms_norm_eps"]),
        vocab_size=raw["vocab_size"],
        pad_vocab_multiple=1,
        tie_embeddings=raw["tie_word_embeddings"],
        attn=AttentionConfig(
            n_heads=heads,
            n_kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if head_dim * heads == d_model else head_dim,
            rope_base=_rope_base(raw),
            bias=raw["attention_bias"],
        ),
        mlp=MLPConfig(d_ff=raw["intermediate_size"], activation=_ACTIVATIONS[raw["hidden_act"]], bias=raw["mlp_bias"]),
    )


def _rope_base(raw: Json) -> float:
    """Base of the rotary frequencies: in `rope_parameters`, in files before transformers 5 a field of its own."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # the first prevails there
    said = raw.get(field) or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{field}: rope_type={kind!r} is not supported, only 'default'")
    for name in said.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"{field}: {name}={said[name]!r} is not supported beside rope_type='default'")
    part = said.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    if part != 1:
        raise ValueError(f"partial_rotary_factor={part!r} is not supported, only 1")
    base: Any = said.get("rope_theta", raw["rope_theta"])
    return float(base)


def write_config(config: CausalLMConfig) -> Json:
    """The config.json of a Llama, as `read_config` reads it.

    Args:
      config: one that this layout `describes`.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    words = parse_pattern(config.pattern, config.n_layers)
    if len({*words}) > 1:
        raise ValueError(
            f"pattern={config.pattern!r} cannot be written in the transformers layout of llama, whose blocks are alike"
        )
    attn, mlp = _resolved(config, words[0].mixers[0]), _resolved(config, words[0].channel)
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
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == mlp.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attn.rope_base,  # where transformers before 5 look
        "rope_parameters": {"rope_type": "default", "rope_theta": attn.rope_base},
        "attention_bias": attn.bias,
        "attention_dropout": 0.0,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.param_dtype,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    back = read_config(raw)
    _require_same(attn, _resolved(back, "attn"), "attn.")
    _require_same(mlp, _resolved(back, "mlp"), "mlp.")
    _require_same(config, back, "")
    return raw


def _require_same(config, back, prefix: str) -> None:
    for field in dataclasses.fields(back):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if ours != theirs and field.name not in _FREE:
            raise ValueError(
                f"{prefix}{field.name}={ours!r} cannot be written in the transformers layout of llama, only {theirs!r}"
            )


def _resolved(config: CausalLMConfig, word: str | None) -> Any:
    """The options of a mixer with what follows from others filled in, and what changes no output blanked."""
    options, d_model = word_config(config, word or ""), config.d_model
    if isinstance(options, MLPConfig):
        out_bias = options.bias if options.out_bias is None else options.out_bias
        return dataclasses.replace(options, d_ff=options.width(d_model), out_bias=out_bias, init="normal", dropout=0.0)
    heads = options.n_heads or max(1, d_model // (options.head_dim or 64))
    return dataclasses.replace(
        options,
        n_heads=heads,
        n_kv_heads=options.n_kv_heads or heads,
        head_dim=options.head_dim or d_model // heads,
    )


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
        name = ".".join(map(str, path))
        for ours, theirs in _RENAMED:
            name = re.sub(ours, theirs, name)
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
