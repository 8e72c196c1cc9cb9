"""Fields that the config files of transformers have in common: read and written alike, whatever the model.

Source: transformers' configuration_*.py and modeling_rope_utils.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.published.tensors import Json

# Their names of activations to ours; of several the first is written.
ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
# What a tokenizer says, and a model does not.
NO_SPECIAL_TOKENS: Json = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def number(value) -> float:
    """A number of a JSON file; infinity is written in three ways."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def require_numbers(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks the fields whose defaults are numbers, before anything is computed with them.

    Raises:
      ValueError: a text or a truth value: names the field as the file does. Lists and dicts say more to their readers.
    """
    for name, default in defaults.items():
        a_number = isinstance(default, int | float) and not isinstance(default, bool)
        if a_number and isinstance(value := raw.get(name), str | bool):
            raise ValueError(f"{name}={value!r}, expected a number")


def json_number(value: float) -> float | dict[str, str]:
    """A number as transformers writes it: infinity so that the file stays JSON."""
    return {"__float__": "Infinity"} if math.isinf(value) else value


def write_number(value: float, guess: float, read: Callable[[float], float]) -> float:
    """The number with the fewest digits that `read` makes `value` of, near a guess that rounding may have missed."""
    candidates = [float(f"{guess:.{digits}g}") for digits in range(1, 18)]
    candidates += [math.nextafter(guess, end) for end in (-math.inf, math.inf)]
    return next((x for x in candidates if read(x) == value), guess)


def read_activation(name: str, field: str = "hidden_act", known: Mapping[str, str] = ACTIVATIONS) -> Any:
    """Our name of an activation.

    Raises:
      ValueError: it is not known: names the field.
    """
    if name not in known:
        raise ValueError(f"{field}={name!r}, expected one of {', '.join(known)}")
    return known[name]


def write_activation(name: str, known: Mapping[str, str] = ACTIVATIONS) -> str:
    """Their name of an activation; the first that is known where it has none, as reading it back then shows."""
    return next((theirs for theirs, ours in known.items() if ours == name), next(iter(known)))


def read_heads(raw: Json) -> dict[str, Any]:
    """Heads of keys and values, and the width of a head, where they are not what follows from the others."""
    d_model, heads = raw["hidden_size"], raw["num_attention_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    return {
        "n_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if head_dim is None or head_dim * heads == d_model else head_dim,
    }


def read_rope(raw: Json, part: float = 1.0, *, any_part: bool = False) -> tuple[float, float]:
    """Base of the rotary frequencies, and the part of a head that is rotated, `part` where the config does not say.

    They are in `rope_parameters`, in files before transformers 5 in fields of their own.

    Raises:
      ValueError: scaled frequencies, or another part unless any will do.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # the first prevails there
    said = raw.get(field) or {}
    require_plain_rope(said, field)
    base: Any = said.get("rope_theta", raw.get("rope_theta", 10_000.0))
    part_said: Any = said.get("partial_rotary_factor", raw.get("partial_rotary_factor", part))
    if part_said != part and not any_part:
        raise ValueError(f"partial_rotary_factor={part_said!r} is not supported, only {part:g}")
    return float(base), float(part_said)


# What the kinds of scaling read, and nothing else does.
_OF_SCALING = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}
_OF_SCALING |= {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"}


def require_plain_rope(said: Json, field: str) -> None:
    """Raises a ValueError where rotary frequencies are other than those of the base.

    They are not where each is divided by a factor of 1, and what belongs to a kind of scaling means nothing where
    another is named, or none.

    Args:
      said: what a config says of them.
      field: where it does, for the error.
    """
    named = said.get("rope_type", said.get("type"))
    kind = "default" if named is None else named
    if kind in ("linear", "llama3") and said.get("factor") == 1:
        kind = "default"
    if kind != "default":
        raise ValueError(f"{field}: rope_type={kind!r} is not supported, only 'default'")
    if named is None and "factor" in said and said["factor"] != 1:
        raise ValueError(f"{field}: factor={said['factor']!r} is not supported without a rope_type")
    for name in said.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - _OF_SCALING:
        raise ValueError(f"{field}: {name}={said[name]!r} is not supported beside rope_type='default'")


def class_names(n_classes: int) -> Json:
    """Names for so many classes: transformers counts the classes by them."""
    return named_classes([f"LABEL_{i}" for i in range(n_classes)])


def named_classes(names: Sequence[str]) -> Json:
    """The fields that say what classes are called, in their order."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def read_class_names(raw: Json, n_classes: int) -> tuple[str, ...]:
    """What a config calls so many classes; LABEL_0 and so on where it does not say, as transformers calls them."""
    names = {int(number): str(name) for number, name in (raw.get("id2label") or {}).items()}
    return tuple(names.get(i, f"LABEL_{i}") for i in range(n_classes))


def class_fields(raw: Json, n_classes: int) -> Json:
    """What a config says of so many classes, to be said in another layout too: nothing where it is silent."""
    said = {name: raw[name] for name in ("problem_type",) if n_classes and raw.get(name)}
    return said | (named_classes(read_class_names(raw, n_classes)) if n_classes and raw.get("id2label") else {})


def with_both_ways(extra: Json, n_classes: int) -> Json:
    """Fields of a config, with the label2id that follows from their id2label where they leave it out.

    Raises:
      ValueError: id2label names another number of classes than the model has.
    """
    if "id2label" not in extra:
        return extra
    names = {int(number): str(name) for number, name in extra["id2label"].items()}
    if n_classes and sorted(names) != list(range(n_classes)):
        raise ValueError(f"id2label names {len(names)} classes, expected the model's {n_classes}, from 0 on")
    return named_classes([names[i] for i in sorted(names)]) | extra
