"""An image classifier that is asked: images in, and which class each is of, with the probability of every class.

    ask = Predictor.from_pretrained("runs/vit/tiny")             # or a published folder, or a name on the hub
    ask(["cat.png", array, image])[0].label

A run says itself what it sees and what its classes are called (images.json); a published folder in its config.json and
preprocessor_config.json. Vision Mamba's checkpoints say neither: their images are prepared as ImageNet's are.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from experiments.data.augment import Preprocess
from experiments.data.packing import Batch, make_batches
from experiments.data.pictures import from_array, open_picture
from experiments.vision.load import load_model
from experiments.vision.meaning import IMAGES_FILE, Meaning, load_meaning, read_preprocess
from experiments.vision.prediction import apply_over
from experiments.vision.presets import IMAGENET
from zoo.published.pretrained import read_config_file
from zoo.published.transformers_fields import read_class_names

# Batches that are read ahead, each by a thread.
THREADS = 4


class Prediction(NamedTuple):
    """What a model says of an image."""

    label: str
    """The likeliest class."""
    probabilities: dict[str, float]
    """Of every class."""


class Predictor:
    """Says of images which class they are of.

    Args:
      model: an image classifier.
      meaning: what goes into it and what comes out.
    """

    def __init__(self, model: Any, meaning: Meaning):
        self.model, self.classes = model, meaning.classes
        self.preprocess = Preprocess(meaning.preprocess, meaning.image_size, model.config.channels)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, step: Any = "latest") -> "Predictor":
        """Loads a model to ask.

        Args:
          source: the folder of a run (of one seed), a published folder, or a name on the hub.
          step: which checkpoint of a run: a step, "latest" or "best".

        Raises:
          FileNotFoundError: nothing there.
          ValueError: what is there is no image classifier, or has no classes.
        """
        model, folder = load_model(source, step=step)
        n_classes = model.config.n_classes
        if not n_classes:
            raise ValueError(f"{source} holds an image classifier without classes, which predicts nothing")
        if (folder / IMAGES_FILE).is_file():
            return cls(model, load_meaning(folder))
        names = read_class_names(read_config_file(folder)[0], n_classes)
        return cls(model, Meaning(read_preprocess(folder, IMAGENET), model.config.image_size, names))

    def __call__(self, images: Sequence[Any], *, batch_size: int = 32, progress: bool = False) -> list[Prediction]:
        """What the model says of each image, in their order.

        Args:
          images: Pillow's, arrays (x, y) or (x, y, 3) of whole numbers 0 to 255 (uint16: to 65,535), or files.
          batch_size: images in a batch.
          progress: whether to show a bar on stderr, where that is a terminal.

        Raises:
          FileNotFoundError: no such file.
          ValueError: what is no list of images, or no image.
        """
        images = _as_list(images)
        n, devices = len(images), jax.device_count()
        if not n:
            return []
        size = -(-min(batch_size, n) // devices) * devices
        bar = tqdm(total=n, unit="image", dynamic_ncols=True, disable=not (progress and sys.stderr.isatty()))

        def make(number: int) -> Batch:
            rows = range(number * size, min(n, (number + 1) * size))
            arrays = np.stack([self.preprocess(opened(images[row], f"images[{row}]")) for row in rows])
            bar.update(len(rows))
            return {"images": np.pad(arrays, ((0, size - len(rows)), (0, 0), (0, 0), (0, 0)))}

        with bar:
            batches = make_batches(make, n_batches=-(-n // size), threads=THREADS, prefetch=2 * THREADS, shard=(0, 1))
            logits = apply_over(self.model, batches)[:n]
        return [named(self.classes, row) for row in np.asarray(jax.nn.softmax(logits, axis=-1), float)]


def named(classes: Sequence[str], probabilities: np.ndarray) -> Prediction:
    """The likeliest class, and all of them by name."""
    by_name = dict(zip(classes, probabilities.tolist(), strict=True))
    return Prediction(classes[int(np.argmax(probabilities))], by_name)


def predict(
    folder: str | Path, images: Sequence[Image.Image | np.ndarray | str | Path], *, step: Any = "latest"
) -> list[Prediction]:
    """What a model says of some images; `Predictor`, for one question. Arguments and errors are those of it."""
    return Predictor.from_pretrained(folder, step=step)(images)


def opened(image: Any, where: str) -> Image.Image:
    """An image of any kind as Pillow's, upright.

    Args:
      where: what errors call it.
    """
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image} does not exist; expected an image")
        return open_picture(image, str(image))
    array = np.asarray(image)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{where} is {array.dtype}{array.shape}, expected (x, y) or (x, y, 3) of whole numbers 0 to 255"
        )
    try:
        return from_array(array)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _as_list(images: Any) -> list[Any]:
    alone = isinstance(images, str | bytes | Path | Image.Image) or getattr(images, "ndim", 4) == 2
    if alone or not hasattr(images, "__iter__"):
        said = f" {str(images)!r:.60}" if isinstance(images, str | Path) else ""
        raise ValueError(f"images is one {type(images).__name__}{said}, expected a list of images")
    return list(images)
