"""Where a training state lies on the mesh: parameters by the names of their axes, what is like them as they do.

See `zoo.layers.mesh_axes` for the table. An optimiser's moments, running means and gradients are cut as the parameters
are; counts and keys are on every device; what a step leaves for the next, by rows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoo
from experiments.loop.flags import UsageError, usage_errors
from experiments.loop.mesh import ROWS
from zoo.layers.mesh_axes import is_over, specs_of

# Of all parameters, what may be whole on every device of --mesh.fsdp.
MOST_REPLICATED = 0.02


class Made(NamedTuple):
    """A model, taken apart."""

    graphdef: nnx.GraphDef
    params: Any
    """Its parameters, an `nnx.State`."""
    rest: Any
    """Its other variables."""


def is_cut(mesh: Any) -> bool:
    """Whether parameters are cut over a mesh, rather than whole on every device."""
    return any(mesh.shape.get(axis, 1) > 1 for axis in ("fsdp", "tensor", "expert"))


def make_model(init: Callable[[], nnx.Module], mesh: Mesh) -> Made:
    """A model's variables, each device with its part: what is new is made so, and never whole on one.

    Args:
      init: makes the model, or gives one that is there.
      mesh: the devices.

    Raises:
      UsageError: parameters that the mesh does not cut, see `check_cut`.
    """
    if not is_cut(mesh):
        graphdef, *parts = nnx.split(init(), nnx.Param, ...)
        return Made(graphdef, *jax.device_put(parts, NamedSharding(mesh, PartitionSpec())))
    graphdefs, fresh = [], []

    def make() -> tuple[Any, ...]:
        graphdef, *parts = nnx.split(init(), nnx.Param, ...)
        graphdefs.append(graphdef)
        fresh.append(any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(parts[0])))
        return tuple(parts)

    params, rest = jax.eval_shape(make)
    with usage_errors():  # heads that --mesh.tensor does not divide
        check_cut(params, mesh)
    shardings = tuple(_on(mesh, specs_of(part, mesh), part) for part in (params, rest))  # of frozen parameters, too
    if fresh[0]:
        return Made(graphdefs[0], *jax.jit(make, out_shardings=shardings)())
    params, rest = make()
    return Made(graphdefs[0], jax.device_put(params, shardings[0]), jax.device_put(rest, shardings[1]))


def check_cut(params: Any, mesh: Any) -> None:
    """Raises a UsageError where more than 2 % of the parameters would be whole on every device of --mesh.fsdp.

    A ValueError is one of the table's, see `spec_of`: heads that --mesh.tensor does not divide.

    Args:
      params: parameters with their metadata, or shapes of them.
      mesh: the devices.
    """
    specs = dict(nnx.to_flat_state(specs_of(params, mesh)))
    if (size := mesh.shape["fsdp"]) == 1:
        return
    sizes = {path: math.prod(p.shape) for path, p in nnx.to_flat_state(params)}
    # Vectors are whole by design, and little in any model that is worth cutting.
    whole = {path: sizes[path] for path, spec in specs.items() if len(spec) > 1 and not is_over(spec, "fsdp")}
    if sum(whole.values()) > MOST_REPLICATED * sum(sizes.values()):
        largest = max(whole, key=lambda path: whole[path])
        raise UsageError(
            f"--mesh.fsdp {size} would cut only {1 - sum(whole.values()) / sum(sizes.values()):.1%} of the parameters, "
            f"expected at least {1 - MOST_REPLICATED:.0%}: it divides no axis of {'.'.join(map(str, largest))}"
        )


def specs_of_params(params: Any, model: nnx.Module, mesh: Any) -> Any:
    """The same of parameters, or of what is like them: their gradients, say."""
    named = nnx.to_pure_dict(specs_of(nnx.state(model, nnx.Param), mesh))
    return zoo.stack_like(named, params, join=lambda several: PartitionSpec(None, *several[0]))


def specs_of_state(state: Any, model: nnx.Module, mesh: Any) -> Any:
    """Of each array of a `TrainState`, or of a shape of one, the mesh axes that it is cut over.

    Args:
      state: parameters, an optimiser's state, and so on; layers may be stacked.
      model: its parameters' metadata is read.
      mesh: the devices.
    """
    params = specs_of_params(state.params, model, mesh)
    by_path = {
        tuple(map(_key, path)): spec
        for path, spec in jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, PartitionSpec))
    }
    shapes = {tuple(map(_key, path)): x.shape for path, x in jax.tree.leaves_with_path(state.params)}

    def like_a_parameter(path: tuple, x: Any) -> PartitionSpec:
        keys = tuple(map(_key, path))
        for start in range(len(keys)):
            if by_path.get(keys[start:]) is not None and shapes[keys[start:]] == x.shape:
                return by_path[keys[start:]]
        return PartitionSpec()

    specs = jax.tree.map_with_path(like_a_parameter, state)
    return dataclasses.replace(specs, carry=jax.tree.map(lambda _: PartitionSpec(ROWS), state.carry))


def shardings_of_state(state: Any, model: nnx.Module, mesh: Mesh) -> Any:
    """The shardings of a `TrainState`, or of a shape of one."""
    return _on(mesh, specs_of_state(state, model, mesh), state)


def _on(mesh: Mesh, specs: Any, like: Any) -> Any:
    """Shardings of specs, in the structure of what they are of."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return jax.tree.unflatten(jax.tree.structure(like), [NamedSharding(mesh, spec) for spec in leaves])


def _key(entry: Any) -> Any:
    """What a step of a path is called: of a dict, a list, or a field."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)
