"""Published hybrids in transformers' layout: what their config.json means here, and which tensor is which parameter.

    jamba             Mamba-1 and attention, each with an MLP or a mixture of experts
    bamba             Mamba-2 and attention, each with an MLP; half of a head rotated
    falcon_h1         Mamba-2 beside attention in every block, with the multipliers of its parametrisation
    granitemoehybrid  Mamba-2 and attention, each with a mixture of experts, or an MLP (Granite 4)
    nemotron_h        Mamba-2, attention, MLPs and mixtures, each a block of its own
    zamba2            Mamba-2, at some depths behind a transformer that several share

Reading and writing a config are inverse to each other; what a layout has no word for is an error that names it. A model
may have none of one of the kinds, as no attention: its config then says use_cache=false, since transformers (5.24) has
no cache for models that never attend, and computes them, and generates, without. The
residual stream is in the dtype of the weights there and in at least float32 here, unless residual_in_fp32=False.

What each of them says is in a file of its own, `hybrid_jamba.py` and so on (`hybrid_families.py` names them all).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

import ssm
from zoo.layers.zamba2 import Zamba2
from zoo.models.causal import CausalLM, CausalLMConfig
from zoo.published.hybrid_families import FAMILIES
from zoo.published.layout_options import (
    FREE,
    INITIAL,
    in_whole_widths,
    model_differences,
    require_held,
    resolved,
)
from zoo.published.tensors import Entry, Json, Kind, Table, renamed
from zoo.published.transformers_fields import (
    NO_SPECIAL_TOKENS,
    json_number,
    number,
    read_activation,
    require_numbers,
    write_activation,
)
from zoo.stack.backbone_config import word_config
from zoo.stack.pattern import Word, format_pattern, mixer_name, parse_pattern

WORD_EMBEDDINGS = "embeddings.weight"
"""The token vectors' short name in Nemotron-H; in the others it is that of Llama's."""

_NULLABLE = ("num_key_value_heads", "mamba_d_ssm")
# Of the layouts that say an inner width as a whole number of d_model: whose.
_WHOLE_WIDTHS = {"jamba": "mamba", "bamba": "mamba2", "granitemoehybrid": "mamba2", "zamba2": "mamba2"}
# Options that may differ when a written config is read back.
_FREE = FREE | INITIAL | {"residual_in_fp32", "norm_bias", "vocab_size", "pad_vocab_multiple"}
_FREE |= {"balance_weight", "z_weight", "correction_weight", "causal"}


def is_hybrid(raw: Json) -> bool:
    """Whether a config is of one of these layouts."""
    return raw.get("model_type") in FAMILIES


def describing(config: CausalLMConfig) -> list[str]:
    """The layouts that have a model's blocks, whatever their options, also where it has none of one of their kinds.

    A Mamba-2 of nothing else has a layout of its own.
    """
    words = {str(word.plain) for word in parse_pattern(config.pattern, config.n_layers)}
    return [kind for kind, family in FAMILIES.items() if words <= family.words and words != {"mamba2"}]


def read_config(raw: Json) -> CausalLMConfig:
    """The model that a config of one of these layouts describes.

    Raises:
      ValueError: an option that there is none for here: names it.
    """
    kind = raw["model_type"]
    family = FAMILIES[kind]
    null = {name: None for name in _NULLABLE if name in raw}  # where it means something else than nothing said
    raw = family.defaults | null | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, family.defaults)
    for name, value in family.only.items():
        if raw[name] != value:
            raise ValueError(f"{name}={raw[name]!r} is not supported in {kind}, only {value!r}")
    said = {ours: raw[theirs] for theirs, ours in family.fields.items() if theirs in raw} | family.read(raw)
    words = tuple(word for text in said.pop("words") for word in parse_pattern(text, 1))
    said |= {"vocab_size": raw["vocab_size"], "pad_vocab_multiple": 1, "pattern": format_pattern(words)}
    return _config(said)


def _config(said: Mapping[str, Any]) -> CausalLMConfig:
    """A config with fields as they are spelled in a file, "attn.n_heads" for those of a mixer."""
    own: dict[str, Any] = {}
    mixers: dict[str, dict[str, Any]] = {}
    for name, value in said.items():
        owner, _, field = name.rpartition(".")
        (mixers.setdefault(owner, {}) if owner else own)[field] = value
    plain = CausalLMConfig()
    for name, options in mixers.items():
        own[name] = _replace(getattr(plain, name), options)
    return _replace(plain, own)


def _replace(options: Any, said: Mapping[str, Any]) -> Any:
    values = {}
    for name, value in said.items():
        if name == "activation":
            value = read_activation(value)
        elif name == "dt_limit":
            value = tuple(map(number, value))
        elif type(value) is int and isinstance(getattr(options, name), float):  # "expand": 2
            value = float(value)
        values[name] = value
    return dataclasses.replace(options, **values)


def write_config(config: CausalLMConfig, kind: str) -> Json:
    """The config.json of a hybrid, as `read_config` reads it.

    Args:
      config: the model.
      kind: one of the layouts that have its blocks, see `describing`.

    Raises:
      ValueError: the layout cannot describe the model: names all options that are in the way.
    """
    family = FAMILIES[kind]
    words = parse_pattern(config.pattern, config.n_layers)
    mixers = [mixer for word in words for mixer in (*word.mixers, *filter(None, [word.channel]))]
    known = {mixer for word in family.words for mixer in parse_pattern(word, 1)[0].mixers}
    options = {name: _unused(config, name) for name in sorted(known)}
    options |= {mixer_name(mixer): resolved(config, mixer) for mixer in reversed(mixers)}
    if "zamba2" in options:  # there is a Mamba-2 in it
        options["mamba2"] = resolved(config, "mamba2")
    free = _FREE
    if kind in _WHOLE_WIDTHS and (mixer := _WHOLE_WIDTHS[kind]) and options[mixer].expand % 1:
        options[mixer] = in_whole_widths(options[mixer], config.d_model)
        free = free | {"head_dim"}  # follows from the width
    plain_words = tuple(word.plain for word in words)
    raw: Json = {"architectures": [family.architecture], "model_type": kind}
    plain = family.defaults
    for theirs, ours in family.fields.items():
        owner, _, field = ours.rpartition(".")
        source = options.get(owner) if owner else config
        value = plain.get(theirs) if source is None else getattr(source, field)
        if source is not None and field == "activation":
            value = write_activation(getattr(source, field))
        if source is not None and field == "dt_limit":
            value = [json_number(x) for x in getattr(source, field)]
        raw[theirs] = value
    raw |= family.only | family.write(config, plain_words, options)
    raw |= {
        "vocab_size": config.padded_vocab_size,  # padding rows are tokens like others there
        "dtype": config.param_dtype,
        **NO_SPECIAL_TOKENS,
    }
    if {"attn", "zamba2"}.isdisjoint(map(mixer_name, mixers)):
        raw["use_cache"] = False  # transformers (5.24) computes such a model, but its caches ask for attention's length
    require_held(model_differences(config, read_config(raw), free=free), f"transformers layout of {kind}")
    return raw


def _unused(config: CausalLMConfig, name: str) -> Any:
    """Options for a mixer that no block has, near the config's: a file has to say something of it."""
    options, plain = word_config(config, name), getattr(CausalLMConfig(), name)
    if isinstance(options, ssm.Mamba2Config):
        options = dataclasses.replace(options, dt_limit=plain.dt_limit, n_groups=1)
        return resolved(_with(config, name, in_whole_widths(options, config.d_model)), name)
    if isinstance(options, ssm.MambaConfig):
        return resolved(_with(config, name, in_whole_widths(options, config.d_model)), name)
    options = resolved(config, name)
    return dataclasses.replace(options, rope_base=options.rope_base or plain.rope_base)


