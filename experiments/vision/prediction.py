"""What an image classifier says of images: of a split, or of any that it is shown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageOps

from experiments.data.augment import Preprocess
from experiments.data.images import Images
from experiments.data.packing import Batch, make_batches
from experiments.data.pictures import from_array, open_picture
from experiments.loop.train import make_mesh, spread
from experiments.vision.load import load_model
from experiments.vision.meaning import load_meaning
from experiments.vision.presets import Config


def logits_of(model: Any, images: Images, preprocess: Preprocess, config: Config) -> np.ndarray:
    """(n, k) float32: what a model says of all images, in their order."""
    size, n = config.train.batch_size, len(images.labels)

    def make(number: int) -> Batch:
        rows = range(number * size, min(n, (number + 1) * size))
        arrays = np.stack([preprocess(images.read(row)) for row in rows])
        return {"images": np.pad(arrays, ((0, size - len(rows)), (0, 0), (0, 0), (0, 0)))}

    batches = make_batches(make, n_batches=-(-n // size), threads=config.threads, prefetch=2 * config.threads)
    return apply_over(model, batches)[:n]


def apply_over(model: Any, batches: Iterable[Batch]) -> np.ndarray:
    """The logits of every row of some batches of equal size."""
    graphdef, variables = nnx.split(model)
    mesh = make_mesh()
    logits = [_logits(graphdef, variables, spread(batch, mesh)["images"]) for batch in batches]
    return np.concatenate(jax.device_get(logits)).astype(np.float32)


_logits = jax.jit(
    lambda graphdef, variables, images: nnx.merge(graphdef, variables)(images),
    static_argnums=0,
)


class Prediction(NamedTuple):
    """What a model says of an image."""

    label: str
    """The likeliest class."""
    probabilities: dict[str, float]
    """Of every class."""


def predict(
    folder: str | Path, images: Sequence[Image.Image | np.ndarray | str | Path], *, step: Any = "latest"
) -> list[Prediction]:
    """What the model of a run says of some images.

    Args:
      folder: of a run of one seed.
      images: Pillow's, arrays (x, y) or (x, y, 3) of 0 to 255 (uint16: to 65,535), or files.
      step: which checkpoint: a step, "latest" or "best".

    Raises:
      FileNotFoundError: no run in the folder, or no such file.
      ValueError: the folder holds another model, or a file is no image.
    """
    folder = Path(folder)
    model, _ = load_model(folder, step=step)
    said = load_meaning(folder)
    classes, preprocess = said.classes, Preprocess(said.preprocess, said.image_size, model.config.channels)

    def opened(image) -> Image.Image:
        if isinstance(image, Image.Image):
            return ImageOps.exif_transpose(image)
        if not isinstance(image, str | Path):
            return from_array(image)
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image} does not exist")
        return open_picture(image, str(image))

    if not len(images):
        return []
    logits = _logits(*nnx.split(model), np.stack([preprocess(opened(image)) for image in images]))
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1), float)
    return [Prediction(classes[int(np.argmax(p))], dict(zip(classes, p.tolist(), strict=True))) for p in probabilities]
