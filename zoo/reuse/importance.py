"""Which units of a model can go: those without which its maps, refitted to the units that are left, lose least.

A unit is a channel or a head, some rows of each map that reads it. By the inputs' second moments H, see `calibration`,
what a map's output loses without the rows M, when all other rows make up for it, is

    tr(W_M^T ((H^-1)_MM)^-1 W_M)

The unit that costs least goes, the others are refitted, and so on. So of two units that say the same one can go at no
cost, and the other then cannot.

Source: Kurtic et al. 2023, arXiv:2302.04089, section 3.1 and Algorithm 1 (ZipLM); Muralidharan et al. 2024,
arXiv:2407.14679, section 3 (Minitron: channels by what norms give, layers by how much they turn the stream).

Axes: i inputs, o outputs, n units, m rows of a unit.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.models.distill import backbone_of
from zoo.models.frozen import copied
from zoo.reuse.linear_maps import Model

# Added to the diagonal of H, times its mean: moments of few inputs, in float32, are singular.
_DAMPING = 1e-5


class Reader(NamedTuple):
    """A map that reads units."""

    weight: Float[np.ndarray, "i o"]
    moment: Float[np.ndarray, "i i"]
    units: Int[np.ndarray, "n"]
    """Which units."""
    rows: Int[np.ndarray, "n m"]
    """Their rows in the weight."""


class _Left:
    """What is left of a map while units go, one after the other."""

    def __init__(self, reader: Reader):
        H = np.asarray(reader.moment, np.float64)
        self.weight = np.array(reader.weight, np.float64)
        self.whole = float(np.einsum("io,ij,jo->", self.weight, H, self.weight, optimize=True))
        damping = _DAMPING * np.mean(np.diagonal(H)) + np.finfo(np.float32).tiny
        self.inverse = np.linalg.inv(H + damping * np.eye(len(H)))
        self.units, self.rows = reader.units, reader.rows
        self.place = {int(unit): i for i, unit in enumerate(reader.units)}

    def costs(self) -> Float[np.ndarray, "n"]:
        """Of removing each unit, as a share of all that the map gives."""
        W, within = self.weight[self.rows], self.inverse[self.rows[:, :, None], self.rows[:, None]]
        solved = W / within if within.shape[-1] == 1 else np.linalg.solve(within, W)
        return np.einsum("nmo,nmo->n", W, solved, optimize=True) / (self.whole + np.finfo(np.float32).tiny)

    def remove(self, unit: int) -> None:
        if unit not in self.place:
            return
        M = self.rows[self.place[unit]]
        shares = np.linalg.solve(self.inverse[np.ix_(M, M)], self.inverse[M]).T  # i m
        self.weight -= shares @ self.weight[M]
        self.inverse -= shares @ self.inverse[M]
        self.weight[M] = 0
        self.inverse[M] = self.inverse[:, M] = 0
        self.inverse[M, M] = 1


def least_costly(readers: Sequence[Reader], n_units: int, n_kept: int, n_parts: int = 1) -> Int[np.ndarray, "k"]:
    """The units that stay, in order, where those go one by one that cost least.

    Args:
      readers: all maps that read them.
      n_units: how many there are.
      n_kept: how many stay.
      n_parts: the units are cut into so many runs of neighbours, of which equally many stay.

    Raises:
      ValueError: n_parts that do not divide both.
    """
    if n_kept % n_parts or n_units % n_parts or not 0 < n_kept <= n_units:
        raise ValueError(f"n_kept={n_kept}, expected a multiple of {n_parts}, at most {n_units}")
    there = np.ones(n_units, bool)
    for unit, _ in _one_by_one(readers, n_units, n_kept, n_parts):
        there[unit] = False
    return np.flatnonzero(there)


def removals(readers: Sequence[Reader], n_units: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n+1"]]:
    """All units in the order in which they go, and what has been lost when none, one, ... all have gone.

    Args:
      readers: all maps that read them.
      n_units: how many there are.

    Returns:
      (units, lost): the share of what the maps give, the mean over them, where what is left makes up for it.
    """
    gone, costs = zip(*_one_by_one(readers, n_units, 0, 1), strict=True)
    return np.asarray(gone), np.concatenate([[0.0], np.cumsum(costs)]) / len(readers)


def _one_by_one(readers: Sequence[Reader], n_units: int, n_kept: int, n_parts: int) -> Iterator[tuple[int, float]]:
    """Units as they go, and what each costs."""
    left = [_Left(reader) for reader in readers]
    part_of = np.arange(n_units) * n_parts // n_units
    there = np.ones(n_units, bool)
    for _ in range(n_units - n_kept):
        costs = np.zeros(n_units)
        for one in left:
            np.add.at(costs, one.units, one.costs())
        full = np.bincount(part_of[there], minlength=n_parts) <= n_kept // n_parts
        unit = int(np.argmin(np.where(there & ~full[part_of], costs, np.inf)))
        there[unit] = False
        for one in left:
            one.remove(unit)
        yield unit, float(costs[unit])


def largest(importance: Float[np.ndarray, "n"], n_kept: int, n_parts: int = 1) -> Int[np.ndarray, "k"]:
    """The most important units, in order: equally many of each of `n_parts` runs of neighbours."""
    n = len(importance)
    if n_kept % n_parts or n % n_parts or not 0 < n_kept <= n:
        raise ValueError(f"n_kept={n_kept}, expected a multiple of {n_parts}, at most {n}")
    order = np.argsort(-importance.reshape(n_parts, -1), axis=1, kind="stable")[:, : n_kept // n_parts]
    return np.sort((order + n // n_parts * np.arange(n_parts)[:, None]).ravel())


def block_influence(model: Model, batches: Iterable[Mapping[str, Array]]) -> Float[np.ndarray, "n"]:
    """How much each block turns the residual stream: 1 - the mean cosine of what enters it and what leaves it.

    Args:
      model: any with `hidden_states`.
      batches: as for `calibrate`.
    """
    bare: Any = copied(model)
    backbone_of(bare).norm_f = None  # the last state as the last block leaves it
    graphdef, state = nnx.split(bare)

    @jax.jit
    def sums(state: Any, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        states = nnx.merge(graphdef, state).hidden_states(**batch)
        mask = batch.get("mask")
        weight = jnp.ones(states[0].shape[:2]) if mask is None else mask.astype(jnp.float32)

        def cosine(x: Array, y: Array) -> Array:
            x, y = (v.astype(jnp.float32) for v in (x, y))
            return jnp.sum(x * y, -1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1) + 1e-30)

        each = [jnp.sum(weight * (1 - cosine(x, y))) for x, y in itertools.pairwise(states)]
        return jnp.stack(each), jnp.sum(weight)

    total, count = np.zeros(len(backbone_of(bare).blocks)), 0.0
    for batch in batches:
        more, weight = sums(state, dict(batch))
        total, count = total + np.asarray(more, np.float64), count + float(weight)
    return total / max(count, 1)
