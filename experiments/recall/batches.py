"""Batches of a synthetic task: those of training by seed and step, and those held out, the same for every run."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.loop.mesh import current_mesh, own_rows
from experiments.loop.train import Batch
from experiments.recall.tasks import Data


class Batches:
    """Training batches without end; each is a function of seed and step alone.

    Args:
      data: the task.
      batch_size: rows of a batch over all processes together; each draws all and keeps those of its devices.
      seed: of the run.
    """

    def __init__(self, data: Data, *, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed, self.step = data, batch_size, seed, 0
        self._rows = own_rows(current_mesh())(batch_size)

    def __next__(self) -> Batch:
        self.step += 1
        generator = np.random.default_rng((0, self.step, self.seed % (1 << 64)))
        batch = self.data.sample(generator, self.batch_size, self.step)
        return {name: array[self._rows] for name, array in batch.items()}

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def held_out(data: Data, *, batch_size: int, n_batches: int) -> Iterable[Batch]:
    """Batches drawn apart from those of every training run, the same for each. The curriculum is over in them.

    Every process has all of their rows.
    """
    for i in range(n_batches):
        yield data.sample(np.random.default_rng((1, i)), batch_size, 1 << 62)