def _with(config: CausalLMConfig, name: str, options: Any) -> CausalLMConfig:
    return dataclasses.replace(config, **{name: options})


def tensor_table(model: CausalLM, kind: str) -> Table:
    """The tensors of a hybrid's file under their short names."""
    family = FAMILIES[kind]
    words = parse_pattern(model.config.pattern, model.config.n_layers)
    places = _shared_places(model)
    entries: dict[str, Entry] = {}
    stacks: dict[str, tuple[str, ...]] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        ours = ".".join(map(str, path))
        name = renamed(_with_mixers(ours, words), [*family.renamed, (r"\.(kernel|scale|embedding)$", ".weight")])
        paths: tuple[tuple, ...] = (path,)
        depth: Any = path[2] if len(path) > 2 else None
        if path[:2] == ("backbone", "shared"):
            depth = next(i for i, (_, _, block) in places.items() if block == path[2])
        if depth in places:
            first, order, _ = places[depth]
            name = name.replace("FIRST", str(first)).replace("ORDER", str(order))
            # Its norm is the mixer's own here, a block's there.
            name = name.replace(f"layers.{depth}.mamba.norm.", f"layers.{depth}.mamba_decoder.input_layernorm.")
        if kind in ("granitemoehybrid", "zamba2") and (part := re.search(_GATED, ours)):
            if part[1] == "gate":  # its matrices come first, those of up_proj below them
                continue
            paths = (tuple("gate_proj" if step == "up_proj" else step for step in path), path)
        tensor: Kind = "linear" if path[-1] == "kernel" or len(paths) > 1 else "same"
        if "conv1d" in path and path[-1] == "kernel":
            tensor = "conv"
        entries[name] = Entry(paths, tensor)
        if kind in ("jamba", "nemotron_h") and ".experts." in name:
            before, after = name.split(".experts.")
            stacks[name] = tuple(f"{before}.experts.{e}.{after}" for e in range(param.shape[0]))
    embeddings = next(name for name in entries if entries[name].paths[0][0] == "embedding")
    copies = {"lm_head.weight": embeddings} if model.config.tie_embeddings else {}
    for depth, (first, _, _) in places.items():  # a file may hold what is shared at every depth
        own, shared = f"layers.{depth}.shared_transformer.", f"layers.{first}.shared_transformer."
        if depth != first:
            copies |= {name.replace(shared, own): name for name in entries if name.startswith(shared)}
    return Table(entries, copies, ignored=re.compile(r"mtp\."), stacks=stacks)


