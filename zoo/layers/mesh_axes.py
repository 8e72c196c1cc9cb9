"""Where parameters and activations lie on a mesh of devices: one table, from what an axis of theirs is along.

A parameter says with its definition what its axes are along, beside `decay`:

    nnx.Param(kernel, axes=("embed", "inner"))

A name stands for a width that the table below knows; ("heads", 32) for 32 heads, the channels of each in a run, which
are not cut apart; None for an axis that is never cut. Of the mesh's axes that a name may lie over, it takes the first
that is larger than 1, not taken yet, and divides it; if "fsdp" is left over then, what is cut over another is cut
further. Vectors are never cut over "fsdp": they are little, and would have to be gathered, too. A parameter that says
nothing is cut over "fsdp" along its largest axis that this divides.

Layers are gathered over "fsdp" where they run (`zoo.stack.gathering`), and cut along the other axes as they are stored.
All this goes by the ambient mesh, `jax.set_mesh`; without one nothing is cut.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from zoo.layers.names import unknown_name

# What a parameter's axis is along -> the mesh's axes that it may lie over.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "stored": ("fsdp",),  # of no meaning to devices that compute with it
    "inner": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "kv heads": ("tensor", "fsdp"),
    "blocks": ("tensor", "fsdp"),
    "side by side": ("tensor", "fsdp"),
    "vocab": ("tensor", "fsdp"),
    "experts": ("expert", "fsdp"),
}
ROWS, POSITIONS, TENSOR, FSDP = ("data", "fsdp", "expert"), "sequence", "tensor", "fsdp"


def spec_of(axes: tuple | None, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The mesh axes that a parameter is cut over.

    Args:
      axes: what it says of itself, for its last axes: those of a stack of layers come before. None: nothing.
      shape: its shape.
      sizes: devices along each axis of the mesh.

    Raises:
      ValueError: a name that the table does not know, or heads that "tensor" does not divide.
    """
    spec: list[Any] = [None] * len(shape)
    if axes is None:
        size = sizes.get(FSDP, 1)
        fitting = [i for i, width in enumerate(shape) if width and width % size == 0]
        if size > 1 and fitting and len(shape) > 1:
            spec[max(fitting, key=lambda i: shape[i])] = FSDP
        return PartitionSpec(*spec)
    if len(axes) > len(shape):
        raise ValueError(f"axes={axes} of a parameter of shape {shape}, expected at most {len(shape)}")
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        if axis is None:
            continue
        name, units = axis if isinstance(axis, tuple) else (axis, shape[i])
        if name not in MESH_AXES:
            raise ValueError(unknown_name("parameter axis", name, MESH_AXES))
        if name == "heads" and units % sizes.get(TENSOR, 1):
            raise ValueError(f"--mesh.tensor {sizes[TENSOR]} does not divide the {units} heads of a mixer")
        for mesh_axis in MESH_AXES[name]:
            size = sizes.get(mesh_axis, 1)
            divides = size > 1 and units > 0 and units % size == 0
            if divides and mesh_axis not in spec and (mesh_axis != FSDP or len(axes) > 1):
                spec[i] = mesh_axis
                break
    if sizes.get(FSDP, 1) > 1 and FSDP not in spec and len(axes) > 1:  # an axis that is cut once is cut once more
        for i, over in enumerate(spec):
            if over is not None and shape[i] % (sizes[over] * sizes[FSDP]) == 0:
                spec[i] = (over, FSDP)
                break
    return PartitionSpec(*spec)


def is_over(spec: PartitionSpec, mesh_axis: str) -> bool:
    """Whether something is cut over one of the mesh's axes."""
    return any(mesh_axis in over if isinstance(over, tuple) else mesh_axis == over for over in spec)


def without(spec: PartitionSpec, mesh_axis: str) -> PartitionSpec:
    """What is cut as a spec says, but whole along one of the mesh's axes."""

    def rest(over):
        kept = tuple(axis for axis in (over if isinstance(over, tuple) else (over,)) if axis != mesh_axis)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return PartitionSpec(*map(rest, spec))


def spec_of_variable(variable: Any, sizes: dict[str, int]) -> PartitionSpec:
    """`spec_of` a parameter, trained or frozen; other variables, constants, are on every device."""
    axes = variable.get_metadata().get("axes") if isinstance(variable, nnx.Variable) else None
    if axes is None and not isinstance(variable, nnx.Param):
        return PartitionSpec()
    return spec_of(axes, variable.shape, sizes)


def specs_of(variables: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`spec_of_variable` of a state (`nnx.state(model)`), or of a shape of one: a tree of specs."""
    sizes = dict(mesh.shape)
    return jax.tree.map(lambda x: spec_of_variable(x, sizes), variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def ambient_sizes() -> dict[str, int]:
    """Devices along each axis of the ambient mesh that the compiler cuts arrays over, those of more than one."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == jax.sharding.AxisType.Auto
    }
    return {name: size for name, size in mesh.shape.items() if size > 1 and name in automatic}


def placed_rows(x: jax.Array) -> jax.Array:
    """Activations (b, l, ...), rows over (data, fsdp, expert), positions over sequence, where these divide them."""
    sizes = ambient_sizes()
    rows = tuple(axis for axis in ROWS if axis in sizes)
    count = 1
    for axis in rows:
        count *= sizes[axis]
    if not sizes or x.shape[0] % count:
        return x
    # Positions that the axis does not divide are left to the compiler, which fills them up.
    divides = x.shape[1] % sizes.get(POSITIONS, 1) == 0
    along = (POSITIONS if POSITIONS in sizes else None) if divides else PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows or None, along))
