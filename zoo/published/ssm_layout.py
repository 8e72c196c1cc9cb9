"""Published layouts of language models: what their config files mean here, and which tensor is which parameter.

    official       config.json of state-spaces/mamba ("d_model", "ssm_cfg"), or params.json of Codestral-Mamba ("dim");
                   its layers of attention are `mha_layout`'s
    transformers   config.json with "model_type": mamba, falcon_mamba or mamba2; llama and its like: `llama_layout`, and
                   hybrids, which are `hybrid_layout`'s

Both hold the Mambas' tensors under nearly the same names. Reading a config and writing it are inverse to each other; an
option that a layout has no word for is an error, never a guess.

Source: mamba_ssm/models/config_mamba.py and mixer_seq_simple.py; transformers' configuration_{mamba,mamba2,
falcon_mamba}.py; mistral_inference/args.py; the names in the published files.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from flax import nnx

from zoo.layers.mlp import MLPConfig
from zoo.layers.names import unknown_name
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.published import hybrid_layout, llama_layout, mha_layout
from zoo.published.layout_options import (
    FREE,
    INITIAL,
    Blocker,
    Layout,
    NotHeldError,
    differences,
    in_whole_widths,
    require_held,
    require_layout,
    resolved,
)
from zoo.published.tensors import Entry, Json, Table
from zoo.published.transformers_fields import NO_SPECIAL_TOKENS, json_number, number, require_numbers
from zoo.stack.pattern import Word, format_pattern, parse_pattern

EMBEDDINGS: dict[Layout, str] = {
    "official": "backbone.embedding.weight",
    "transformers": "backbone.embeddings.weight",
}


class _Family(NamedTuple):
    """A published kind of mixer: our word for it, and {their option: ours}."""

    word: str
    options: dict[str, str]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _same(text: str) -> dict[str, str]:
    return {name: name for name in text.split()}


# By `ssm_cfg.layer`.
_OFFICIAL = {
    "Mamba1": _Family(
        "mamba",
        {"dt_init_floor": "dt_floor"}
        | _same("d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale conv_bias bias"),
    ),
    "Mamba2": _Family(
        "mamba2",
        {"headdim": "head_dim", "ngroups": "n_groups", "dt_init_floor": "dt_floor"}
        | _same("d_state d_conv conv_init expand d_ssm rmsnorm norm_before_gate D_has_hdim dt_min dt_max dt_limit")
        | _same("bias conv_bias"),
    ),
    "Mamba3": _Family(
        "mamba3",
        {"headdim": "head_dim", "ngroups": "n_groups", "dt_init_floor": "dt_floor"}
        | _same("d_state expand rope_fraction dt_min dt_max A_floor is_outproj_norm is_mimo mimo_rank"),
    ),
}
_OFFICIAL_FIELDS = _names(
    "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
    "fused_add_norm pad_vocab_size_multiple tie_embeddings"
)
# What the repositories of others write beside them, and no model reads: of training, of tokens, of how it was saved.
_OFFICIAL_SILENT = _names(
    "model_type architectures torch_dtype dtype _name_or_path transformers_version auto_map use_cache seq_len "
    "max_seq_len max_length context_length n_ctx n_positions max_position_embeddings bos_token_id eos_token_id "
    "pad_token_id initializer_cfg initializer_range"
)
# Options that say how to compute, not what.
_OFFICIAL_RUNTIME = _names(
    "chunk_size use_fast_path use_mem_eff_path layer_idx device dtype process_group sequence_parallel dropout n_layer "
    "fuse_pregate_headwise_norm"
)
# Options that one family alone has and that are spelled out where they are read. The second is ours.
_OFFICIAL_OTHER = {"Mamba1": _names(""), "Mamba2": _names("A_init_range"), "Mamba3": _names("A_activation")}
CODESTRAL_FIELDS = _names(
    "dim n_layers vocab_size n_groups rms_norm residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings "
    "model_type"
)

_TRANSFORMERS_MAMBA = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_floor",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
}
_TRANSFORMERS_MAMBA1 = {"time_step_rank": "dt_rank", "time_step_init_scheme": "dt_init", "time_step_scale": "dt_scale"}
# By `model_type`.
_TRANSFORMERS = {
    "mamba": _Family("mamba", _TRANSFORMERS_MAMBA | _TRANSFORMERS_MAMBA1),
    "falcon_mamba": _Family("mamba", _TRANSFORMERS_MAMBA | _TRANSFORMERS_MAMBA1 | {"mixer_rms_eps": "bcdt_rms_eps"}),
    "mamba2": _Family(
        "mamba2",
        _TRANSFORMERS_MAMBA | {"head_dim": "head_dim", "n_groups": "n_groups", "time_step_limit": "dt_limit"},
    ),
}
MODEL_TYPES = tuple(_TRANSFORMERS)
_ARCHITECTURES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
# What transformers takes where a config leaves a field out, other than what we take.
_TRANSFORMERS_DEFAULTS: dict[str, Json] = {
    "mamba": {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True},
    "falcon_mamba": {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True},
    "mamba2": {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False}
    | {"n_groups": 8},
}
# Fields without a default here that are numbers, too.
_NUMBERS: tuple[str, ...] = (
    "state_size",
    "conv_kernel",
    "expand",
    "intermediate_size",
    "head_dim",
    "num_heads",
    "layer_norm_epsilon",
)
_NUMBERS += ("time_step_min", "time_step_max", "time_step_floor", "time_step_scale")


def official_mlp(d_intermediate: int) -> MLPConfig:
    """The channel mixer of official configs: SwiGLU, its width rounded up to a multiple of 128."""
    return MLPConfig(d_ff=-(-d_intermediate // 128) * 128, init="uniform")


def read_config(raw: Json) -> CausalLMConfig:
    """The model that a published config describes, in any of the layouts.

    Raises:
      ValueError: a layout that is not known, or an option that its family does not have or that we do not: names it.
    """
    if llama_layout.is_llama(raw):
        return llama_layout.read_config(raw)
    if hybrid_layout.is_hybrid(raw):
        return hybrid_layout.read_config(raw)
    if "dim" in raw and "n_layers" in raw:
        return _read_codestral(raw)
    if "d_model" in raw and "n_layer" in raw and "hidden_size" not in raw:
        return _read_official(raw)
    if "model_type" in raw:
        return _read_transformers(raw)
    raise ValueError(
        "the config is of no layout that is known: neither state-spaces/mamba's (d_model, n_layer), nor "
        "Codestral-Mamba's (dim, n_layers), nor transformers' (model_type)"
    )


def require_official_fields(extra: Json) -> None:
    """Raises a ValueError where fields are to be written that the official code does not know, and would not load."""
    if unknown := extra.keys() - _OFFICIAL_FIELDS:
        raise ValueError(unknown_name("field of an official config", sorted(unknown)[0], _OFFICIAL_FIELDS))


def _read_official(raw: Json) -> CausalLMConfig:
    if unknown := {name for name, value in raw.items() if value is not None} - _OFFICIAL_FIELDS - _OFFICIAL_SILENT:
        raise ValueError(unknown_name("field of an official config", sorted(unknown)[0], _OFFICIAL_FIELDS))
    options = dict(raw.get("ssm_cfg") or {})
    layer = options.pop("layer", "Mamba1")
    if layer not in _OFFICIAL:
        raise ValueError(f"ssm_cfg.layer={layer!r}, expected one of {', '.join(_OFFICIAL)}")
    attends = set(raw.get("attn_layer_idx") or ())
    if outside := attends - {*range(raw["n_layer"])}:
        raise ValueError(f"attn_layer_idx: {min(outside)}, expected layers 0 to {raw['n_layer'] - 1}")
    family = _OFFICIAL[layer]
    unknown = options.keys() - family.options.keys() - _OFFICIAL_OTHER[layer] - _OFFICIAL_RUNTIME
    if unknown and layer == "Mamba3":
        warnings.warn(f"ssm_cfg has {sorted(unknown)}: ignored, as the official Mamba3 does", stacklevel=4)
    elif unknown:
        raise ValueError(f"ssm_cfg: {unknown_name(f'option of {layer}', sorted(unknown)[0], family.options)}")
    mixer = {family.options[name]: value for name, value in options.items() if name in family.options}
    if layer == "Mamba2" and "A_init_range" in options:
        mixer["A_min"], mixer["A_max"] = options["A_init_range"]
    if layer == "Mamba3" and "A_activation" in options:
        mixer["A_activation"] = options["A_activation"]
    width = raw.get("d_intermediate") or 0
    words = ["attn" if i in attends else family.word for i in range(raw["n_layer"])] if attends else [family.word]
    channel = "mlp" if width else None
    return _config(
        family.word,
        mixer,
        d_model=raw["d_model"],
        n_layers=raw["n_layer"],
        pattern=format_pattern(tuple(Word((word,), channel) for word in words)),
        norm="rms" if raw.get("rms_norm", True) else "layer",
        residual_in_fp32=raw.get("residual_in_fp32", True),
        vocab_size=raw.get("vocab_size", 50_277),
        pad_vocab_multiple=raw.get("pad_vocab_size_multiple", 8),
        tie_embeddings=raw.get("tie_embeddings", True),
        **({"mlp": official_mlp(width)} if width else {}),
        **({"attn": mha_layout.read_attention(raw.get("attn_cfg") or {}, raw["d_model"])} if attends else {}),
    )


def _read_codestral(raw: Json) -> CausalLMConfig:
    if raw.get("model_type", "mamba") != "mamba":
        raise ValueError(f"model_type={raw['model_type']!r} in a params.json, expected 'mamba'")
    if unknown := {name for name, value in raw.items() if value is not None} - CODESTRAL_FIELDS - _OFFICIAL_SILENT:
        raise ValueError(unknown_name("field of a params.json", sorted(unknown)[0], CODESTRAL_FIELDS))
    return _read_official(
        {
            "d_model": raw["dim"],
            "n_layer": raw["n_layers"],
            "ssm_cfg": {"layer": "Mamba2", "ngroups": raw.get("n_groups", 1)},
            **{name: raw[name] for name in raw.keys() & _OFFICIAL_FIELDS},
        }
    )


def _read_transformers(raw: Json) -> CausalLMConfig:
    kind = raw["model_type"]
    if kind not in _TRANSFORMERS:
        raise ValueError(
            unknown_name("model_type", str(kind), [*_TRANSFORMERS, *llama_layout.MODEL_TYPES, *hybrid_layout.FAMILIES])
        )
    raw = _TRANSFORMERS_DEFAULTS[kind] | raw
    require_numbers(raw, _TRANSFORMERS_DEFAULTS[kind] | dict.fromkeys(_NUMBERS, 0))
    family = _TRANSFORMERS[kind]
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={raw['hidden_act']!r}, expected 'silu'")
    mixer = {family.options[name]: raw[name] for name in family.options if name in raw}
    eps = raw.get("layer_norm_epsilon", 1e-5)
    if kind == "falcon_mamba":
        mixer["bcdt_rms"] = True
    inner = int(raw.get("expand", 2) * raw["hidden_size"])
    if kind == "mamba2":
        mixer["norm_eps"] = eps
        heads = raw.get("num_heads", inner // raw.get("head_dim", 64)) * raw.get("head_dim", 64)
        if heads != inner:
            raise ValueError(f"num_heads * head_dim={heads}, expected expand * hidden_size = {inner}")
    elif raw.get("intermediate_size", inner) != inner:  # it prevails there: Falcon-Mamba-7B says expand 16 and means 2
        mixer["expand"] = raw["intermediate_size"] / raw["hidden_size"]
    return _config(
        family.word,
        mixer,
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        pattern=family.word,
        norm_eps=eps,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        vocab_size=raw["vocab_size"],
        pad_vocab_multiple=1,
        tie_embeddings=raw["tie_word_embeddings"],
    )


def _config(word: str, mixer: Json, **fields) -> CausalLMConfig:
    """A config with options of one mixer, their values as a config file spells them."""
    if mixer.get("dt_rank") == "auto":
        mixer["dt_rank"] = None
    if "dt_limit" in mixer:
        mixer["dt_limit"] = tuple(number(x) for x in mixer["dt_limit"])
    plain = getattr(CausalLMConfig(), word)
    for name, value in mixer.items():
        if type(value) is int and isinstance(getattr(plain, name), float):  # "expand": 2
            mixer[name] = float(value)
    options = dataclasses.replace(plain, **mixer)
    return CausalLMConfig(**fields, **{word: options})


def write_config(config: CausalLMConfig, layout: Layout) -> Json:
    """The config file of a model in a layout, as `read_config` reads it.

    Raises:
      ValueError: an unknown layout, or a model that the layout cannot describe: names the option.
    """
    require_layout(layout)
    if layout == "transformers" and (kinds_of := _with_attention(config)):
        return _first_that_holds(config, kinds_of)
    words = parse_pattern(config.pattern, config.n_layers)
    attends = [i for i, word in enumerate(words) if word.plain.mixers == ("attn",)] if layout == "official" else []
    attention = {words[i] for i in attends}
    kinds = {*words} - attention
    word = kinds.pop() if len(kinds) == 1 and len(attention) < 2 else Word(())
    if any(each[1:] != word[1:] for each in attention):
        word = Word(())
    mixer, channel = word.mixers[0] if len(word.mixers) == 1 else "", word.channel or ""
    kind = _kind(config, mixer, layout)
    if kind is None or channel not in ("", "mlp" if layout == "official" else ""):
        known = f"mamba, mamba2, attn/mlp, and those of {', '.join(hybrid_layout.FAMILIES)}"
        if layout == "official":
            known = "mamba, mamba2, mamba3, with attn or without, each block with /mlp or none"
        raise ValueError(f"pattern={config.pattern!r} has no {layout} layout; those that have one: {known}")
    raw = _write_official(config, kind, channel) if layout == "official" else _write_transformers(config, kind)
    if attends:
        attn = resolved(config, words[attends[0]].mixers[0])
        raw |= {"attn_layer_idx": attends, "attn_cfg": mha_layout.write_attention(attn)}
    # What the layout cannot say is what reading it back gives another value.
    back = dataclasses.replace(read_config(raw), dtype=config.dtype, param_dtype=config.param_dtype)
    blockers: list[Blocker] = []
    for field in ("mlp", mixer) if channel else (mixer,):
        blockers += _differences(getattr(config, field), getattr(back, field), f"{field}.")
    if attends:
        blockers += _differences(attn, resolved(back, "attn"), "attn.")
    if channel and (ours := config.mlp.width(config.d_model)) != back.mlp.d_ff:
        blockers.append(Blocker(f"mlp.d_ff={ours}", "multiples of 128"))
    blockers += _differences(config, back, "")
    require_held(blockers, f"{layout} layout")
    return raw


def _with_attention(config: CausalLMConfig) -> list[str]:
    """The layouts of Llama and its like, and of the hybrids, that have a model's blocks."""
    return llama_layout.describing(config) + hybrid_layout.describing(config)