# The projections of gated channel mixers that are one tensor in some layouts.
_GATED = r"\.(?:mlp\.(?:.*\.)?|shared\.\d+\.)(gate|up)_proj\."


def _shared_places(model: CausalLM) -> dict[int, tuple[int, int, int]]:
    """For each depth with a shared transformer: the first that has the same, how many come before, which it is."""
    blocks = {
        i: b.mixer.shared_name(b.mixer.config)
        for i, b in enumerate(model.backbone.layers)
        if isinstance(b.mixer, Zamba2)
    }
    first: dict[str, int] = {}
    names = model.backbone.shared_names
    return {i: (first.setdefault(k, i), order, names.index(k)) for order, (i, k) in enumerate(blocks.items())}


def _with_mixers(name: str, words: tuple[Word, ...]) -> str:
    """Our name of a tensor with the mixer's kind in place of `mixer`, except where a block is one mixer."""
    layer = re.match(r"backbone\.layers\.(\d+)\.mixer\.(?:mixers\.(\d+)\.)?", name)
    if not layer or not (word := words[int(layer[1])]).channel:
        return name
    mixer = mixer_name(word.mixers[int(layer[2] or 0)])
    theirs = "self_attn" if mixer == "attn" else "mamba"
    return f"backbone.layers.{layer[1]}.{theirs}.{name[layer.end() :]}"


def full_name(name: str, kind: str) -> str:
    """A tensor's name in the file, out of the short one."""
    return name if name.startswith("lm_head.") else FAMILIES[kind].prefix + name


def short_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors under their short names, out of those without "model."."""
    return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
