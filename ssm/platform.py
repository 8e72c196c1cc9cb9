"""Forms of one operation, chosen by the platform that the program is for.

Not by that of the process, which may lower a program for another one (`jax.export`, a CPU that compiles ahead for TPU).

`by_platform` chooses between forms in JAX, all of which are traced. `Kernel` is a form for TPUs alone that nothing is
imported or traced for until a program for a TPU is lowered.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from ssm.sequence_cut import ROWS

# What kernels take as `interpret` on any platform, or None: they run on TPUs alone. For tests.
INTERPRET: Any = None


def by_platform(
    cpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any, tpu: Callable[..., Any] | None = None
) -> Any:
    """`cpu(*operands)` in a program for a CPU, `tpu` in one for a TPU, `elsewhere` in one for any other platform.

    All are traced and must return the same shapes and dtypes, one is lowered. Under a transformation that needs
    derivatives each would keep its own residuals, so call this inside the rules of a `jax.custom_vjp`.

    Args:
      cpu, elsewhere: functions of the operands.
      *operands: pytrees of arrays.
      tpu: likewise, or None: TPUs have `elsewhere`.
    """
    tpu = elsewhere if tpu is None else tpu
    if cpu is elsewhere is tpu:
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, tpu=tpu, default=elsewhere)


class Kernel(NamedTuple):
    """A function of arrays that runs on TPUs alone, as a kernel of Pallas.

        scan = Kernel("ssm.kernels.selective_scan_tpu", "forward", otherwise)
        y, state = scan(out_shape, u, delta)

    A program for another platform is refused when it is lowered, so a kernel can stand in a form of `by_platform`.
    Call it inside the rules of a `jax.custom_vjp`: its derivative, as a product of a Hessian with a vector needs it, is
    that of `otherwise`. Under `jax.vmap` one comes after the other.

    XLA cannot divide a kernel over devices. So under an ambient mesh (`jax.set_mesh`) whose axes of several devices are
    all of rows, each device runs the kernel on its own rows; where a program is divided in any other way, `otherwise`
    takes its place.
    """

    module: str
    """Imported when a program for a TPU is lowered."""
    name: str
    """Of the function in it. It takes the operands, and `interpret`."""
    otherwise: Callable[..., Any]
    """The same function in JAX."""
    whole: tuple[int, ...] = ()
    """Which operands have no rows. The others, and all that it returns, have rows as their first axis."""

    def __call__(self, out_shape: Any, *operands: Any) -> Any:
        """The function of these operands, arrays or None.

        Args:
          out_shape: pytree of `jax.ShapeDtypeStruct`, what it returns.
          *operands: the first one has rows.
        """
        if INTERPRET is not None:
            return self._load()(*operands, interpret=INTERPRET)
        sizes = _auto_axes()
        rows = tuple(name for name in ROWS if sizes.get(name, 1) > 1)
        parts = math.prod(sizes[name] for name in rows)
        if not sizes or math.prod(sizes.values()) != parts or operands[0].shape[0] % parts:
            return self._bind(out_shape, *operands)

        def local(*operands):
            return self._bind(jax.tree.map(part, out_shape), *operands)

        def part(x):
            return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)

        specs = tuple(PartitionSpec() if i in self.whole else PartitionSpec(rows) for i in range(len(operands)))
        axes = set(jax.sharding.get_abstract_mesh().axis_names)  # and those of a `jax.shard_map` around, as Mosaic asks
        divided = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(rows), axis_names=axes, check_vma=False)
        return jax.jit(divided)(*operands)  # outside of a `jax.jit`, some of a mesh's axes alone are an error

    def _bind(self, out_shape, *operands):
        arrays, operands_tree = jax.tree.flatten(operands)
        shapes, out_tree = jax.tree.flatten(out_shape)
        outs = tuple((shape.shape, shape.dtype) for shape in shapes)
        return jax.tree.unflatten(out_tree, _kernel.bind(*arrays, kernel=self, tree=operands_tree, outs=outs))

    def _load(self):
        return getattr(importlib.import_module(self.module), self.name)


def _auto_axes():
    """The axes of the ambient mesh that XLA divides programs over, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return {name: size for (name, size), kind in kinds if kind == AxisType.Auto}


_kernel = Primitive("ssm_kernel")
_kernel.multiple_results = True


@_kernel.def_abstract_eval
def _shapes(*arrays, kernel, tree, outs):
    like = arrays[0]
    empty = [PartitionSpec(*[None] * len(shape)) for shape, _ in outs]
    return [
        like.update(shape=shape, dtype=dtype, weak_type=False, sharding=like.sharding.update(spec=spec))
        for (shape, dtype), spec in zip(outs, empty, strict=True)
    ]


@functools.cache
def _compiled(params):
    return jax.jit(functools.partial(_kernel.bind, **dict(params)))


@_kernel.def_impl
def _run_now(*arrays, **params):
    return _compiled(tuple(params.items()))(*arrays)


def _vmapped(arrays, axes, **params):
    given = [x if axis is None else batching.bdim_at_front(x, axis, None) for x, axis in zip(arrays, axes, strict=True)]

    def one(mapped):
        mapped = iter(mapped)
        return _kernel.bind(
            *[x if axis is None else next(mapped) for x, axis in zip(given, axes, strict=True)], **params
        )

    outs = lax.map(one, [x for x, axis in zip(given, axes, strict=True) if axis is not None])
    return outs, [0] * len(outs)


batching.primitive_batchers[_kernel] = _vmapped


def _pushed_forward(arrays, tangents, *, kernel, tree, outs):
    def flat(*arrays):
        return jax.tree.leaves(kernel.otherwise(*jax.tree.unflatten(tree, arrays)))

    return jax.jvp(flat, tuple(arrays), tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[_kernel] = _pushed_forward


def _lower_for_tpu(context, *values, kernel, tree, outs):
    return _lower(context, values, tree, kernel.otherwise if _is_divided(context) else kernel._load())


def _lower_elsewhere(context, *values, kernel, tree, outs):
    platforms = context.module_context.platforms
    if "tpu" in platforms:  # one program for several: another branch than the TPU's, which nothing runs
        return _lower(context, values, tree, kernel.otherwise)
    raise NotImplementedError(
        f"implementation='pallas' in a program for {'/'.join(platforms)}: {kernel.module} has kernels for TPUs alone"
    )


mlir.register_lowering(_kernel, _lower_for_tpu, platform="tpu")
mlir.register_lowering(_kernel, _lower_elsewhere)


def _lower(context, values, tree, function):
    def flat(*arrays):
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, arrays)))

    return mlir.lower_fun(flat, multiple_results=True)(context, *values)


def _is_divided(context):
    """Whether XLA is to divide the program over devices here: not on one device, nor inside a `jax.shard_map`."""
    axes = context.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    if mesh is None:
        return getattr(axes, "num_devices", 1) != 1
    manual = axes.manual_axes | set(getattr(mesh, "manual_axes", ()))
    return mesh.size > 1 and manual != set(mesh.axis_names)