def _first_that_holds(config: CausalLMConfig, kinds: Sequence[str]) -> Json:
    """The config in the first of some layouts that can describe it.

    Raises:
      ValueError: none can: names all that is in the way of the one that lacks least.
    """
    errors: list[ValueError] = []
    for kind in kinds:
        try:
            layout = llama_layout if kind in llama_layout.MODEL_TYPES else hybrid_layout
            return layout.write_config(config, kind)
        except ValueError as error:
            errors.append(error)
    raise min(errors, key=lambda error: len(error.blockers) if isinstance(error, NotHeldError) else math.inf)


# Options that a layout need not hold: how to compute, and what is initialised or dropped in training.
_FREE = FREE | INITIAL | _names("causal d_ff bcdt_rms_eps vocab_size pad_vocab_multiple")


def _differences(config: Any, back: Any, prefix: str) -> list[Blocker]:
    free = _FREE - {"bcdt_rms_eps"} if getattr(config, "bcdt_rms", False) else _FREE
    return differences(config, back, free=free, prefix=prefix)


def _kind(config: CausalLMConfig, mixer: str, layout: Layout) -> str | None:
    """The family's name in a layout."""
    if layout == "transformers" and mixer == "mamba":
        return "falcon_mamba" if config.mamba.bcdt_rms else "mamba"
    families = _OFFICIAL if layout == "official" else _TRANSFORMERS
    return next((kind for kind, family in families.items() if family.word == mixer), None)


