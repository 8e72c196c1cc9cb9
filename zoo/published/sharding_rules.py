"""Where the parameters of a model go, on many devices."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from zoo.layers.mesh_axes import spec_of

ShardingRule = Callable[[tuple, tuple[int, ...]], Sharding]
"""Gives each parameter, by its path and shape, its place."""


Placing = Mesh | Sharding | ShardingRule
"""What `from_pretrained` takes as `sharding`."""


def sharding_of(placing: Placing | None, path: tuple, param: nnx.Variable) -> Sharding | None:
    """The place of a parameter, None for the default device; see `from_pretrained`."""
    if placing is None:
        placing = jax.sharding.get_mesh()
        if placing.empty:
            return None
    if isinstance(placing, Mesh):
        return NamedSharding(placing, spec_of(param.get_metadata().get("axes"), param.shape, dict(placing.shape)))
    return placing if isinstance(placing, Sharding) else placing(path, param.shape)


def shard_largest(mesh: Mesh, axis: str | None = None) -> ShardingRule:
    """A rule for `from_pretrained`: cuts each parameter along its largest dimension that the mesh's axis divides.

    Args:
      mesh: the devices.
      axis: one of its axes. None: the first.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> callable(zoo.shard_largest(mesh))  # zoo.from_pretrained(folder, sharding=zoo.shard_largest(mesh))
      True
    """
    axis = mesh.axis_names[0] if axis is None else axis
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r}, expected one of {', '.join(map(str, mesh.axis_names))}")
    size = mesh.shape[axis]

    def rule(path: tuple, shape: tuple[int, ...]) -> Sharding:
        fitting = [i for i, width in enumerate(shape) if width % size == 0 and width > 0]
        spec: list[str | None] = [None] * len(shape)
        if fitting:
            spec[max(fitting, key=lambda i: shape[i])] = axis
        return NamedSharding(mesh, PartitionSpec(*spec))

    return rule


def shard_experts(mesh: Mesh, axis: str = "expert") -> ShardingRule:
    """A rule that spreads the experts of mixtures over the mesh's axis, and puts everything else on every device.

        params = nnx.to_flat_state(nnx.state(model))
        placed = [(path, p.replace(jax.device_put(p[...], rule(path, p.shape)))) for path, p in params]
        nnx.update(model, nnx.from_flat_state(placed))

    With a capacity_factor each device computes its own experts; without one, experts are sent to where they are needed.

    Args:
      mesh: the devices.
      axis: one of its axes, whose size divides the number of experts.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> rule = zoo.shard_experts(mesh)  # zoo.from_pretrained(folder, sharding=rule)
      >>> callable(rule)
      True
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r}, expected one of {', '.join(map(str, mesh.axis_names))}")

    def rule(path: tuple, shape: tuple[int, ...]) -> Sharding:
        if "experts" not in path:
            return NamedSharding(mesh, PartitionSpec())
        if shape[0] % mesh.shape[axis]:
            raise ValueError(f"n_experts={shape[0]}, expected a multiple of {mesh.shape[axis]}, the size of {axis!r}")
        return NamedSharding(mesh, PartitionSpec(axis))

    return rule
