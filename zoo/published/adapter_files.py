"""Adapters alone in a folder: a few MB beside the gigabytes of the model that they adapt.

    zoo.save_adapter(tuned, "adapter")
    tuned = zoo.load_adapter(zoo.from_pretrained("model"), "adapter")

The files are peft's (adapter_config.json, adapter_model.safetensors). Where transformers has a module for each adapted
map, tensors have the names that peft gives them there, and it loads the folder; otherwise those of our parameters.
Parameters that are trained as they are, a classifier's say, lie beside them: peft's modules_to_save.

Source: peft's LoraConfig and `get_peft_model_state_dict`, version 0.21.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.models.frozen import Frozen
from zoo.published.adapted_run import is_adapted, load_trained
from zoo.published.json_files import read_json
from zoo.published.pretrained import published_tensors
from zoo.published.tensors import Entry
from zoo.published.weight_files import open_weights, save_weights
from zoo.reuse.adapt import LoRAWeight, add_lora
from zoo.reuse.linear_maps import LinearMap, Model, linear_maps, module_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options of peft's that change what an adapter computes, and the only values that mean the same here.
_PLAIN: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "rank_pattern": {}}
_PLAIN |= {"alpha_pattern": {}, "layers_to_transform": None, "fan_in_fan_out": False}
_PLAIN |= {"trainable_token_indices": None, "target_parameters": None, "megatron_config": None, "use_bdlora": None}


def save_adapter(model: nnx.Module, folder: str | os.PathLike) -> None:
    """Writes the adapters of a model and what else of it is trained, and no other of its parameters.

    Args:
      model: from `add_lora`, once.
      folder: made if it does not exist. An adapter that lies there is replaced.

    Raises:
      ValueError: no adapters; adapters upon adapters; modules of which some parameters are trained and others are not.

    Examples:
      >>> import os, tempfile
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> folder = tempfile.mkdtemp()
      >>> zoo.save_adapter(zoo.add_lora(model, rank=2, rngs=nnx.Rngs(0)), folder)
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    found = _adapters(model)
    weights = {name: linear.weight for name, linear in found.items()}
    if not weights:
        raise ValueError("the model has no adapters: make some with zoo.add_lora")
    if nested := [name for name, weight in weights.items() if isinstance(weight.base, LoRAWeight)]:
        raise ValueError(f"{nested[0]} has an adapter upon another: merge_lora makes one model of them")
    others = _trained_modules(model, weights)
    published = _published(model)
    if not {_path(name) for name in (*weights, *others)} <= published.keys():
        published = {}
    tensors = {}
    for name, weight in weights.items():
        theirs = _module_of(name, published)
        tensors[f"{theirs}.lora_A.weight"] = np.swapaxes(np.asarray(weight.lora_A[...]), -1, -2)
        tensors[f"{theirs}.lora_B.weight"] = np.swapaxes(np.asarray(weight.lora_B[...]), -1, -2)
        if weight.magnitude is not None:
            tensors[f"{theirs}.lora_magnitude_vector"] = np.asarray(weight.magnitude[...])
    for name, param in others.items():
        theirs, kind = published.get(_path(name), (name, None))
        value = np.asarray(param[...])
        tensors[(_PREFIX if published else "") + theirs] = value if kind is None else kind.join([value])
    first = next(iter(weights.values()))
    modules = {published.get(_path(name), (name, None))[0].rpartition(".")[0] for name in others}
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_dora": first.magnitude is not None,
        "target_modules": sorted({_module_of(name, published).split(".")[-1] for name in weights}),
        "modules_to_save": sorted(modules) or None,
        "bias": "none",
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in save_weights(folder / "adapter.partial", tensors, max_shard_bytes=1 << 62):
        os.replace(file, folder / WEIGHTS)
    (folder / "adapter.partial").rmdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Model, folder: str | os.PathLike, *, revision: str | int | None = None) -> Model:
    """A model with the adapters of a folder, which are trained on or merged as those of `add_lora` are.

    Args:
      model: what they were made for. It stays as it is.
      folder: as `save_adapter` or peft wrote it; or that of a run that trains adapters.
      revision: of such a run, its checkpoint: a step, "latest" or "best". None: latest.

    Raises:
      FileNotFoundError: no adapter lies there.
      ValueError: kinds and options of adapters that are not known here; tensors that are no adapter of the model, or
        of another shape.

    Examples:
      >>> import tempfile
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> adapted, folder = zoo.add_lora(model, rank=2, rngs=nnx.Rngs(0)), tempfile.mkdtemp()
      >>> zoo.save_adapter(adapted, folder)
      >>> again = zoo.load_adapter(model, folder)
      >>> bool(jnp.allclose(again(jnp.ones((1, 3), jnp.int32)), adapted(jnp.ones((1, 3), jnp.int32))))
      True
    """
    folder = Path(folder)
    if is_adapted(folder):
        return load_trained(folder, model, revision)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}")
    raw = read_json(folder / CONFIG)
    for option, plain in _PLAIN.items():
        if raw.get(option, plain) not in (plain, None):
            raise ValueError(f"{folder / CONFIG}: {option}={raw[option]!r}, expected {plain!r}")
    rank, alpha = _number(folder, raw, "r"), _number(folder, raw, "lora_alpha")
    if raw.get("use_rslora"):
        alpha *= math.sqrt(rank)
    tensors = open_weights(folder / WEIGHTS)
    published = _published(model) if all(name.startswith(_PREFIX) for name in tensors) else {}
    known = {_module_of(name, published): name for name in linear_maps(model, ".*")}
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    whole = {_PREFIX + name: path for path, (name, _) in published.items()} or {_name(path): path for path in params}
    values: dict[str, dict[str, np.ndarray]] = {}
    others: dict[tuple, np.ndarray] = {}
    for key, tensor in tensors.items():
        theirs, _, part = key.removesuffix(".weight").rpartition(".")
        if raw.get("modules_to_save") and key in whole:
            kind = published[whole[key]][1] if published else None
            value, shape = tensor.read(), params[whole[key]].shape
            if value.shape != (shape if kind is None else kind.shape([shape])):
                raise ValueError(f"{folder / WEIGHTS}: {key} has shape {value.shape}, which is not the model's")
            others[whole[key]] = value if kind is None else kind.split(value, [shape])[0]
            continue
        if theirs not in known or part not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise ValueError(f"{folder / WEIGHTS}: {key} is no adapter of a map of this model")
        values.setdefault(known[theirs], {})[part] = tensor.read()
    dora = bool(raw.get("use_dora"))
    targets = "|".join(module_name(name).replace(".", r"\.") for name in values)
    options: dict[str, Any] = {"rank": int(rank), "alpha": float(alpha), "targets": targets, "dora": dora}
    trained = "|".join(re.escape(_name(path)) for path in others) or None
    adapted = add_lora(model, **options, trained=trained, rngs=nnx.Rngs(0))
    for name, linear in _adapters(adapted).items():
        if name in values:
            _fill(name, linear.weight, values[name])
    filled = [(path, params[path].replace(jnp.asarray(value, params[path].dtype))) for path, value in others.items()]
    nnx.update(adapted, nnx.from_flat_state(filled))
    return adapted


