"""Our own layout, which holds every model: model.safetensors, a tensor a parameter, and config.json.

    {"format": "subquadratic-zoo", "format_version": 1, "kind": "CausalLM", "config": {"d_model": 128, ...}, ...}

Tensors are called as parameters are, "backbone.layers.0.mixer.A_log", and lie as they do. `config` is the model's in
full, every field of it, so that a default that changes later changes no model. `mixers` are the options in full of
mixers that were registered: a pattern names them, and who loads the model must have registered them, too. `quantized`
says of each weight that is kept in a few bits how it is: its tensors are codes and scales, "....kernel.codes". What
else stands beside them says nothing about the model: names of classes, ids of special tokens.
"""

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from flax import nnx

from zoo.layers.names import unknown_name
from zoo.models.build import MODELS, Model, ModelConfig, stacks_of
from zoo.published.tensors import Entry, Json, Table
from zoo.reuse.codes import Bits, Quantized
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, OURS, find_kind
from zoo.stack.option_values import from_dict
from zoo.stack.pattern import mixer_name, parse_pattern

FORMAT = "subquadratic-zoo"
VERSION = 2
FIELDS = frozenset(("format", "format_version", "kind", "config", "mixers", "quantized"))
"""What config.json says of the model."""
STORED = (nnx.Param, Quantized)
"""The variables that are stored."""


def is_native(raw: Json) -> bool:
    """Whether a config.json is of this layout."""
    return raw.get("format") == FORMAT


def write_config(config: ModelConfig, quantized: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Json:
    """What config.json says of a model, and of how weights of it are quantised, see `options_of`."""
    said: Json = {
        "format": FORMAT,
        "format_version": 1,
        "kind": MODELS[type(config)].__name__,
        "config": dataclasses.asdict(config),
        "mixers": {name: _options(name) for name in _registered(config)},
    }
    if quantized:
        said |= {"format_version": 2, "quantized": {**quantized}}
    return json.loads(json.dumps(said))


def read_config(raw: Json) -> ModelConfig:
    """The model of a config.json.

    Raises:
      ValueError: of a later version; a kind or field that there is not; a value that does not fit; a mixer that is not
        registered, or is with other options.
      KeyError: `kind` or `config` is missing.
    """
    version = raw.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"format_version={version!r}, expected 1 to {VERSION}: update the library to read later ones")
    kinds = {model.__name__: config for config, model in MODELS.items()}
    if raw["kind"] not in kinds:
        raise ValueError(unknown_name("kind", raw["kind"], kinds))
    mixers: Mapping[str, Json] = raw.get("mixers", {})
    for name, options in mixers.items():
        if name not in MIXERS and name not in CHANNEL_MIXERS:
            raise ValueError(
                f"mixer {name!r} is not known here: call zoo.register_mixer or zoo.register_channel_mixer first, with "
                f"the options {options}"
            )
        if (here := _options(name)) != options:
            raise ValueError(f"mixer {name!r} is registered with the options {here}, the model has {options}")
    return from_dict(kinds[raw["kind"]], raw["config"])


def read_quantized(raw: Json) -> dict[str, dict[str, Any]]:
    """How weights are quantised, by name.

    Raises:
      ValueError: what `quantize` does not make.
    """
    said = raw.get("quantized", {})
    for name, how in said.items() if isinstance(said, dict) else [("quantized", said)]:
        if not isinstance(how, dict) or how.keys() != {"bits", "group_size"}:
            raise ValueError(f"{name}={how!r}, expected bits and group_size")
        bits, group_size = how["bits"], how["group_size"]
        each = bits if isinstance(bits, list) and bits else [bits]  # of a map, or of each expert
        if {*map(type, (*each, group_size))} != {int} or not {*each} <= {*get_args(Bits)} or group_size < 1:
            raise ValueError(f"{name}={how!r}, expected bits and group_size")
    return said


def tensor_table(model: Model) -> Table:
    """Which tensor is which parameter."""
    paths = nnx.to_flat_state(nnx.state(model, STORED))
    return Table({".".join(map(str, path)): Entry((path,), "same") for path, _ in paths})


def _registered(config: ModelConfig) -> list[str]:
    """The mixers of a model that are not the zoo's own."""
    words = [word for part in stacks_of(config).values() for word in parse_pattern(part.pattern, part.n_layers)]
    mixers = {mixer_name(mixer) for word in words for mixer in (*word.mixers, word.channel or "") if mixer}
    return sorted(mixers - OURS)


def _options(name: str) -> Any:
    """The options that a registered mixer has where nobody changes them, as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(find_kind(name).config_default), default=repr))
