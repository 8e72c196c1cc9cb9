"""What goes into an image classifier and what comes out, as its folder says: images.json, preprocessor_config.json."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import NamedTuple

from experiments.data.augment import PreprocessConfig
from experiments.loop.distributed import by_first
from zoo.published.json_files import read_json
from zoo.published.tensors import Json
from zoo.stack.option_values import from_dict

# The file of a run that says what its model's inputs and outputs are.
IMAGES_FILE = "images.json"
# Pillow's number of cubic interpolation.
_CUBIC = 3


class Meaning(NamedTuple):
    """The images that a model takes, and what its outputs stand for."""

    preprocess: PreprocessConfig
    image_size: int
    classes: tuple[str, ...]


@by_first
def save_meaning(meaning: Meaning, folder: Path) -> None:
    """Writes images.json."""
    said = meaning._asdict() | {"preprocess": dataclasses.asdict(meaning.preprocess)}
    (folder / IMAGES_FILE).write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8")


def load_meaning(folder: Path) -> Meaning:
    """Reads what `save_meaning` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = folder / IMAGES_FILE
    try:
        said = read_json(path)
        preprocess = from_dict(PreprocessConfig, said["preprocess"])
        return Meaning(preprocess, int(said["image_size"]), tuple(said["classes"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_preprocess(said: Meaning, folder: Path) -> None:
    """Writes preprocessor_config.json, as transformers reads it."""
    square = {"height": said.image_size, "width": said.image_size}
    whole = round(said.image_size / said.preprocess.crop_fraction)
    raw = {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": whole, "width": whole},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(said.preprocess.mean),
        "image_std": list(said.preprocess.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def read_preprocess(folder: Path, default: PreprocessConfig) -> PreprocessConfig:
    """The preprocessing that a model's folder states: that of a run, or transformers' preprocessor_config.json.

    Images are resized by cubic interpolation; where the file says otherwise, a warning does too.

    Raises:
      ValueError: a file that says nothing that can be done: names it.
    """
    if (folder / IMAGES_FILE).is_file():
        return load_meaning(folder).preprocess
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return default
    try:
        raw = read_json(path)
        sizes = [raw.get(name) for name in ("crop_size", "size")]
        crop, size = (min(s.values()) if isinstance(s, dict) else s for s in sizes)
        fraction = crop / size if raw.get("do_center_crop") and crop and size else 1.0
        mean, std = _normalisation(raw)
        if raw.get("resample", _CUBIC) != _CUBIC:
            warnings.warn(f"{path}: resample={raw['resample']}, but images are resized by 3 (cubic)", stacklevel=2)
        return PreprocessConfig(mean=mean, std=std, crop_fraction=min(1.0, fraction))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _normalisation(raw: Json) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels from 0 to 1, where a file may scale those from 0 to 255 in another way."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if raw.get("do_normalize", True):
        mean, std = (tuple(map(float, raw[name])) for name in ("image_mean", "image_std"))
    scale = 255 * (float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else 1.0)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
