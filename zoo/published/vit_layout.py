"""The layout of transformers' image classifiers with attention: ViT and DeiT.

What lies on top is told by the tensors in the file: a classifier of the class token, one more of DeiT's distillation
token (logits are the mean of both), or nothing.

Probabilities of attention are never dropped here: attention_probs_dropout_prob means nothing. The pooler of a model
without a classifier is left out, as transformers' classifiers leave it out.

Source: transformers' configuration_ and modeling_{vit,deit}.py; Dosovitskiy et al. 2020, arXiv:2010.11929; Touvron et
al. 2020, arXiv:2012.12877.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

from flax import nnx

from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.published.layout_options import FREE, Blocker, model_differences, require_held, resolved
from zoo.published.tensors import Entry, Json, Kind, Table, renamed
from zoo.published.transformers_fields import class_names, read_activation, require_numbers, write_activation
from zoo.stack.pattern import Word, parse_pattern

Family = Literal["vit", "deit"]
PATCHES = "embeddings.patch_embeddings.projection.weight"
Tensor = TypeVar("Tensor")

# What transformers takes where a config leaves a field out; the same for both.
_DEFAULTS: Json = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_ACTIVATIONS: dict[str, Any] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Options that may differ when a written config is read back.
_FREE = FREE | {"residual_in_fp32", "embedding_dropout", "patch_stride", "norm_bias", "crop_to_patches"}


def is_vit(raw: Json) -> bool:
    """Whether a config is of one of these layouts."""
    return raw.get("model_type") in ("vit", "deit")


def short_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that `tensor_table` knows them by: without the prefix that they have below a head.

    Raises:
      ValueError: two tensors of one name.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(vit|deit)\.", "", name).replace("cls_classifier.", "classifier.")
        if name in renamed:
            raise ValueError(f"two tensors are {name}, with and without a prefix")
        renamed[name] = tensor
    return renamed


def full_name(name: str, config: ImageClassifierConfig) -> str:
    """A tensor's name in the file, out of the short one."""
    if config.distillation == "classifier" and name.startswith("classifier."):
        return f"cls_{name}"
    bare = not config.n_classes or "classifier." in name
    return name if bare else f"{_family(config)}.{name}"


def read_config(raw: Json, tensors: Collection[str] = (), n_classes: int = 0) -> ImageClassifierConfig:
    """The model that a config of ViT or DeiT describes.

    Args:
      raw: config.json.
      tensors: the short names in the weight file, which say what is on top.
      n_classes: rows of the classifier.

    Raises:
      ValueError: an option that there is none for here: names it.
    """
    family: Family = raw["model_type"]
    raw = _DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    require_numbers(raw, _DEFAULTS)
    sizes = {name: raw[name] for name in ("image_size", "patch_size")}
    for name, size in sizes.items():
        if isinstance(size, list):
            if len({*size}) != 1:
                raise ValueError(f"{name}={size} is not supported, only squares")
            sizes[name] = size[0]
    activation = read_activation(raw["hidden_act"], known=_ACTIVATIONS)
    if not raw["qkv_bias"]:
        raise ValueError("qkv_bias=False is not supported, only True")
    second = any(name.startswith("distillation_classifier.") for name in tensors)
    if any("lambda" in name for name in tensors):
        raise ValueError("layer scale (lambda_1) is not known in this layout")
    return ImageClassifierConfig(
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        norm_eps=float(raw["layer_norm_eps"]),
        dropout=float(raw["hidden_dropout_prob"]),
        embedding_dropout=float(raw["hidden_dropout_prob"]),
        attn=AttentionConfig(n_heads=raw["num_attention_heads"], position="none", bias=True),
        mlp=MLPConfig(d_ff=raw["intermediate_size"], gated=False, activation=activation, bias=True),
        n_classes=n_classes,
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        crop_to_patches=sizes["image_size"] % max(1, sizes["patch_size"]) > 0,
        channels=raw["num_channels"],
        distillation="none" if family == "vit" else "classifier" if second else "token",
    )


def _family(config: ImageClassifierConfig) -> Family:
    return "vit" if config.distillation == "none" else "deit"


def write_config(config: ImageClassifierConfig) -> Json:
    """The config.json of a ViT or DeiT, as `read_config` reads it.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    if set(parse_pattern(config.pattern, config.n_layers)) != {Word(("attn",), "mlp")}:
        raise ValueError(f"pattern={config.pattern!r} has no transformers layout for images, only attn/mlp has one")
    family = _family(config)
    kind = {"vit": "ViT", "deit": "DeiT"}[family]
    raw: Json = {
        "architectures": [
            f"{kind}Model"
            if not config.n_classes
            else f"{kind}ForImageClassification{'WithTeacher' if config.distillation == 'classifier' else ''}"
        ],
        "model_type": family,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": resolved(config, "attn").n_heads,
        "intermediate_size": config.mlp.width(config.d_model),
        "hidden_act": write_activation(config.mlp.activation, _ACTIVATIONS),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "dtype": config.param_dtype,
    }
    if config.n_classes:
        raw |= class_names(config.n_classes)
    second = ("distillation_classifier.weight",) if config.distillation == "classifier" else ()
    back = read_config(raw, second, config.n_classes)
    blockers = model_differences(config, back, free=_FREE)
    if config.stride != config.patch_size:
        blockers.insert(0, Blocker(f"patch_stride={config.patch_stride}", f"patch_size={config.patch_size}"))
    require_held(blockers, f"layout of {family}")
    return raw


# Our names to theirs, applied one after the other.
_RENAMED = (
    (r"^backbone\.layers\.(\d+)\.mixer\.o_proj", r"encoder.layer.\1.attention.output.dense"),
    (r"^backbone\.layers\.(\d+)\.mixer\.q_proj", r"encoder.layer.\1.attention.attention.query"),
    (r"^backbone\.layers\.(\d+)\.mixer\.k_proj", r"encoder.layer.\1.attention.attention.key"),
    (r"^backbone\.layers\.(\d+)\.mixer\.v_proj", r"encoder.layer.\1.attention.attention.value"),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"encoder.layer.\1.layernorm_before."),
    (r"^backbone\.layers\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^backbone\.layers\.(\d+)\.mlp\.up_proj", r"encoder.layer.\1.intermediate.dense"),
    (r"^backbone\.layers\.(\d+)\.mlp\.down_proj", r"encoder.layer.\1.output.dense"),
    (r"^backbone\.norm_f\.", "layernorm."),
    (r"^class_token$", "embeddings.cls_token"),
    (r"^(distillation_token|position_embeddings)$", r"embeddings.\1"),
    (r"^patch_embedding\.", "embeddings.patch_embeddings."),
    (r"\.(kernel|scale)$", ".weight"),
)


def tensor_table(model: ImageClassifier) -> Table:
    """The tensors of a model's file under their short names, and what else a file may hold."""
    entries: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        kind: Kind = "linear" if path[-1] == "kernel" else "same"
        if name.startswith("patch_embedding.projection.kernel"):
            kind = "image"
        elif len(path) == 1:
            kind = "row"
        entries[renamed(name, _RENAMED)] = Entry((path,), kind)
    # What is on top of a model that is used without it.
    return Table(entries, ignored=re.compile(r"pooler\."))
