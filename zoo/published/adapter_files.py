"""Adapters alone in a folder: a few MB beside the gigabytes of the model that they adapt.

    zoo.save_adapter(tuned, "adapter")
    tuned = zoo.load_adapter(zoo.from_pretrained("model"), "adapter")

The files are peft's (adapter_config.json, adapter_model.safetensors). Where transformers has a module for each adapted
map, tensors have the names that peft gives them there, and it loads the folder; otherwise those of our parameters.

Source: peft's LoraConfig and `get_peft_model_state_dict`, version 0.21.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.published.json_files import read_json
from zoo.published.pretrained import tensor_names
from zoo.published.weight_files import open_weights, save_weights
from zoo.reuse.adapt import LoRAWeight, add_lora
from zoo.reuse.linear_maps import LinearMap, Model, linear_maps, module_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Options of peft's that change what an adapter computes, and the only values that mean the same here.
_PLAIN: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "rank_pattern": {}}
_PLAIN |= {"alpha_pattern": {}, "layers_to_transform": None, "fan_in_fan_out": False, "modules_to_save": None}
_PLAIN |= {"trainable_token_indices": None, "target_parameters": None, "megatron_config": None, "use_bdlora": None}


def save_adapter(model: nnx.Module, folder: str | os.PathLike) -> None:
    """Writes the adapters of a model, and no other of its parameters.

    Args:
      model: from `add_lora`, once.
      folder: made if it does not exist. An adapter that lies there is replaced.

    Raises:
      ValueError: no adapters; adapters upon adapters; other parameters that are trained, which no adapter holds.
    """
    found = _adapters(model)
    weights = {name: linear.weight for name, linear in found.items()}
    if not weights:
        raise ValueError("the model has no adapters: make some with zoo.add_lora")
    if nested := [name for name, weight in weights.items() if isinstance(weight.base, LoRAWeight)]:
        raise ValueError(f"{nested[0]} has an adapter upon another: merge_lora makes one model of them")
    trained = {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if others := sorted(trained - weights.keys()):
        raise ValueError(f"{others[0]} is trained and no adapter: save the whole model, zoo.save_pretrained")
    names = _names(model, found)
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{names[name]}.lora_A.weight"] = np.swapaxes(np.asarray(weight.lora_A[...]), -1, -2)
        tensors[f"{names[name]}.lora_B.weight"] = np.swapaxes(np.asarray(weight.lora_B[...]), -1, -2)
        if weight.magnitude is not None:
            tensors[f"{names[name]}.lora_magnitude_vector"] = np.asarray(weight.magnitude[...])
    first = next(iter(weights.values()))
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_dora": first.magnitude is not None,
        "target_modules": sorted({name.split(".")[-1] for name in names.values()}),
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


def load_adapter(model: Model, folder: str | os.PathLike) -> Model:
    """A model with the adapters of a folder, which are trained on or merged as those of `add_lora` are.

    Args:
      model: what they were made for. It stays as it is.
      folder: as `save_adapter` or peft wrote it.

    Raises:
      FileNotFoundError: no adapter lies there.
      ValueError: kinds and options of adapters that are not known here; tensors that are no adapter of the model, or
        of another shape.
    """
    folder = Path(folder)
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
    ours = linear_maps(model, ".*")
    known = {theirs: name for name, theirs in _names(model, ours, published=_is_published(tensors)).items()}
    values: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        theirs, _, part = key.removesuffix(".weight").rpartition(".")
        if theirs not in known or part not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise ValueError(f"{folder / WEIGHTS}: {key} is no adapter of a map of this model")
        values.setdefault(known[theirs], {})[part] = tensor.read()
    dora = bool(raw.get("use_dora"))
    targets = "|".join(module_name(name).replace(".", r"\.") for name in values)
    adapted = add_lora(model, rank=int(rank), alpha=float(alpha), targets=targets, dora=dora, rngs=nnx.Rngs(0))
    for name, linear in _adapters(adapted).items():
        if name in values:
            _fill(name, linear.weight, values[name])
    return adapted


def _adapters(model: nnx.Module) -> dict[str, LinearMap]:
    return {name: linear for name, linear in linear_maps(model, ".*").items() if isinstance(linear.weight, LoRAWeight)}


def _names(model: Any, maps: dict[str, LinearMap], *, published: bool = True) -> dict[str, str]:
    """What the adapters of some maps are called in a file: as transformers has all of them, else as they are here."""
    try:
        theirs = tensor_names(model.config, "transformers") if published else {}
    except (ValueError, AttributeError):  # a model that transformers has not
        theirs = {}
    paths = {".".join(map(str, path)): name for path, name in theirs.items()}
    found = {name: _PREFIX + paths[name].removesuffix(".weight") for name in maps if name in paths}
    if published and found.keys() >= _adapters(model).keys() and found:
        return found
    return {name: name.removesuffix(".kernel") for name in maps}


def _is_published(tensors) -> bool:
    return all(name.startswith(_PREFIX) for name in tensors)


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
