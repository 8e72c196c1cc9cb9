"""A tune as the few weights that it moved most: kept alone, put on the base again, and on those of other tunes.

    delta = zoo.sparse_delta(base, tuned, share=0.01)       {"backbone....kernel": SparseDelta(places, changes), ...}
    model = zoo.add_deltas(base, [language, task])          changes that meet add up

Source: Ansell et al. 2022, arXiv:2110.07560, section 3 (the weights that move most, sparse differences that compose).

Axes: k weights that moved.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.models.frozen import copied
from zoo.reuse.linear_maps import Model, require_plain

_FILE = "sparse_delta.safetensors"


class SparseDelta(NamedTuple):
    """What of one parameter moved."""

    places: Int[np.ndarray, "k"]
    """Where, in the parameter laid out in a row; rising."""
    changes: Float[Array, "k"]
    """By how much."""


Deltas = Mapping[str, SparseDelta]


def sparse_delta(base: Model, tuned: Model, *, share: float = 0.01) -> dict[str, SparseDelta]:
    """The weights that a tune moved most, of all parameters together, and by how much.

    Args:
      base: what was tuned.
      tuned: a model of the same structure.
      share: of all weights, above 0 and at most 1; fewer where fewer moved.

    Raises:
      ValueError: another share, a model of another structure, or one with adapters, quantised or frozen.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> tuned = zoo.create("mamba-130m", rngs=1, d_model=16, n_layers=2, vocab_size=32)
      >>> delta = zoo.sparse_delta(model, tuned, share=0.01)  # the hundredth part of the weights that moved most
      >>> zoo.add_deltas(model, [delta]).config == model.config
      True
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}, expected above 0 and at most 1")
    for argument, model in (("base", base), ("tuned", tuned)):
        require_plain(model, argument)
    ours, theirs = (_parameters(model) for model in (base, tuned))
    if other := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"tuned has other parameters than base, such as {other[0]}")
    for name, param in ours.items():
        if param.shape != theirs[name].shape:
            raise ValueError(f"tuned.{name} has shape {theirs[name].shape}, base's {param.shape}")
    wide = {name: jnp.promote_types(param.dtype, jnp.float32) for name, param in ours.items()}
    changes = {
        name: np.asarray(theirs[name][...].astype(d) - ours[name][...].astype(d)).ravel() for name, d in wide.items()
    }
    sizes = np.abs(np.concatenate(list(changes.values())))
    n = max(1, int(share * len(sizes)))
    chosen = np.zeros(len(sizes), bool)
    chosen[np.argpartition(-sizes, n - 1)[:n]] = True
    chosen &= sizes > 0
    ends = np.cumsum([len(change) for change in changes.values()])[:-1]
    places = {name: np.flatnonzero(part) for name, part in zip(changes, np.split(chosen, ends), strict=True)}
    return {name: SparseDelta(where, jnp.asarray(changes[name][where])) for name, where in places.items() if len(where)}


def add_deltas(base: Model, deltas: Sequence[Deltas], *, weights: Sequence[float] | None = None) -> Model:
    """A model with the changes of some tunes; where they meet they add up.

    Args:
      base: what all were tuned from. It stays as it is.
      deltas: from `sparse_delta`.
      weights: of each. None: 1.

    Raises:
      ValueError: a parameter that the model does not have, or places beyond its end; another number of weights.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> tuned = zoo.create("mamba-130m", rngs=1, d_model=16, n_layers=2, vocab_size=32)
      >>> all_of_it = zoo.sparse_delta(model, tuned, share=1.0)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> bool(jnp.allclose(zoo.add_deltas(model, [all_of_it])(ids), tuned(ids), atol=1e-4))
      True
    """
    require_plain(base, "base")
    factors = [1.0] * len(deltas) if weights is None else list(weights)
    if len(factors) != len(deltas):
        raise ValueError(f"weights={weights!r}, expected one for each of the {len(deltas)} tunes")
    graphdef, *parts = nnx.split(base, nnx.Param, ...)
    params, rest = dict(nnx.to_flat_state(parts[0])), parts[1]
    known = {".".join(map(str, path)): path for path in params}
    for factor, delta in zip(factors, deltas, strict=True):
        for name, (places, changes) in delta.items():
            if name not in known:
                raise ValueError(f"{name} is in a delta, and the model has no such parameter")
            param = params[known[name]]
            value = param[...]
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < value.size:
                raise ValueError(f"{name} has {value.size} weights, a delta one at {int(places.max())}")
            wide = value.astype(changes.dtype).ravel().at[places].add(factor * changes)
            params[known[name]] = param.replace(wide.reshape(value.shape).astype(value.dtype))
    return copied(nnx.merge(graphdef, nnx.from_flat_state(list(params.items())), rest))


def save_deltas(delta: Deltas, folder: str | os.PathLike) -> None:
    """Writes a delta alone: four bytes a place, and its change."""
    from safetensors.numpy import save_file

    tensors = {f"{name}.places": np.asarray(one.places, np.uint32) for name, one in delta.items()}
    tensors |= {f"{name}.changes": np.asarray(one.changes) for name, one in delta.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(folder) / _FILE))


def load_deltas(folder: str | os.PathLike) -> dict[str, SparseDelta]:
    """What `save_deltas` wrote.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: places without changes, or not as many.
    """
    from safetensors.numpy import load_file

    path = Path(folder) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {_FILE}")
    tensors = load_file(str(path))
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        places, changes = (tensors.get(f"{name}.{part}") for part in ("places", "changes"))
        if places is None or changes is None or places.shape != changes.shape:
            raise ValueError(f"{path}: {name} has not as many places as changes")
        found[name] = SparseDelta(places.astype(np.int64), jnp.asarray(changes))
    return found


def _parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
