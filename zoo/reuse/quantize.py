"""Weights in 1 to 8 bits: kept as whole numbers and scales, in memory and in files, and multiplied when they are read.

    model = zoo.quantize(model, bits=4, group_size=64)        generates, and can be adapted: zoo.add_lora(model, ...)
    model = zoo.quantize(model, bits=4, method="hessian", moments=zoo.calibrate(model, batches))
    model = zoo.quantize(model, mixed=2_000_000, moments=zoo.calibrate(model, batches))        2, 4 or 8 bits, by map

Some inputs of one output make a group and share a scale: w = scale * code, where code is a whole number, at most
2^(bits - 1) - 1 from 0; of 1 bit it is the sign, and the scale the mean size. Decays, steps, convolutions, norms and
biases of state spaces stay as they are: a recurrence multiplies their errors.

Source: Shen et al. 2019, arXiv:1909.05840, section 3 (groups, symmetric scales); Frantar et al. 2022, arXiv:2210.17323,
section 4 and Algorithm 1 (groups of inputs; rounding in order, by the inputs' second moments); Qin et al. 2022,
arXiv:2203.06390, section 3 (1 bit: signs and mean sizes).

Axes: i inputs, o outputs, k groups, q inputs of a group, s bytes of a group.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from zoo.reuse.calibration import Moments
from zoo.reuse.compensation import cost, round_in_order
from zoo.reuse.linear_maps import Axes, ComputedWeight, LinearMap, Model, copied, linear_maps
from zoo.reuse.mixed_bits import Choice, allocate

Bits = Literal[1, 2, 3, 4, 8]
Method = Literal["round", "hessian"]
_MIXED: tuple[Bits, ...] = (2, 4, 8)


class Quantized(nnx.Variable):
    """Codes or scales: what is not trained."""


class QuantizedWeight(ComputedWeight):
    """A weight as codes of a few bits, and a scale for each group of inputs of each output.

    Codes of 1 bit lie eight in a byte, those of 2 bits four, of 3 and 4 bits two.
    """

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
        laid, group_size = _inputs_first(weight, self.axes), min(group_size or self.d_in, self.d_in)
        if moment is None:
            codes, scales = quantize_groups(laid, bits, group_size)
        else:
            codes, scales = _in_order(laid, moment, 2 ** (bits - 1) - 1, group_size)
        self.group_size = codes.shape[-2]
        self.codes, self.scales = Quantized(pack(codes, bits)), Quantized(scales)

    def whole(self) -> Array:
        codes = unpack(self.codes[...], self.bits, self.group_size)
        weight = (codes * self.scales[...]).astype(self.float_dtype)  # k q o
        weight = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])[..., : self.d_in, :]
        return _inputs_first(weight, self.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.codes[...].nbytes + self.scales[...].nbytes


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


def _inputs_first(weight, axes):
    """... i o -> as `axes` say, and the other way round."""
    return weight if Axes(*axes) == Axes(-2, -1) else jnp.swapaxes(weight, -1, -2)


def quantize(
    model: Model,
    *,
    bits: Bits = 8,
    group_size: int | None = 64,
    targets: str | None = None,
    embeddings: bool = False,
    method: Method = "round",
    moments: Moments | None = None,
    mixed: int | None = None,
) -> Model:
    """A model whose linear maps are kept in a few bits; all else is the given model's, which stays as it is.

    Args:
      model: any module with linear maps.
      bits: of a weight. 3 take the room of 4.
      group_size: inputs that share a scale; a scale has the size of one weight. None: all inputs of an output.
      targets: which maps, a regular expression, see `linear_maps`. None: all of the blocks.
      embeddings: whether tables of embeddings are quantised too, in 8 bits: a scale for `group_size` channels of a row.
        One that is the head of a language model as well is read whole at each step.
      method: round: each weight to the nearest code. hessian: one input after the other, and the later ones make up for
        what the earlier lost, as what the maps read has it; maps without moments are rounded.
      moments: what the maps read, from `calibrate`; "hessian" and mixed need it.
      mixed: bytes of all these maps, codes and scales: each has 2, 4 or 8 bits, more where rounding costs more, see
        `mixed_bits`. None: all have `bits`.

    Raises:
      ValueError: other bits or another method; group_size below 1; nothing that `targets` names; a map that is
        quantised already; "hessian" or mixed without moments of any of the maps; fewer bytes than 2 bits take.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> small = zoo.quantize(model, bits=4, group_size=16)
      >>> small(jnp.ones((1, 3), jnp.int32)).shape
      (1, 3, 32)
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}, expected one of {', '.join(get_args(Method))}")
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits}, expected one of {', '.join(map(str, get_args(Bits)))}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}, expected at least 1")
    model = copied(model)
    maps = linear_maps(model, targets) | (_embeddings(model) if embeddings else {})
    known = (moments or {}) if method == "hessian" else {}
    for what, asked in (("method='hessian'", method == "hessian"), (f"mixed={mixed}", mixed is not None)):
        if asked and not (moments or {}).keys() & maps.keys():
            raise ValueError(f"{what}, expected moments of these maps: zoo.calibrate(model, batches)")
    for name, linear in maps.items():
        if not isinstance(linear.weight, nnx.Variable):
            raise ValueError(f"{name} is a {type(linear.weight).__name__}, expected a parameter: merge or add it after")
    of_each = {} if mixed is None else allocate(_choices(maps, moments or {}, group_size), mixed)
    for name, linear in maps.items():
        of_this: Any = of_each.get(name, 8 if linear.attribute == "embedding" else bits)
        made = QuantizedWeight(
            linear.weight[...],
            linear.axes,
            bits=of_this,
            group_size=group_size,
            moment=known.get(name),
            metadata=linear.weight.get_metadata(),
        )
        linear.replace(made)
    return model


