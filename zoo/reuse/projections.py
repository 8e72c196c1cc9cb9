"""What the mixers of a model write before they mix: queries, keys and values, and their counterparts in other mixers.

    with projections(model) as (told, written):        told is the model, and fills `written` while it runs
        hidden = told(ids)

    attention          queries | keys | values
    linear attention   queries | keys | values | gate | steps
    Mamba              x | z, and steps | B | C
    Mamba-2, Mamba-3   z | x | B | C | steps | ...
    Monarch Mixer      its three streams

The rule is the same for all: what each linear map of a mixer gives, but for the last one it calls, whose output goes to
the residual stream; a map that writes several parts side by side is split as the mixer says. Maps that make filters,
Mamba's low-rank steps, which it multiplies itself, and modules that depths share are not among them.

Axes: p width of a part.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m2 import BlockdiagLinear, M2Mixer, MonarchLinear
from ssm import Mamba
from zoo.models.adjust import run_layer_by_layer
from zoo.models.build import Model
from zoo.models.distill import backbone_of
from zoo.models.frozen import copied
from zoo.reuse.linear_maps import linear_maps, module_name
from zoo.stack.block import Block


class _Call(NamedTuple):
    """A map that was called."""

    owner: str
    """The name of the mixer that it is of."""
    name: str
    widths: tuple[int, ...]
    """Of the parts of its output."""
    output: Array


class Written:
    """What a call of a model has written."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self.hidden: list[Float[Array, "b l d"]] = []
        """The residual stream behind each block."""

    @property
    def parts(self) -> dict[str, Float[Array, "b l p"]]:
        """The parts, by the name of the map, how often it had been called, and which of its parts it is."""
        last = {call.owner: i for i, call in enumerate(self._calls)}
        found: dict[str, Array] = {}
        for i, call in enumerate(self._calls):
            if i == last[call.owner]:
                continue
            ends = list(itertools.accumulate(call.widths))[:-1]
            for j, part in enumerate(jnp.split(call.output, ends, axis=-1)):
                if part.shape[-1]:
                    times = sum(other.name == call.name for other in self._calls[:i])
                    found[f"{call.name}.{times}.{j}"] = part
        return found


_written: contextvars.ContextVar[Written | None] = contextvars.ContextVar("_written", default=None)


def _tell(module: Any, y: Array) -> Array:
    """Tells what a map gives, and gives it."""
    if (written := _written.get()) is not None:
        owner, name, widths = module.told_as
        written._calls.append(_Call(owner, name, widths, y))
    return y


class _Linear(nnx.Linear):
    """Tells what it gives, as the other two do."""

    told_as: tuple[str, str, tuple[int, ...]]

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        return _tell(self, super().__call__(inputs, *args, **options))


class _Blockdiag(BlockdiagLinear):
    told_as: tuple[str, str, tuple[int, ...]]

    def __call__(self, x: Array) -> Array:
        return _tell(self, super().__call__(x))


class _Monarch(MonarchLinear):
    told_as: tuple[str, str, tuple[int, ...]]

    def __call__(self, x: Array) -> Array:
        return _tell(self, super().__call__(x))


class _Block(Block):
    """Tells what comes behind it."""

    def run(self, x, **given):
        y, loss = super().run(x, **given)
        if (written := _written.get()) is not None:
            written.hidden.append(y)
        return y, loss


_TELLING: dict[Any, Any] = {nnx.Linear: _Linear, BlockdiagLinear: _Blockdiag, MonarchLinear: _Monarch}


@contextlib.contextmanager
def projections(model: Model) -> Iterator[tuple[Model, Written]]:
    """A model that computes what the given one does, layer by layer, and tells what its mixers write.

    Nothing of it is computed again in the backward pass (`remat`), and there are no loops over layers (`scan_layers`),
    which do not give what is inside them.

    Args:
      model: any of the zoo's. It stays as it is.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> with projections(model) as (told, written):
      ...     logits = told(jnp.ones((1, 3), jnp.int32))
      >>> len(written.hidden), len(written.parts)  # of each layer x and z, steps, B and C
      (2, 10)
    """
    model = copied(model)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for name, linear in linear_maps(model).items():
        own = module_name(name)
        owner = module_name(own)
        if ".mixer." in f".{own}." and type(linear.owner) in _TELLING:
            told: Any = linear.owner
            told.__class__ = _TELLING[type(told)]
            told.told_as = (owner, own, _widths(modules[owner], own.rpartition(".")[2]))
    run_layer_by_layer(model)
    for block in backbone_of(model).layers:
        block.__class__ = _Block
    token = _written.set(written := Written())
    try:
        yield model, written
    finally:
        _written.reset(token)


def _widths(mixer: Any, attribute: str) -> tuple[int, ...]:
    """Widths of what a map of a mixer writes side by side; (0,) is all of it, whatever it is."""
    if isinstance(mixer, Mamba):
        beside = {"in_proj": (mixer.d_inner,) * 2, "x_proj": (mixer.dt_rank, *(mixer.config.d_state,) * 2)}
        return beside.get(attribute, (0,))
    if isinstance(mixer, M2Mixer) and attribute == "in_linear":
        return (mixer.out_linear.in_features,) * 3
    if attribute == "in_proj" and isinstance(parts := getattr(mixer, "parts", None), tuple):
        flat = [part for entry in parts for part in (entry if isinstance(entry[0], tuple) else (entry,))]
        return tuple(width for width, _ in flat)
    return (0,)
