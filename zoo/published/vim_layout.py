"""The layout of Vision Mamba's checkpoints: a `.pth` file of torch, and no config.

    zoo.from_pretrained("hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth")

Sizes are those of the tensors. What tensors cannot say is what the published models have in common: square images of
224 pixels, a norm_eps of 1e-5, the class token in the middle of the patches, the two directions averaged, not added.
The stride follows from the grid of positions: with 14 x 14 it is 16 pixels, with 27 x 27 (fine-tuned) 8. Where images
are of another size, a config.json beside the file says so: image_size, stride and norm_eps, each optional.

A checkpoint holds the weights under "model". What training keeps beside them, their moving average (model_ema) too, is
not read.

Source: hustvl/Vim: vim/models_mamba.py (`VisionMamba` as in vim_*_bimambav2_*_midclstok_div2), vim/main.py (what is in
a checkpoint) and mamba-1p1p1/mamba_ssm/modules/mamba_simple.py (bimamba_type "v2", if_divide_out); Zhu et al. 2024,
arXiv:2401.09417.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

from flax import nnx

import ssm
from zoo.models.vision import ImageClassifier, ImageClassifierConfig
from zoo.published.layout_options import FREE, differences, require_held
from zoo.published.tensors import Entry, Json, Kind, Table, renamed
from zoo.stack.pattern import Word, parse_pattern

PATCHES = "patch_embed.proj.weight"
Shapes = Mapping[str, tuple[int, ...]]

_PLAIN = ImageClassifierConfig(
    pattern="vim", norm="rms", norm_eps=1e-5, class_token="middle", image_size=224, vim=ssm.MambaConfig()
)
# Options that the tensors or our config.json say, and those that do not change what a model computes.
_SAID = ("d_model", "n_layers", "n_classes", "image_size", "patch_size", "patch_stride", "channels", "norm_eps")
_FREE = FREE | {*_SAID, "embedding_dropout", "norm_bias"}
# Tensors of what the official code can do besides, and what that is.
_OTHERS = (
    (r"cls_token_(head|tail)$", "class tokens at both ends are not supported, only one in the middle (cls_token)"),
    (r"rope\.", "rotary positions are not supported, only learned ones (pos_embed)"),
    (r"layers\.\d+\.mixer\.gamma$", "layer scale is not supported"),
)


def is_vim(raw: Json) -> bool:
    """Whether a config is of this layout."""
    return raw.get("model_type") == "vim"


def describes(config: ImageClassifierConfig) -> bool:
    """Whether a model is made of Vision Mamba's blocks alone."""
    return set(parse_pattern(config.pattern, config.n_layers)) == {Word(("vim",))}


def read_config(raw: Json, shapes: Shapes) -> ImageClassifierConfig:
    """The model that a checkpoint holds.

    Args:
      raw: config.json, or nothing but its model_type.
      shapes: of the tensors in the file, by name.

    Raises:
      ValueError: tensors of another model or of another kind of Vision Mamba, or a grid that does not follow from
        image_size: names them.
    """
    _require_middle_token_v2(shapes)
    d_model, channels, patch_size, width = _shape(shapes, PATCHES, 4)
    if patch_size != width:
        raise ValueError(f"{PATCHES} has patches of {patch_size} x {width}, expected squares")
    places = _shape(shapes, "pos_embed", 3)[1] - 1
    side = math.isqrt(max(places, 0))
    if side < 1 or side**2 != places:
        raise ValueError(f"pos_embed has {places + 1} places, expected those of a square and one for the class token")
    d_inner, d_state = _shape(shapes, "layers.0.mixer.A_log", 2)
    dt_rank = _shape(shapes, "layers.0.mixer.dt_proj.weight", 2)[1]
    image_size = raw.get("image_size", _PLAIN.image_size)
    stride = raw.get("stride") or _stride(image_size, patch_size, side)
    return dataclasses.replace(
        _PLAIN,
        d_model=d_model,
        n_layers=len({name.split(".")[1] for name in shapes if re.match(r"layers\.\d+\.", name)}),
        n_classes=_shape(shapes, "head.weight", 2)[0] if "head.weight" in shapes else 0,
        image_size=image_size,
        patch_size=patch_size,
        patch_stride=None if stride == patch_size else stride,
        channels=channels,
        norm_eps=float(raw.get("norm_eps", _PLAIN.norm_eps)),
        vim=ssm.MambaConfig(
            d_state=d_state,
            d_conv=_shape(shapes, "layers.0.mixer.conv1d.weight", 3)[2],
            expand=d_inner / d_model,
            dt_rank=None if dt_rank == math.ceil(d_model / 16) else dt_rank,
        ),
    )


