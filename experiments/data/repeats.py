"""Repeated augmentation: each image comes several times in a batch, changed in its own way each time.

An epoch is as many images as ever, and sees a share of the different ones, as in DeiT's recipe.

Source: Hoffer et al. 2019, arXiv:1901.09335; Berman et al. 2019, arXiv:1902.05509, section 3.3.
"""

import functools

import numpy as np


class RepeatedEpochs:
    """The rows of each step: the first n / repeats of an order of their own each epoch, each `repeats` times in a row.

    Args:
      n: rows there are.
      batch_size: rows in a batch. The last one is filled up with -1: no row.
      repeats: how often a row comes.
      seed: of the orders.
    """

    def __init__(self, n: int, batch_size: int, repeats: int, *, seed: int):
        self.n, self.batch_size, self.repeats, self.seed = n, batch_size, repeats, seed % (1 << 64)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.n_batches = -(-n // batch_size)
        """Steps of an epoch."""

    def __call__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.n_batches)
        return self._plan(epoch)[place]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        rows = np.repeat(order[: -(-self.n // self.repeats)], self.repeats)[: self.n]
        return np.split(np.pad(rows, (0, -self.n % self.batch_size), constant_values=-1), self.n_batches)
