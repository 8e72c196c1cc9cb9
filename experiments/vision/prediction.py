"""What an image classifier says of all images of a split, batch by batch."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.data.augment import Preprocess
from experiments.data.images import Images
from experiments.data.packing import Batch, make_batches
from experiments.loop.mesh import current_mesh, gathered, placed, spread
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
    mesh = current_mesh()
    variables = placed(variables, mesh)
    with jax.set_mesh(mesh):
        logits = [_logits(graphdef, variables, spread(batch, mesh)["images"]) for batch in batches]
    return np.concatenate(gathered(logits)).astype(np.float32)


_logits = jax.jit(
    lambda graphdef, variables, images: nnx.merge(graphdef, variables)(images),
    static_argnums=0,
)
