"""Channels and heads that are cut over devices: what the ambient mesh says of its axis "tensor".

Under `jax.set_mesh(mesh)` with a mesh that has an axis "tensor" of more than one device, each device computes with its
share of a mixer's channels or heads, and the compiler adds up what the output projection makes of them. What a
projection gives side by side (x and its gate, say) has borders where no device's share ends: such weights lie cut all
the same, and are put together and cut anew, part by part, where they are used. Without such a mesh nothing changes.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

AXIS = "tensor"
# A width, and in how many equal pieces it may be cut at most; 1 for what every device has.
Part = tuple[int, int]


def pieces() -> int:
    """Among how many devices channels are shared out."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[AXIS] if kinds.get(AXIS) == AxisType.Auto else 1


def cut(x: jax.Array, axis: int, units: int | None = None) -> jax.Array:
    """x, cut along one axis; what has fewer units than the devices divide is whole on each of them."""
    n = pieces()
    if n == 1:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = AXIS if (x.shape[axis] if units is None else units) % n == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def project(linear: Any, x: jax.Array, parts: Sequence[Any], scale: jax.Array | None = None) -> list:
    """The parts of a linear map's output, each cut by itself; several that go on together as a tuple, see `convolve`.

    Args:
      linear: `nnx.Linear`, or anything that is called like it.
      x: its input.
      parts: of its output, in order: a `Part`, or a tuple of those that go on together.
      scale: what each channel of the output is multiplied by. None: nothing.
    """
    flat = [part for entry in parts for part in _each(entry)]
    if pieces() == 1:
        widths = [sum(width for width, _ in _each(entry)) for entry in parts]
        ends = list(itertools.accumulate(widths))[:-1]
        return [
            (y,) if isinstance(entry[0], tuple) else y
            for entry, y in zip(parts, jnp.split(_scaled(linear(x), scale), ends, axis=-1), strict=True)
        ]
    scales = [None] * len(flat) if scale is None else _split(scale, flat, -1)
    ys = map(_scaled, _parts_of(linear, x, flat), scales)
    return [tuple(next(ys) for _ in entry) if isinstance(entry[0], tuple) else next(ys) for entry in parts]


def _parts_of(linear, x, parts):
    if type(linear) is not nnx.Linear:  # one with an adapter, or in few bits
        for y, (_, units) in zip(_split(linear(x), parts, -1), parts, strict=True):
            yield cut(y, -1, units)
        return
    kernels = _split(_together(linear.kernel[...], 1), parts, 1)
    biases = [None] * len(parts) if linear.bias is None else _split(_together(linear.bias[...], 0), parts, 0)
    for kernel, bias, (_, units) in zip(kernels, biases, parts, strict=True):
        args = (x, cut(kernel, 1, units), None if bias is None else cut(bias, 0, units))
        wide, kernel, bias = linear.promote_dtype(args, dtype=linear.dtype)
        contracted = (((wide.ndim - 1,), (0,)), ((), ()))
        y = linear.dot_general(wide, kernel, contracted, precision=linear.precision)
        yield cut(y if bias is None else y + bias, -1, units)


def side_by_side(ys: Sequence[jax.Array], parts: Sequence[Part]) -> tuple[jax.Array, ...]:
    """What several projections give, as `convolve` takes it: one array, or where channels are cut each by itself."""
    if pieces() == 1:
        return (jnp.concatenate(ys, axis=-1),)
    return tuple(cut(y, -1, units) for y, (_, units) in zip(ys, parts, strict=True))


def convolve(
    conv: Any,
    inputs: tuple[jax.Array, ...],
    state: jax.Array | None,
    parts: Sequence[Part],
    **positions: Any,
) -> tuple[list, jax.Array]:
    """A depthwise convolution of parts that lie side by side, each by itself where channels are cut.

    Args:
      conv: called with (x, state, weights=(kernel, bias), **positions), gives (y, state); has `kernel` and `bias`.
      inputs: the parts, as `project` gives them.
      state: the convolution's past, its parts side by side, or None.
      parts: widths and units.
      **positions: mask and segment_ids.

    Returns:
      the parts of the output, and the state, side by side.
    """
    if len(inputs) == 1:
        y, after = conv(inputs[0], state, **positions)
        return _split(y, parts, -1), after
    kernels = _split(_together(conv.kernel[...], 0), parts, 0)
    biases = [None] * len(parts) if conv.bias is None else _split(_together(conv.bias[...], 0), parts, 0)
    states = [None] * len(parts) if state is None else _split(state, parts, -1)
    ys, afters = [], []
    for x, before, kernel, bias, (_, units) in zip(inputs, states, kernels, biases, parts, strict=True):
        weights = cut(kernel, 0, units), None if bias is None else cut(bias, 0, units)
        y, after = conv(x, before, weights=weights, **positions)
        ys.append(cut(y, -1, units))
        afters.append(after)
    return ys, jnp.concatenate(afters, axis=-1)


def _scaled(x, scale):
    return x if scale is None else x * scale.astype(x.dtype)


def _each(entry):
    return entry if isinstance(entry[0], tuple) else (entry,)


def _split(x, parts, axis):
    return jnp.split(x, list(itertools.accumulate(width for width, _ in parts))[:-1], axis=axis)


def _together(x, axis):
    """Weights whole along an axis that they lie cut along; their gradient is cut again."""
    n = pieces()
    lies, used = ([PartitionSpec.UNCONSTRAINED] * x.ndim for _ in range(2))
    lies[axis], used[axis] = AXIS if x.shape[axis] % n == 0 else None, None
    return _moved(x, PartitionSpec(*lies), PartitionSpec(*used))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x, lies, used):
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, lies), used)


def _moved_backward(lies, used, _, dx):
    return (jax.lax.with_sharding_constraint(dx, lies),)


_moved.defvjp(lambda x, lies, used: (_moved(x, lies, used), None), _moved_backward)
