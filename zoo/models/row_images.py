"""The images of prompts as one array, whatever number each row has."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.vision_language import VisionLanguageModel

Images = np.ndarray | jax.Array | Sequence


def images_of_rows(images: Images, model: Any, prompt: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Images (b, i, x, y, c) of a batch of prompts, checked against the places that these have for them.

    Args:
      images: an array of that shape, or for each row a sequence of arrays (x, y, c); of a single prompt its own alone.
      model: what reads them.
      prompt: (b, l) ids.
      present: (b, l) where there is one.

    Raises:
      ValueError: a model that reads no images, images of several sizes or of none, whole numbers, or others than there
        are places for.
    """
    if not isinstance(model, VisionLanguageModel):
        raise ValueError(f"images are given to a {type(model).__name__}, expected a VisionLanguageModel")
    b = len(prompt)
    rows: list[Any] = [np.asarray(images)] if getattr(images, "ndim", 0) == 4 and b == 1 else list(images)
    if b == 1 and rows and np.ndim(rows[0]) == 3:
        rows = [rows]  # those of a single prompt
    given = [[np.asarray(image) for image in row] for row in rows]
    if kinds := {str(image.dtype) for row in given for image in row if not jnp.issubdtype(image.dtype, jnp.floating)}:
        raise ValueError(f"images are of {min(kinds)}, expected floats (x, y, c), normalised as the model was trained")
    each = [[image.astype(np.float32) for image in row] for row in given]
    shapes = {image.shape for row in each for image in row}
    if len(each) != b or len(shapes) != 1 or len(next(iter(shapes))) != 3:
        found = f"{len(each)} rows, of shapes {sorted(shapes, key=str)}"
        raise ValueError(f"images are {found}, expected {b} rows of images (x, y, c) of one size")
    most = max(map(len, each))
    filled = np.zeros((b, most, *next(iter(shapes))), np.float32)
    for row, several in enumerate(each):
        for i, image in enumerate(several):
            filled[row, i] = image
    places = (prompt == model.config.image_token_id) & present
    n = model.places_of_image(*filled.shape[2:4])
    for row, (several, count) in enumerate(zip(each, places.sum(axis=1), strict=True)):
        if count != n * len(several):
            raise ValueError(f"row {row} has {len(several)} images of {n} tokens, and {count} places for them")
    return filled
