"""Weights as codes of a few bits: groups of inputs of an output, a scale for each, and how codes lie in bytes.

    w = scale * code        a code is a whole number, at most 2^(bits - 1) - 1 from 0; of 1 bit it is the sign

Source: Shen et al. 2019, arXiv:1909.05840, section 3 (groups, symmetric scales); Frantar et al. 2022, arXiv:2210.17323,
section 4 (groups of inputs); Qin et al. 2022, arXiv:2203.06390, section 3 (1 bit: signs and mean sizes).

Axes: i inputs, o outputs, k groups, q inputs of a group, s bytes of a group.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from zoo.reuse.compensation import round_in_order
from zoo.reuse.linear_maps import Axes, ComputedWeight

Bits = Literal[1, 2, 3, 4, 8]


class Quantized(nnx.Variable):
    """Codes or scales: what is not trained."""


class QuantizedWeight(ComputedWeight):
    """A weight as codes of a few bits, and a scale for each group of inputs of each output.

    Codes of 1 bit lie eight in a byte, those of 2 bits four, of 3 and 4 bits two.
    """

    undone_by = "zoo.dequantize"

    def __init__(
        self,
        weight: Float[Array, "..."],
        axes: Axes,
        *,
        bits: Bits,
        group_size: int | None,
        moment: Float[Array, "..."] | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """
        Args:
          weight: what is quantised.
          axes: where its inputs and outputs lie.
          bits: of a code.
          group_size: q; the last group may be shorter. None: all inputs.
          moment: (..., i, i), of its inputs: what rounding loses is made up for. None: each weight is rounded alone.
          metadata: what the parameter says of itself, for the one that `dequantize` makes.
        """
        self.metadata = tuple(sorted(metadata.items()))
        self.axes, self.bits, self.float_dtype = tuple(axes), bits, jnp.dtype(weight.dtype)
        self.d_in = weight.shape[axes.d_in]
        laid, group_size = inputs_first(weight, self.axes), min(group_size or self.d_in, self.d_in)
        if moment is None:
            codes, scales = quantize_groups(laid, bits, group_size)
        else:
            codes, scales = _in_order(laid, moment, 2 ** (bits - 1) - 1, group_size)
        self.group_size = codes.shape[-2]
        self.codes, self.scales = Quantized(pack(codes, bits)), Quantized(scales)

    def whole(self) -> Array:
        codes = unpack(self.codes[...], self.bits, self.group_size)
        return _multiplied(codes, self.scales[...], self.d_in, self.float_dtype, self.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.codes[...].nbytes + self.scales[...].nbytes


def rounded(weight: Float[Array, "..."], axes: Axes, *, bits: Bits, group_size: int | None) -> Float[Array, "..."]:
    """What a `QuantizedWeight` of a weight is when it is read, each number rounded alone, without bytes between."""
    laid = inputs_first(weight, axes)
    codes, scales = quantize_groups(laid, bits, group_size or laid.shape[-2])
    return _multiplied(codes, scales, laid.shape[-2], weight.dtype, axes)


def _multiplied(codes, scales, d_in, dtype, axes):
    """The weight of some codes and scales, as it lay."""
    weight = (codes * scales).astype(dtype)  # k q o
    weight = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])[..., :d_in, :]
    return inputs_first(weight, axes)


def quantize_groups(
    weight: Float[Array, "*b i o"], bits: Bits, group_size: int
) -> tuple[Int[Array, "*b k q o"], Float[Array, "*b k 1 o"]]:
    """(codes, scales): each weight is the code that is nearest, and the largest of a group is 2^(bits - 1) - 1 scales.

    Of 1 bit: the sign, and the mean size of a group, which is the scale that is off least.

    Groups are of `group_size` inputs, or of all where there are fewer; the last one is filled up with zeros.
    """
    group_size = min(group_size, weight.shape[-2])
    missing = -weight.shape[-2] % group_size
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    wide = jnp.pad(wide, [(0, 0)] * (weight.ndim - 2) + [(0, missing), (0, 0)])
    groups = wide.reshape(*weight.shape[:-2], -1, group_size, weight.shape[-1])
    if bits == 1:
        counts = np.minimum(group_size, weight.shape[-2] - group_size * np.arange(groups.shape[-3]))
        scales = jnp.sum(jnp.abs(groups), axis=-2, keepdims=True) / counts[:, None, None]
        return jnp.where(groups < 0, -1, 1).astype(jnp.int8), scales
    largest = jnp.max(jnp.abs(groups), axis=-2, keepdims=True)
    scales = jnp.where(largest == 0, 1, largest / (2 ** (bits - 1) - 1))
    return jnp.round(groups / scales).astype(jnp.int8), scales


def _in_order(weight, moment, levels, group_size):
    """`round_in_order` of each block."""
    blocks = weight.shape[:-2]
    run = functools.partial(round_in_order, levels=levels, group_size=group_size)
    pairs = zip(weight.reshape(-1, *weight.shape[-2:]), moment.reshape(-1, *moment.shape[-2:]), strict=True)
    codes, scales = zip(*(run(*pair) for pair in pairs), strict=True)
    return tuple(jnp.stack(x).reshape(*blocks, *x[0].shape) for x in (codes, scales))


def pack(codes: Int[Array, "*b k q o"], bits: Bits) -> Int[Array, "*b k q o"] | UInt8[Array, "*b k s o"]:
    """Codes without bits between them: byte j of a group holds codes j, j + s, ...; of 8 bits they stay as they are."""
    if bits == 8:
        return codes
    width, each = _width(bits)
    missing = -codes.shape[-2] % each
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, missing), (0, 0)])
    fields = ((codes + 1) // 2 if bits == 1 else codes + 2 ** (width - 1)).astype(jnp.uint8)
    fields = jnp.split(fields, each, axis=-2)
    return sum((field << (width * j) for j, field in enumerate(fields)), jnp.uint8(0)).astype(jnp.uint8)


def unpack(packed: Array, bits: Bits, group_size: int) -> Int[Array, "*b k q o"]:
    """The codes that `pack` was given, in groups of so many inputs."""
    if bits == 8:
        return packed
    width, each = _width(bits)
    fields = [(packed >> (width * j)) & (2**width - 1) for j in range(each)]
    codes = jnp.concatenate(fields, axis=-2)[..., :group_size, :].astype(jnp.int8)
    return 2 * codes - 1 if bits == 1 else codes - 2 ** (width - 1)


def _width(bits):
    """(bits that a code takes in a byte, codes in a byte)"""
    width = bits if bits <= 2 else 4
    return width, 8 // width


def inputs_first(weight, axes):
    """... i o -> as `axes` say, and the other way round."""
    return weight if Axes(*axes) == Axes(-2, -1) else jnp.swapaxes(weight, -1, -2)