def _write_official(config: CausalLMConfig, kind: str, channel: str) -> Json:
    family = _OFFICIAL[kind]
    mixer = getattr(config, family.word)
    plain = type(mixer)()
    options = {
        theirs: getattr(mixer, ours)
        for theirs, ours in family.options.items()
        if getattr(mixer, ours) != getattr(plain, ours)
    }
    if family.word == "mamba2" and (mixer.A_min, mixer.A_max) != (plain.A_min, plain.A_max):
        options["A_init_range"] = [mixer.A_min, mixer.A_max]
    if family.word == "mamba3" and mixer.A_activation != plain.A_activation:
        options["A_activation"] = mixer.A_activation
    return {
        "d_model": config.d_model,
        "d_intermediate": config.mlp.width(config.d_model) if channel else 0,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ({} if kind == "Mamba1" else {"layer": kind}) | options,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.norm == "rms",
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def _write_transformers(config: CausalLMConfig, kind: str) -> Json:
    family = _TRANSFORMERS[kind]
    mixer = getattr(config, family.word)
    if mixer.expand % 1:
        mixer = in_whole_widths(mixer, config.d_model)
    raw = {theirs: getattr(mixer, ours) for theirs, ours in family.options.items()}
    inner = int(mixer.expand * config.d_model)
    if family.word == "mamba":
        raw["time_step_rank"] = mixer.dt_rank or "auto"
        raw["intermediate_size"] = inner
    else:
        raw["time_step_limit"] = [json_number(x) for x in mixer.dt_limit]
        raw["num_heads"] = inner // mixer.head_dim
    raw["expand"] = int(mixer.expand)
    return raw | {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.padded_vocab_size,  # padding rows are tokens like others there
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.param_dtype,
        **NO_SPECIAL_TOKENS,
    }


def tensor_table(model: CausalLM, layout: Layout) -> Table:
    """The tensors of a model's file. Where the head is tied, a file may store it all the same."""
    if llama_layout.describes(model.config):
        return llama_layout.tensor_table(model)
    table: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *owner, leaf = (str(part) for part in path)
        name = ".".join(owner).replace("mlp.down_proj", "mlp.fc2")
        if name == "embedding":
            name = EMBEDDINGS[layout].removesuffix(".weight")
        weight = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight"}.get(leaf, f".{leaf}")
        if re.search(r"mlp\.(up|gate)_proj$", name):
            if name.endswith("up_proj"):  # fc1 holds the value, then the gate
                gate = tuple("gate_proj" if part == "up_proj" else part for part in path)
                table[name.replace("up_proj", "fc1") + weight] = Entry((path, gate), "linear")
            continue
        kind: Literal["same", "linear", "conv"] = "same"
        if leaf == "kernel":
            kind = "conv" if owner[-1] == "conv1d" else "linear"
        table[name + weight] = Entry((path,), kind)
    copies = {"lm_head.weight": EMBEDDINGS[layout]} if model.config.tie_embeddings else {}
    return Table(mha_layout.fuse(table), copies)
