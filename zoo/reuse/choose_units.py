"""Which units stay of each width that shrinks: those without which the maps that read them lose least.

Hidden channels and heads go one by one, by what is lost when all others make up for them; channels between the blocks
by how much they bring in by themselves. In blocks and groups as many stay of each; see the table in `zoo.reuse.prune`.

Source: Muralidharan et al. 2024, arXiv:2407.14679, and Taghibakhshi et al. 2025, arXiv:2504.11409 (Minitron, and heads
of state spaces in groups); Kurtic et al. 2023, arXiv:2302.04089 (ZipLM).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from m2 import M2Mixer, MonarchMLP
from ssm import LinearAttention, Mamba, Mamba2, Mamba3
from zoo.layers.attention import Attention
from zoo.layers.mlp import MLP
from zoo.layers.moe import MoE
from zoo.models.build import Model
from zoo.reuse.calibration import Moments
from zoo.reuse.importance import Reader, largest, least_costly
from zoo.reuse.widths import RESIDUAL, Axes, Axis, Kept, Path, Span, sizes, widths

_HEADS = {Attention: "attn", LinearAttention: "linear_attn", Mamba: "mamba", Mamba2: "mamba2", Mamba3: "mamba3"}


class Wanted(NamedTuple):
    """The widths that are asked for, see `prune`."""

    d_model: int | None = None
    d_ff: int | None = None
    n_heads: int | Mapping[str, int] | None = None


def choose(
    model: Model, moments: Moments, wanted: Wanted, importance: Mapping[str, Float[np.ndarray, "n"]] | None = None
) -> Kept:
    """The units that stay.

    Args:
      model: as for `prune`.
      moments: of what its maps read.
      wanted: how many shall be left.
      importance: of each unit of some widths, by the width's name: the largest stay.

    Raises:
      ValueError: numbers that do not fit; an importance of no width that shrinks, or of other units.
    """
    given = dict(importance or {})
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    axes, kept = prunable_widths(model), {}
    there = sizes(axes)
    for width, (n, parts) in targets(model, wanted).items():
        if not 0 < n <= there[width]:
            raise ValueError(f"{width}: {n} of {there[width]} units, expected at least 1 and no more than there are")
        if n == there[width]:
            given.pop(width, None)
            continue
        if n % parts:
            raise ValueError(f"{width}: {n} units, expected a multiple of {parts}, as many in each group or block")
        if (scores := given.pop(width, None)) is not None:
            if scores.shape != (there[width],):
                raise ValueError(f"importance of {width} is of {scores.shape}, expected one for each of {there[width]}")
            kept[width] = largest(scores, n, parts)
            continue
        readers = [reader for path in params for reader in _readers(path, params[path], axes[path], moments, width)]
        if not readers:
            raise ValueError(f"{width} is read by no map that was seen, so that no unit is known to be needed least")
        if width == RESIDUAL:
            kept[width] = largest(_read(readers, there[width]), n, parts)
        else:
            kept[width] = least_costly(readers, there[width], n, parts)
    if given:
        raise ValueError(f"importance of {', '.join(sorted(given))}, which shall not shrink")
    for width, like in _bound(model).items():
        if like in kept:
            kept[width] = kept[like]
    return kept


def prunable_widths(model: Model) -> dict[Path, Axes]:
    """`widths`, and M2's filters, where each channel has its own: then they go with it."""
    axes = widths(model)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, M2Mixer) and module.sharing == 1:
            inner = Axis((Span(f"{'.'.join(map(str, path))}.d_inner", module.filter_fn.channels),))
            for name in ("filter_fn", "filter_fn2"):
                last = max(
                    (p[-2] for p in axes if p[: len(path) + 2] == (*path, name, "implicit_filter")), default=None
                )
                for network in ("implicit_filter", "implicit_filter_rev"):
                    if (kernel := (*path, name, network, last, "kernel")) in axes:
                        axes[kernel] = (axes[kernel][0], inner)
                if (bias := (*path, name, "bias")) in axes:
                    axes[bias] = (inner,)
    return axes


