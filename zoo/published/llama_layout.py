"""The layout of transformers' Llama, Mistral, Qwen2 and Qwen3: causal Transformers with RoPE, grouped heads and SwiGLU.

What tells them apart: Llama may have biases, Mistral sees a window of positions, Qwen2 has biases on queries, keys and
values, and in some layers a window; Qwen3 has windows likewise, and norms of queries and keys. Their rotary embedding
turns the pairs (i, i + p/2) as ours does, so queries and keys go in and out as they are. Only plain RoPE is known: a
file with frequencies that are scaled is an error.
Probabilities of attention are never dropped here: attention_dropout means nothing.

Source: transformers' configuration_ and modeling_{llama,mistral,qwen2,qwen3}.py; Touvron et al. 2023, arXiv:2302.13971;
Jiang et al. 2023, arXiv:2310.06825; Yang et al. 2024, arXiv:2407.10671; Yang et al. 2025, arXiv:2505.09388.
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
from zoo.stack.pattern import Word, format_pattern, parse_pattern

WORD_EMBEDDINGS = "embed_tokens.weight"

# What transformers takes where a config leaves a field out.
_SHARED: Json = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11_008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN: Json = {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32}
_QWEN |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[str, Json] = {
    "llama": _SHARED | {"attention_bias": False, "mlp_bias": False},
    "mistral": _SHARED | {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _SHARED | _QWEN,
    "qwen3": _SHARED | _QWEN | {"head_dim": 128, "attention_bias": False},
}
MODEL_TYPES = tuple(_DEFAULTS)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_ARCHITECTURES |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Fields in which null says something else than silence.
_NULLABLE = ("sliding_window", "num_key_value_heads")
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
# Options that may differ when a written config is read back.
_FREE = FREE | {"residual_in_fp32", "norm_bias", "vocab_size", "pad_vocab_multiple"}


def is_llama(raw: Json) -> bool:
    """Whether a config is of one of these layouts."""
    return raw.get("model_type") in MODEL_TYPES


def describes(config: CausalLMConfig) -> bool:
    """Whether a model has these layouts' blocks, attention and a dense channel mixer each, whatever their options."""
    return {word.plain for word in parse_pattern(config.pattern, config.n_layers)} == {Word(("attn",), "mlp")}


def describing(config: CausalLMConfig) -> list[str]:
    """The layouts that may hold a model: Qwen3's alone where queries and keys have norms. None without their blocks."""
    if not describes(config):
        return []
    mixers = [word.mixers[0] for word in parse_pattern(config.pattern, config.n_layers)]
    return ["qwen3"] if any(resolved(config, mixer).qk_norm for mixer in mixers) else [*MODEL_TYPES]


def read_config(raw: Json) -> CausalLMConfig:
    """The model that a config of one of these layouts describes.

    Raises:
      ValueError: an option that there is none for here, such as scaled RoPE: names it.
    """
    kind = raw["model_type"]
    null = {name: None for name in _NULLABLE if name in raw}
    raw = _DEFAULTS[kind] | null | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, _DEFAULTS[kind])
    activation = read_activation(raw["hidden_act"])
    base, _ = read_rope(raw)
    windows = _read_windows(raw)
    alike = len({*windows}) == 1
    return CausalLMConfig(
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        pattern="attn/mlp" if alike else _pattern_of(windows),
        norm_eps=float(raw["rms_norm_eps"]),
        vocab_size=raw["vocab_size"],
        pad_vocab_multiple=1,
        tie_embeddings=raw["tie_word_embeddings"],
        attn=AttentionConfig(
            n_heads=raw["num_attention_heads"],
            rope_base=base,
            bias=kind == "qwen2" or (kind != "mistral" and raw["attention_bias"]),
            out_bias=False if kind == "qwen2" else None,
            qk_norm=kind == "qwen3",
            qk_norm_eps=float(raw["rms_norm_eps"]) if kind == "qwen3" else 1e-6,
            window=windows[0] if alike else None,
            **read_heads(raw),
        ),
        mlp=MLPConfig(
            d_ff=raw["intermediate_size"],
            activation=activation,
            bias=raw["mlp_bias"] if kind == "llama" else False,
        ),
    )


def _read_windows(raw: Json) -> list[int | None]:
    """How many positions each layer sees; None: all."""
    n_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if raw["model_type"] == "llama":
        return [None] * max(1, n_layers)
    if raw["model_type"] == "mistral":
        return [window] * max(1, n_layers)
    if not raw["use_sliding_window"]:
        window = None
    after = raw["max_window_layers"]
    said: Any = raw.get("layer_types") or [_LOCAL if i >= after and window else _GLOBAL for i in range(n_layers)]
    if not isinstance(said, list) or len(said) != n_layers or not {*said} <= {_LOCAL, _GLOBAL}:
        raise ValueError(f"layer_types={said!r}, expected one of {_GLOBAL} and {_LOCAL} for each of {n_layers} layers")
    return [window if kind == _LOCAL else None for kind in said] or [None]


def _pattern_of(windows: list[int | None]) -> str:
    words = [f"attn[window={window}]/mlp" if window else "attn/mlp" for window in windows]
    return format_pattern(parse_pattern(" ".join(words), len(words)))


def write_config(config: CausalLMConfig, kind: str = "llama") -> Json:
    """The config.json of a Llama, Mistral, Qwen2 or Qwen3, as `read_config` reads it.

    Args:
      config: one that these layouts `describe`.
      kind: which of MODEL_TYPES.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    words = parse_pattern(config.pattern, config.n_layers)
    attn, mlp = resolved(config, words[0].mixers[0]), resolved(config, words[0].channel or "")
    windows = [resolved(config, word.mixers[0]).window for word in words]
    raw: Json = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
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
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.param_dtype,
        **NO_SPECIAL_TOKENS,
    }
    if kind == "llama":
        raw |= {"attention_bias": attn.bias, "mlp_bias": mlp.bias}
    if kind == "mistral":
        raw["sliding_window"] = windows[0]
    if kind == "qwen3":
        raw["attention_bias"] = attn.bias
    if kind in ("qwen2", "qwen3"):
        window = next(filter(None, windows), None)
        types = [_LOCAL if each else _GLOBAL for each in windows]
        first = types.index(_LOCAL) if window else config.n_layers
        raw |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
        raw |= {"layer_types": types}
    require_held(model_differences(config, read_config(raw), free=_FREE), f"transformers layout of {kind}")
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
