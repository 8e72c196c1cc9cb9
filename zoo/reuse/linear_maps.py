"""The linear maps of a model: which parameters are their weights, and along which axes these read and write.

Every family has them: projections of mixers, channel mixers, heads, the experts of a mixture, the blocks of Monarch
matrices. Whatever is read like a parameter, `weight[...]`, can stand in a weight's place: see `ComputedWeight`.
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from m2 import BlockdiagLinear, MonarchLinear
from zoo.layers.moe import ExpertLinear
from zoo.models.frozen import Frozen

Model = TypeVar("Model", bound=nnx.Module)


class Axes(NamedTuple):
    """Where a weight's inputs and its outputs lie. Before both are blocks or experts, each with a map of its own."""

    d_in: int
    d_out: int


_AXES: dict[type, dict[str, Axes]] = {
    nnx.Linear: {"kernel": Axes(-2, -1)},
    ExpertLinear: {"kernel": Axes(-2, -1)},
    BlockdiagLinear: {"kernel": Axes(-1, -2)},
    MonarchLinear: {"w1": Axes(-1, -2), "w2": Axes(-1, -2)},
}


_OF_FILTERS = re.compile(r"\bimplicit_filter(?:_rev)?\.")
_OF_BLOCKS = re.compile(rf"\b(?:layers|shared)\.(?!.*(?:\brouter\.|{_OF_FILTERS.pattern}))")


class ComputedWeight(nnx.Module):
    """Stands where a parameter stood and is read like one: `weight[...]` computes it."""

    undone_by: str
    """The function that makes a parameter of it again."""

    def whole(self) -> Array:
        """The weight."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Array:
        return self.whole()[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.whole).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return jax.eval_shape(self.whole).dtype


class LinearMap(NamedTuple):
    """A weight in a model."""

    owner: nnx.Module
    """The module that multiplies with it."""
    attribute: str
    """What it is called there."""
    axes: Axes

    @property
    def weight(self) -> Any:
        """A variable, or a `ComputedWeight`."""
        return getattr(self.owner, self.attribute)

    def replace(self, weight: nnx.Variable | ComputedWeight) -> None:
        """Puts another one in its place."""
        setattr(self.owner, self.attribute, weight)


def linear_maps(model: nnx.Module, targets: str | None = None) -> dict[str, LinearMap]:
    """The linear maps of a model by the names of their weights, "backbone.layers.0.mixer.in_proj.kernel".

    Args:
      model: any module.
      targets: a regular expression that the end of a map's name must match, whole words of it: "in_proj|out_proj" are
        those maps in every layer, r"layers\\.0\\..*" all of the first, ".*" all of the model. None: those of its
        blocks, but for routers of experts and for networks that make filters, which are small and sensitive.

    Raises:
      ValueError: no regular expression, or none of the model's maps match.
    """
    found: dict[str, LinearMap] = {}
    for path, module in nnx.iter_modules(model):
        for kind, weights in _AXES.items():
            if type(module) is kind:
                for attribute, axes in weights.items():
                    found[".".join(map(str, (*path, attribute)))] = LinearMap(module, attribute, axes)
    found = dict(sorted(found.items(), key=lambda item: _in_order(item[0])))
    if targets is None:
        return {name: linear for name, linear in found.items() if _OF_BLOCKS.search(name)}
    modules = {module_name(name) for name in found}
    chosen = named("targets", targets, modules)
    return {name: linear for name, linear in found.items() if module_name(name) in chosen}


def of_filter(name: str) -> bool:
    """Whether a map is one of a network that makes a filter's taps: it reads positions, whatever stands there."""
    return _OF_FILTERS.search(name) is not None


def module_name(name: str) -> str:
    """The name of the module that a weight is in."""
    return name.rpartition(".")[0]


def named(argument: str, pattern: str, names: Collection[str]) -> list[str]:
    """Those of some dotted names whose end, whole words of it, matches a regular expression.

    Raises:
      ValueError: no regular expression, or none matches: names the argument and what there is.
    """
    try:
        compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r}, expected a regular expression: {error}") from None
    chosen = [name for name in names if compiled.fullmatch(name)]
    if not chosen:
        ends = sorted({name.split(".")[-1] for name in names})
        raise ValueError(f"{argument}={pattern!r} matches nothing, expected names that end in {', '.join(ends)}")
    return chosen


def require_plain(model: nnx.Module, argument: str = "model") -> None:
    """Raises a ValueError unless all weights of a model are parameters: what goes by these would pass by the others.

    Args:
      model: any module.
      argument: what the error calls it.
    """
    computed = [(path, weight) for path, weight in nnx.iter_modules(model) if isinstance(weight, ComputedWeight)]
    if computed:
        path, weight = min(computed, key=lambda item: len(item[0]))  # what lies upon others is undone first
        name, kind = ".".join(map(str, path)), type(weight).__name__
        raise ValueError(f"{argument}.{name} is a {kind}, expected a parameter: {weight.undone_by} makes it one")
    for path, _ in nnx.to_flat_state(nnx.state(model, Frozen)):
        name = ".".join(map(str, path))
        raise ValueError(f"{argument}.{name} is frozen, expected a parameter: zoo.merge_lora makes it one")


def owned(model: Model) -> Model:
    """A model of the same numbers in arrays of its own, which outlive a training of the other: that gives its away."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, state))


def _in_order(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