def targets(model: Any, wanted: Wanted) -> dict[str, tuple[int, int]]:
    """For each width that shall shrink, how many units stay, and of how many runs of neighbours equally many."""
    found: dict[str, tuple[int, int]] = {}
    blocks, config = [1], model.config
    kinds = {name for _, m in nnx.iter_modules(model) for kind, name in _HEADS.items() if type(m) is kind}
    heads = wanted.n_heads
    if isinstance(heads, int):
        if len(kinds) != 1:
            raise ValueError(f"n_heads={heads}, expected one for each kind of mixer: {', '.join(sorted(kinds))}")
        heads = dict.fromkeys(kinds, heads)
    if unknown := sorted((heads or {}).keys() - kinds):
        raise ValueError(f"n_heads={heads!r}: {unknown[0]} is no mixer of the model, expected {', '.join(kinds)}")
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        n = None if heads is None else heads.get(_HEADS.get(type(module), ""))
        match module:
            case Attention() | LinearAttention() if n is not None:
                if getattr(module.config, "position", None) == "alibi":
                    raise ValueError("n_heads with position='alibi': a head's slope follows from how many there are")
                parts = module.n_kv_heads if module.n_kv_heads != module.n_heads else 1
                found[f"{name}.n_heads"] = n, parts
            case Mamba() if n is not None:
                found[f"{name}.d_inner"] = n, 1
            case Mamba2() | Mamba3() if n is not None:
                found[f"{name}.n_heads"] = n, module.config.n_groups
            case MLP() | MoE() if wanted.d_ff is not None and path[-1:] != ("shared",):
                found[f"{name}.d_ff"] = wanted.d_ff, 1
            case MonarchMLP():
                blocks.append(module.config.n_blocks or 1)
                if wanted.d_ff is not None:
                    found[f"{name}.d_ff"] = wanted.d_ff, blocks[-1]
            case M2Mixer() if wanted.d_model is not None:
                found[f"{name}.d_inner"] = wanted.d_model, module.filter_fn.channels if module.sharing > 1 else 1
    if wanted.d_model is not None:
        found[RESIDUAL] = wanted.d_model, math.lcm(*blocks)
    if wanted.d_ff is not None and not any(width.endswith(".d_ff") for width in found):
        raise ValueError(f"d_ff={wanted.d_ff}, but pattern={config.pattern!r} has no channel mixers")
    return found


def _bound(model: Model) -> dict[str, str]:
    """Widths whose units go with those of others: keys and values with their queries."""
    return {
        f"{'.'.join(map(str, path))}.n_kv_heads": f"{'.'.join(map(str, path))}.n_heads"
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Attention | LinearAttention) and module.n_kv_heads == module.n_heads
    }


def _readers(path: Path, value: Array, axes: Axes, moments: Moments, width: str) -> list[Reader]:
    """The maps of a parameter that read a width: none, one, or that of each block or expert."""
    name = ".".join(map(str, path))
    number = next((i for i, axis in enumerate(axes) if axis.read and width in [s.width for s in axis.spans]), None)
    if number is None or name not in moments:
        return []
    weight, moment = np.asarray(value, np.float64), np.asarray(moments[name], np.float64)
    start = 0
    for span in axes[number].spans:
        if span.width == width:
            break
        start += span.units * span.each
    if value.ndim == 2:
        return [Reader(weight, moment, np.arange(span.units), start + _rows(span.units, span.each))]
    readers = []
    for b, one in enumerate(weight):
        one = one.T if number == value.ndim - 1 else one
        n = span.units if span.rows is None else span.rows
        units = np.arange(n) if span.rows is None else b * n + np.arange(n)
        readers.append(Reader(one, moment[b], units, start + _rows(n, 1 if span.rows else span.each)))
    return readers


def _rows(units: int, each: int) -> np.ndarray:
    return np.arange(units)[:, None] * each + np.arange(each)


def _read(readers: Sequence[Reader], n_units: int) -> np.ndarray:
    """How much of what maps give each unit brings in by itself, as a share, over all maps."""
    importance = np.zeros(n_units)
    for reader in readers:
        each = np.diagonal(reader.moment) * np.sum(np.square(reader.weight), axis=1)
        np.add.at(importance, reader.units, each[reader.rows].sum(axis=1) / max(float(each.sum()), 1e-30))
    return importance