def _require_middle_token_v2(names: Collection[str]) -> None:
    """Raises a ValueError that says what a checkpoint is, where it is not one that can be read."""
    if PATCHES not in names:
        raise ValueError(
            f"no tensor {PATCHES}: these are not the weights of Vision Mamba, which alone need no config.json"
        )
    for pattern, what in _OTHERS:
        for name in names:
            if re.match(pattern, name):
                raise ValueError(f"{name}: {what}")
    for name in ("cls_token", "pos_embed"):
        if name not in names:
            raise ValueError(f"no tensor {name}: models without it are not supported")
    for ending, kind in ((".mixer.A_b_log", "none"), (".mixer.conv1d_b.weight", "v1")):
        if not any(name.endswith(ending) for name in names):
            raise ValueError(f"no tensor layers.0{ending}: bimamba_type {kind!r} is not supported, only 'v2'")


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"no tensor {name}")
    if len(shapes[name]) != axes:
        raise ValueError(f"{name} is {shapes[name]}, expected {axes} axes")
    return shapes[name]


def _stride(image_size: int, patch_size: int, side: int) -> int:
    """Pixels from one of side x side patches that cover an image to the next. They leave no gaps."""
    if side == 1 and image_size == patch_size:
        return patch_size
    stride, rest = divmod(image_size - patch_size, max(side - 1, 1))
    if rest or not 0 < stride <= patch_size:
        raise ValueError(
            f"pos_embed has a grid of {side} x {side}, which patches of {patch_size} pixels do not give in images of "
            f"{image_size}: say image_size and stride in a config.json beside the file"
        )
    return stride


def write_config(config: ImageClassifierConfig) -> Json:
    """What the tensors of a Vision Mamba do not say, as `read_config` reads it.

    Raises:
      ValueError: the layout cannot describe the model: names the option.
    """
    if not describes(config):
        raise ValueError(f"pattern={config.pattern!r} has no official layout for images, only vim has one")
    of_mixer = {field.name for field in dataclasses.fields(config.vim)} - {"conv_bias", "bias", "bcdt_rms"}
    blockers = differences(config.vim, _PLAIN.vim, prefix="vim.", free=of_mixer)
    require_held([*blockers, *differences(config, _PLAIN, free=_FREE)], "layout of vim")
    return {
        "model_type": "vim",
        "image_size": config.image_size,
        "stride": config.stride,
        "norm_eps": config.norm_eps,
    }


# Our names to theirs, applied one after the other.
_RENAMED = (
    (r"^backbone\.", ""),
    (r"\.mixer\.forward\.", ".mixer."),
    (r"\.mixer\.backward\.A_log$", ".mixer.A_b_log"),
    (r"\.mixer\.backward\.D$", ".mixer.D_b"),
    (r"\.mixer\.backward\.(\w+)\.", r".mixer.\1_b."),
    (r"^patch_embedding\.projection\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^position_embeddings$", "pos_embed"),
    (r"^classifier\.", "head."),
    (r"\.(kernel|scale)$", ".weight"),
)


def tensor_table(model: ImageClassifier) -> Table:
    """The tensors of a model's checkpoint."""
    entries: dict[str, Entry] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *owner, leaf = (str(part) for part in path)
        kind: Kind = "linear" if leaf == "kernel" else "same"
        if leaf == "kernel" and owner[-1] in ("conv1d", "projection"):
            kind = "conv" if owner[-1] == "conv1d" else "image"
        elif not owner:
            kind = "row"
        entries[renamed(".".join([*owner, leaf]), _RENAMED)] = Entry((path,), kind)
    return Table(entries)
