"""The layout of transformers' LLaVA: a CLIP or SigLIP image encoder, two linear maps, a causal language model.

The language model is of any layout that transformers has and this library reads; those of the released ones are Llama,
Mistral and Qwen2. The encoder is read before its last block, or behind it and not normalised, with or without its class
token, as they do; or at several layers, whose vectors lie end to end.

Source: transformers' configuration_llava.py and modeling_llava.py; Liu et al. 2023, arXiv:2304.08485, 2310.03744.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zoo.layers.connectors import ConnectorConfig
from zoo.models.causal import CausalLMConfig
from zoo.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from zoo.published import clip_layout, ssm_layout
from zoo.published.layout_options import Blocker, require_held
from zoo.published.tensors import Entry, Json, Table
from zoo.published.transformers_fields import read_activation, write_activation

Tensor = TypeVar("Tensor")
WORD_EMBEDDINGS = ("language_model.embed_tokens.weight", "language_model.embeddings.weight")
# Language models that multiply what enters them, and those whose embedding LLaVA does not find to tie its head to.
_MULTIPLYING = ("granitemoehybrid",)
_UNTIED = ssm_layout.MODEL_TYPES
# Prefixes of several releases of transformers to one: those of 4.52 to 4.57, without "model.".
_SHORTER = (
    (r"^language_model\.(model|backbone)\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)


def is_llava(raw: Json) -> bool:
    """Whether a config is of this layout."""
    return raw.get("model_type") == "llava"


def parts(raw: Json) -> tuple[Json, Json]:
    """The configs of the image encoder and of the language model inside a config.

    Raises:
      ValueError: one of them is not there.
    """
    for name in ("vision_config", "text_config"):
        if not isinstance(raw.get(name), dict):
            raise ValueError(f"{name}={raw.get(name)!r:.40}, expected the config of a part")
    vision = {"model_type": "clip_vision_model"} | raw["vision_config"]
    return vision, {"model_type": "llama"} | raw["text_config"]


def short_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that `tensor_table` knows them by, whichever release of transformers wrote them.

    Raises:
      ValueError: two tensors of one name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for long, short in _SHORTER:
            name = re.sub(long, short, name)
        if name in renamed:
            raise ValueError(f"two tensors are {name}, with and without a prefix")
        renamed[name] = tensor
    return renamed


def read_config(raw: Json, read_text: Callable[[Json], CausalLMConfig]) -> VisionLanguageConfig:
    """The model that a config of LLaVA describes.

    Args:
      raw: config.json.
      read_text: reads the config of the language model.

    Raises:
      ValueError: an option that there is none for here: names it.
    """
    vision_raw, text_raw = parts(raw)
    if not clip_layout.is_clip(vision_raw):
        known = ", ".join(clip_layout.MODEL_TYPES)
        raise ValueError(f"vision_config.model_type={vision_raw['model_type']!r}, expected one of {known}")
    vision, text = clip_layout.read_config(vision_raw), read_text(text_raw)
    # What LLaVA does itself in place of the language model's own: it looks vectors up, as they are, and makes logits of
    # what comes out. Granite alone multiplies whatever enters it, images too.
    multiplier = text.embedding_multiplier if text_raw["model_type"] in _MULTIPLYING else 1.0
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r}, expected true or false")
    text = dataclasses.replace(
        text, embedding_multiplier=multiplier, logits_multiplier=1.0, tie_embeddings=tied or text.tie_embeddings
    )
    said = raw.get("vision_feature_layer", -2)
    layer: Any = tuple(said) if isinstance(said, list | tuple) else said
    layers = layer if isinstance(layer, tuple) else (layer,)
    if not layers or any(type(number) is not int for number in layers):
        raise ValueError(f"vision_feature_layer={said!r:.60}, expected a layer, such as -2, or a list of some")
    strategy = raw.get("vision_feature_select_strategy", "default")
    strategies = ("default", "full") if vision.n_tokens else ("full",)
    if strategy not in strategies:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r}, expected {' or '.join(map(repr, strategies))}: what is left "
            "out is the encoder's class token, and no patch"
        )
    bias = bool(raw.get("multimodal_projector_bias", True))
    activation = read_activation(raw.get("projector_hidden_act", "gelu"), "projector_hidden_act")
    image_token: Any = raw.get("image_token_index", raw.get("image_token_id", 32_000))
    return VisionLanguageConfig(
        vision=vision,
        text=text,
        connector=ConnectorConfig(kind="mlp", depth=2, activation=activation, bias=bias),
        image_token_id=image_token,
        vision_layer=layer,
        vision_norm=not {*layers} & {-1, vision.n_layers},
        class_tokens=strategy == "full" and vision.n_tokens > 0,
        image_multiplier=multiplier,
    )


def write_config(config: VisionLanguageConfig, text_raw: Json) -> Json:
    """The config.json of a LLaVA, as `read_config` reads it.

    Args:
      config: the model's.
      text_raw: what describes its language model.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    vision, connector = clip_layout.write_config(config.vision), config.connector
    wanted: dict[str, Any] = {"kind": "mlp", "shuffle": 1, "depth": 2}
    blockers = [
        Blocker(f"connector.{name}={getattr(connector, name)!r}", repr(only))
        for name, only in wanted.items()
        if getattr(connector, name) != only
    ]
    if connector.d_hidden not in (None, config.d_model):
        blockers.append(Blocker(f"connector.d_hidden={connector.d_hidden}", "the language model's width"))
    kind, text = text_raw["model_type"], config.text
    multiplier = text.embedding_multiplier if kind in _MULTIPLYING else 1.0
    for name, only in (("deepstack", 1), ("mutual_attention", False), ("image_multiplier", multiplier)):
        if getattr(config, name) != only:
            blockers.append(Blocker(f"{name}={getattr(config, name)}", repr(only)))
    for name, only in (("embedding_multiplier", multiplier), ("logits_multiplier", 1.0)):
        if getattr(text, name) != only:
            blockers.append(Blocker(f"text.{name}={getattr(text, name)}", repr(only)))
    if text.tie_embeddings and kind in _UNTIED:
        blockers.append(Blocker(f"text.tie_embeddings=True around {kind}", "False"))
    if config.reads_output and config.vision_norm:
        blockers.append(Blocker(f"vision_norm=True with vision_layer={config.vision_layer}", "False"))
    require_held(blockers, "layout of llava")
    full = config.class_tokens or not config.vision.n_tokens
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": vision,
        "text_config": text_raw,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": write_activation(connector.activation),
        "multimodal_projector_bias": connector.bias,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": "full" if full else "default",
        "tie_word_embeddings": config.text.tie_embeddings,
        "dtype": config.text.param_dtype,
    }


