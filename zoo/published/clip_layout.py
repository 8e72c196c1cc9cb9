"""The layout of transformers' image encoders of CLIP and SigLIP: what vision-language models are mostly built on.

CLIP's has a class token, a norm behind the embeddings, patches without a bias and a GELU of its own; SigLIP's has none
of these, and pools by attention, which is left out here: `head.*` in a file means nothing. What reads a picture as one
vector (CLIP's projection) is not part of these files either.

Probabilities of attention are never dropped here: attention_dropout means nothing.

Source: transformers' configuration_ and modeling_{clip,siglip}.py; Radford et al. 2021, arXiv:2103.00020; Zhai et al.
2023, arXiv:2303.15343.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from flax import nnx

from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.published.layout_options import FREE, Blocker, model_differences, require_held, resolved
from zoo.published.tensors import Entry, Json, Kind, Table, renamed
from zoo.published.transformers_fields import read_activation, require_numbers, write_activation
from zoo.stack.pattern import Word, parse_pattern

Tensor = TypeVar("Tensor")
PATCHES = "embeddings.patch_embedding.weight"
MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")

# What transformers takes where a config leaves a field out.
_SHARED: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_DEFAULTS: dict[str, Json] = {
    "clip_vision_model": _SHARED | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _SHARED | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
# Options that may differ when a written config is read back.
_FREE = FREE | {"residual_in_fp32", "embedding_dropout", "patch_stride", "norm_bias", "pool", "crop_to_patches"}


def is_clip(raw: Json) -> bool:
    """Whether a config is of one of these layouts."""
    return raw.get("model_type") in MODEL_TYPES


def short_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that `tensor_table` knows them by."""
    return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}


def read_config(raw: Json) -> ImageClassifierConfig:
    """The encoder that a config of CLIP's or SigLIP's describes, without classes.

    Raises:
      ValueError: an option that there is none for here: names it.
    """
    kind = raw["model_type"]
    raw = _DEFAULTS[kind] | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, _DEFAULTS[kind])
    clip = kind == "clip_vision_model"
    return ImageClassifierConfig(
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        norm_eps=float(raw["layer_norm_eps"]),
        attn=AttentionConfig(n_heads=raw["num_attention_heads"], position="none", bias=True),
        mlp=MLPConfig(
            d_ff=raw["intermediate_size"],
            gated=False,
            activation=read_activation(raw["hidden_act"]),
            bias=True,
        ),
        n_classes=0,
        image_size=raw["image_size"],
        patch_size=raw["patch_size"],
        crop_to_patches=raw["image_size"] % max(1, raw["patch_size"]) > 0,
        channels=raw["num_channels"],
        class_token="first" if clip else "none",
        pool="token" if clip else "mean",
        embedding_norm=clip,
        patch_bias=not clip,
    )


def describes(config: ImageClassifierConfig) -> bool:
    """Whether an encoder has what tells these layouts from ViT's: no classes, and CLIP's norm or no class token."""
    return not config.n_classes and (config.embedding_norm or config.class_token == "none")


def write_config(config: ImageClassifierConfig) -> Json:
    """The config.json of an encoder of CLIP's or SigLIP's, as `read_config` reads it.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    if set(parse_pattern(config.pattern, config.n_layers)) != {Word(("attn",), "mlp")}:
        raise ValueError(f"pattern={config.pattern!r} has no transformers layout for images, only attn/mlp has one")
    kind = MODEL_TYPES[config.class_token == "none"]
    raw: Json = {
        "architectures": [{"clip_vision_model": "CLIPVisionModel"}.get(kind, "SiglipVisionModel")],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": resolved(config, "attn").n_heads,
        "intermediate_size": config.mlp.width(config.d_model),
        "hidden_act": write_activation(config.mlp.activation),
        "attention_dropout": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "dtype": config.param_dtype,
    }
    if kind == "siglip_vision_model":
        raw["vision_use_head"] = False
    blockers = model_differences(config, read_config(raw), free=_FREE)
    if config.stride != config.patch_size:
        blockers.insert(0, Blocker(f"patch_stride={config.patch_stride}", f"patch_size={config.patch_size}"))
    require_held(blockers, f"layout of {kind}")
    return raw


# Our names to theirs, applied one after the other.
_RENAMED = (
    (r"^backbone\.layers\.(\d+)\.mixer\.o_proj", r"encoder.layers.\1.self_attn.out_proj"),
    (r"^backbone\.layers\.(\d+)\.mixer\.", r"encoder.layers.\1.self_attn."),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"encoder.layers.\1.layer_norm1."),
    (r"^backbone\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.layer_norm2."),
    (r"^backbone\.layers\.(\d+)\.mlp\.up_proj", r"encoder.layers.\1.mlp.fc1"),
    (r"^backbone\.layers\.(\d+)\.mlp\.down_proj", r"encoder.layers.\1.mlp.fc2"),
    (r"^backbone\.norm_f\.", "post_layernorm."),
    (r"^embedding_norm\.", "pre_layrnorm."),  # so spelled there
    (r"^class_token$", "embeddings.class_embedding"),
    (r"^position_embeddings$", "embeddings.position_embedding.weight"),
    (r"^patch_embedding\.projection\.", "embeddings.patch_embedding."),
    (r"\.(kernel|scale)$", ".weight"),
)


def tensor_table(model: ImageClassifier) -> Table:
    """The tensors of an encoder's file under their short names, and what else a file may hold."""
    entries: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        kind: Kind = "linear" if path[-1] == "kernel" else "same"
        if name == "patch_embedding.projection.kernel":
            kind = "image"
        elif name == "class_token":
            kind = "block"
        entries[renamed(name, _RENAMED)] = Entry((path,), kind)
    return Table(entries, ignored=re.compile(r"head\.|embeddings\.position_ids$"))