def _choices(maps: Mapping[str, LinearMap], moments: Moments, group_size: int | None) -> dict[str, list[Choice]]:
    """What each map costs in 2, 4 and 8 bits; where nothing is known of what it reads, as if all inputs were alike."""
    found: dict[str, list[Choice]] = {}
    for name, linear in maps.items():
        weight = _inputs_first(linear.weight[...].astype(jnp.float32), linear.axes)
        moment = moments.get(
            name, jnp.broadcast_to(jnp.eye(weight.shape[-2]), (*weight.shape[:-2], *[weight.shape[-2]] * 2))
        )
        whole = float(jnp.sum(cost(weight, moment)))
        for bits in _MIXED:
            small = QuantizedWeight(linear.weight[...], linear.axes, bits=bits, group_size=group_size)
            lost = weight - _inputs_first(small.whole().astype(jnp.float32), linear.axes)
            share = float(jnp.sum(cost(lost, moment))) / max(whole, 1e-30)
            found.setdefault(name, []).append(Choice(bits, small.nbytes, weight.size * share))
    return found


def options_of(model: nnx.Module) -> dict[str, dict[str, int]]:
    """How each map of a model that is quantised is so, by name: what `with_options` makes such a model of."""
    weights = {name: linear.weight for name, linear in quantized_weights(model).items()}
    return {name: {"bits": weight.bits, "group_size": weight.group_size} for name, weight in weights.items()}


def with_options(model: Model, options: Mapping[str, Mapping[str, int]]) -> Model:
    """A model of shapes in place of arrays that is quantised as another one is.

    Args:
      model: from `abstract`.
      options: from `options_of`.

    Raises:
      ValueError: a map that the model does not have.
    """
    model = copied(model)
    maps = quantizable(model)
    if unknown := sorted(options.keys() - maps.keys()):
        raise ValueError(f"{unknown[0]} is quantised, and the model has no such map")
    for name, how in options.items():
        weight = maps[name].weight
        options_here: Any = {**how, "axes": maps[name].axes, "metadata": weight.get_metadata()}
        maps[name].replace(nnx.eval_shape(functools.partial(QuantizedWeight, **options_here), weight.get_value()))
    return model


def dequantize(model: Model) -> Model:
    """A model that computes what a quantised one does, with arrays for weights, which can be trained and written.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> again = zoo.dequantize(zoo.quantize(model, bits=8, group_size=None))
      >>> jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
      True
    """
    model = copied(model)
    for linear in quantized_weights(model).values():
        linear.replace(nnx.Param(linear.weight[...], **dict(linear.weight.metadata)))
    return model


def quantizable(model: nnx.Module) -> dict[str, LinearMap]:
    """All that can be quantised of a model, by name: its linear maps and its tables of embeddings."""
    return linear_maps(model, ".*") | _embeddings(model)


def _embeddings(model: nnx.Module) -> dict[str, LinearMap]:
    """The tables of embeddings. As a map each is a head: its outputs are the rows."""
    return {
        ".".join(map(str, (*path, "embedding"))): LinearMap(module, "embedding", Axes(-1, -2))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Embed)
    }


def quantized_weights(model: nnx.Module) -> dict[str, LinearMap]:
    """The maps of a model that are quantised, by name."""
    return {name: linear for name, linear in quantizable(model).items() if isinstance(linear.weight, QuantizedWeight)}