def tensor_table(model: VisionLanguageModel, text: Table) -> Table:
    """The tensors of a model's file under their short names, and what else a file may hold.

    Args:
      model: whose parameters they are.
      text: the same of its language model.
    """
    entries: dict[str, Entry] = {}
    vision = clip_layout.tensor_table(model.vision)
    for prefix, part, table in (("vision_tower.", "vision", vision), ("language_model.", "language", text)):
        for name, entry in table.entries.items():
            paths = tuple((part, *path) for path in entry.paths)
            entries[_inside(prefix, name)] = Entry(paths, entry.kind)
    for i in range(2):
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))[: 1 + model.config.connector.bias]:
            path = ("connector", "projector", "layers", i, ours)
            entries[f"multi_modal_projector.linear_{i + 1}.{theirs}"] = Entry((path,), "linear")
    inside = "language_model."
    return Table(
        entries,
        {_inside(inside, name): _inside(inside, original) for name, original in text.copies.items()},
        {_inside(inside, name): constant for name, constant in text.constants.items()},
        re.compile(rf"vision_tower\.({vision.ignored.pattern})|language_model\.({text.ignored.pattern})"),
        {_inside(inside, name): tuple(_inside(inside, part) for part in each) for name, each in text.stacks.items()},
    )


def _inside(prefix: str, name: str) -> str:
    # Mamba's files alone have a prefix in their tables.
    return name if name.startswith("lm_head.") else prefix + name.removeprefix("backbone.")


def full_name(name: str) -> str:
    """A tensor's name in the file, out of the short one, as transformers 5 writes it whatever the language model."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return re.sub(r"^language_model\.", "language_model.model.", name)