def _adapters(model: nnx.Module) -> dict[str, LinearMap]:
    return {name: linear for name, linear in linear_maps(model, ".*").items() if isinstance(linear.weight, LoRAWeight)}


def _trained_modules(model: nnx.Module, adapters: Mapping[str, LoRAWeight]) -> dict[str, nnx.Variable]:
    """What is trained and no adapter, by name."""
    trained = {_name(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    others = {name: param for name, param in trained.items() if name.rpartition(".")[0] not in adapters}
    modules = {name.rpartition(".")[0] for name in others}
    for path, _ in nnx.to_flat_state(nnx.state(model, Frozen)):
        if _name(path[:-1]) in modules:
            raise ValueError(f"{_name(path[:-1])} is trained but for its {path[-1]}, expected all of it or none")
    return others


def _published(model: Any) -> Mapping[tuple, tuple[str, Entry]]:
    """What transformers has of a model, by the paths of its parameters; nothing of a model that it has not."""
    try:
        return published_tensors(model.config, "transformers")
    except (ValueError, AttributeError):
        return {}


def _module_of(name: str, published: Mapping[tuple, tuple[str, Entry]]) -> str:
    """What the module with an adapted weight is called in a file."""
    if (path := _path(name)) in published:
        return _PREFIX + published[path][0].removesuffix(".weight")
    return name.removesuffix(".kernel")


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _fill(name: str, weight: LoRAWeight, parts: dict[str, np.ndarray]) -> None:
    """Puts the tensors of one adapter in their places."""
    places = {"lora_A": weight.lora_A, "lora_B": weight.lora_B}
    if weight.magnitude is not None:
        places["lora_magnitude_vector"] = weight.magnitude
    if missing := sorted(places.keys() ^ parts.keys()):
        raise ValueError(f"{name}: {missing[0]} is {'missing' if missing[0] in places else 'left over'}")
    for part, place in places.items():
        value = parts[part] if part == "lora_magnitude_vector" else np.swapaxes(parts[part], -1, -2)
        if value.shape != place.shape:
            raise ValueError(f"{name}.{part} has shape {value.shape}, expected {place.shape}")
        place.set_value(jnp.asarray(value, place.dtype))


def _number(folder: Path, raw: dict[str, Any], name: str) -> float:
    value = raw.get(name, 8)  # peft's default of both
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{folder / CONFIG}: {name}={value!r}, expected a number above 0")
    return float(value)
