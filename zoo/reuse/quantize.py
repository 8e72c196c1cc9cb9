"""Weights in 1 to 8 bits: kept as whole numbers and scales, in memory and in files, and multiplied when they are read.

    model = zoo.quantize(model, bits=4, group_size=64)        generates, and can be adapted: zoo.add_lora(model, ...)
    model = zoo.quantize(model, bits=4, method="hessian", moments=zoo.calibrate(model, batches))
    model = zoo.quantize(model, mixed=2_000_000, moments=zoo.calibrate(model, batches))

The last gives 2, 4 or 8 bits to each map, and to each expert of a mixture.

Some inputs of one output make a group and share a scale: w = scale * code, where code is a whole number, at most
2^(bits - 1) - 1 from 0; of 1 bit it is the sign, and the scale the mean size. Decays, steps, convolutions, norms and
biases of state spaces stay as they are: a recurrence multiplies their errors.

Source: Shen et al. 2019, arXiv:1909.05840, section 3 (groups, symmetric scales); Frantar et al. 2022, arXiv:2210.17323,
section 4 and Algorithm 1 (groups of inputs; rounding in order, by the inputs' second moments); Qin et al. 2022,
arXiv:2203.06390, section 3 (1 bit: signs and mean sizes).
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.layers.moe import ExpertLinear
from zoo.models.frozen import Frozen, copied
from zoo.reuse.calibration import Moments
from zoo.reuse.codes import Bits, QuantizedWeight, inputs_first
from zoo.reuse.compensation import cost
from zoo.reuse.expert_bits import QuantizedExperts
from zoo.reuse.linear_maps import Axes, LinearMap, Model, linear_maps
from zoo.reuse.mixed_bits import Choice, allocate

KINDS = QuantizedWeight, QuantizedExperts
Method = Literal["round", "hessian"]
_MIXED: tuple[Bits, ...] = (2, 4, 8)


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
    by_expert: bool = True,
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
      by_expert: with mixed, whether each expert of a mixture has bits of its own, see `expert_bits`.

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
    model = copied(model)
    maps = maps_to_round(model, bits=bits, group_size=group_size, targets=targets, embeddings=embeddings)
    known = (moments or {}) if method == "hessian" else {}
    for what, asked in (("method='hessian'", method == "hessian"), (f"mixed={mixed}", mixed is not None)):
        if asked and not (moments or {}).keys() & maps.keys():
            raise ValueError(f"{what}, expected moments of these maps: zoo.calibrate(model, batches)")
    for name, linear in maps.items():
        n = linear.weight.shape[linear.axes.d_in]
        if moments is not None and name in moments and moments[name].shape[-1] != n:
            raise ValueError(f"moments of {name} are of {moments[name].shape[-1]} inputs, expected its {n}")
    of_each = {} if mixed is None else _allocated(maps, moments or {}, group_size, mixed, by_expert)
    for name, linear in maps.items():
        of_this = of_each.get(name, bits_of(linear, bits))
        options = {"bits": of_this, "group_size": group_size, "moment": known.get(name)}
        make = functools.partial(_kind_of(of_this), axes=linear.axes, metadata=linear.weight.get_metadata())
        linear.replace(make(linear.weight[...], **options))
    return model


def maps_to_round(
    model: nnx.Module, *, bits: Bits, group_size: int | None, targets: str | None, embeddings: bool
) -> dict[str, LinearMap]:
    """The maps of a model that `quantize` takes, by name; arguments and errors as there."""
    if bits not in get_args(Bits):
        raise ValueError(f"bits={bits}, expected one of {', '.join(map(str, get_args(Bits)))}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}, expected at least 1")
    maps = linear_maps(model, targets) | (_embeddings(model) if embeddings else {})
    for name, linear in maps.items():
        if not isinstance(linear.weight, nnx.Variable):
            raise ValueError(f"{name} is a {type(linear.weight).__name__}, expected a parameter: merge or add it after")
    return maps


def bits_of(linear: LinearMap, bits: Bits) -> Bits:
    """Bits of one map, where the others have so many: tables of embeddings have 8."""
    return 8 if linear.attribute == "embedding" else bits


def _kind_of(bits: Any) -> Any:
    return QuantizedWeight if isinstance(bits, int) else QuantizedExperts


def _allocated(
    maps: Mapping[str, LinearMap], moments: Moments, group_size: int | None, budget: int, by_expert: bool
) -> dict[str, Any]:
    """Bits of each map; of a mixture's maps those of each expert, where they differ."""
    choices: dict[tuple[str, int | None], list[Choice]] = {}
    for name, steps in _choices(maps, moments, group_size).items():
        apart = by_expert and isinstance(maps[name].owner, ExpertLinear)
        n = len(steps[0].of_blocks) if apart else 1
        for e in range(n):
            choices[name, e if apart else None] = [
                Choice(step.bits, step.nbytes // n, step.of_blocks[e] if apart else sum(step.of_blocks))
                for step in steps
            ]
    found: dict[str, Any] = {}
    for (name, expert), bits in allocate(choices, budget).items():
        found[name] = bits if expert is None else (*found.get(name, ()), bits)
    return {name: bits[0] if isinstance(bits, tuple) and len({*bits}) == 1 else bits for name, bits in found.items()}


class _Rounded(NamedTuple):
    """A map in so many bits."""

    bits: int
    nbytes: int
    of_blocks: list[float]
    """What rounding each of its blocks or experts costs."""


def _choices(maps: Mapping[str, LinearMap], moments: Moments, group_size: int | None) -> dict[str, list[_Rounded]]:
    """What each map costs in 2, 4 and 8 bits; where nothing is known of what it reads, as if all inputs were alike."""
    found: dict[str, list[_Rounded]] = {}
    for name, linear in maps.items():
        weight = inputs_first(linear.weight[...].astype(jnp.float32), linear.axes)
        moment = moments.get(
            name, jnp.broadcast_to(jnp.eye(weight.shape[-2]), (*weight.shape[:-2], *[weight.shape[-2]] * 2))
        )
        whole = float(jnp.sum(cost(weight, moment)))
        for bits in _MIXED:
            small = QuantizedWeight(linear.weight[...], linear.axes, bits=bits, group_size=group_size)
            lost = weight - inputs_first(small.whole().astype(jnp.float32), linear.axes)
            shares = np.ravel(cost(lost, moment)) / max(whole, 1e-30)
            found.setdefault(name, []).append(_Rounded(bits, small.nbytes, (weight.size * shares).tolist()))
    return found


def options_of(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """How each map of a model that is quantised is so, by name: what `with_options` makes such a model of."""
    weights = {name: linear.weight for name, linear in quantized_weights(model).items()}
    return {name: {"bits": weight.bits, "group_size": weight.group_size} for name, weight in weights.items()}


def with_options(model: Model, options: Mapping[str, Mapping[str, Any]]) -> Model:
    """A model of shapes in place of arrays that is quantised as another one is.

    Args:
      model: from `abstract`.
      options: from `options_of`.

    Raises:
      ValueError: a map that the model does not have, or bits of another number of experts.
    """
    model = copied(model)
    maps = quantizable(model)
    if unknown := sorted(options.keys() - maps.keys()):
        raise ValueError(f"{unknown[0]} is quantised, and the model has no such map")
    for name, how in options.items():
        weight = maps[name].weight
        if not isinstance(how["bits"], int) and not isinstance(maps[name].owner, ExpertLinear):
            raise ValueError(f"{name} is quantised in bits={how['bits']}, expected one number: it has no experts")
        options_here: Any = {**how, "axes": maps[name].axes, "metadata": weight.get_metadata()}
        make = functools.partial(_kind_of(how["bits"]), **options_here)
        maps[name].replace(nnx.eval_shape(make, weight.get_value()))
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
    for _, weight in nnx.iter_modules(model):
        if isinstance(base := getattr(weight, "base", None), KINDS):  # below an adapter, where it stays frozen
            weight.base = Frozen(base[...], **dict(base.metadata))  # type: ignore[attr-defined]
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
    return {name: linear for name, linear in quantizable(model).items() if isinstance(linear.weight, KINDS)}
