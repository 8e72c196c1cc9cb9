"""A smaller model out of a trained one: units, layers and tokens go that are needed least, the others make up for it.

    small = zoo.prune(model, batches, d_ff=1024, n_heads=6, n_layers=20)

What is needed is read off a few batches of text or images (`calibration`, `importance`). Where channels or heads go,
every map that reads them is refitted to those that stay (`compensation.refit`), so that in each map less is lost than
by cutting alone; a unit that says nothing, or what another says, goes at no cost. Then the model is trained on, best
with the large one as its teacher.

    width      units                                     what stays together
    d_ff       hidden channels                           as many in each block of a Monarch MLP
    n_heads    attention's heads, with their keys        as many query heads for each head of keys
               Mamba-2's and -3's heads                  as many in each group that shares B and C
               Mamba-1's inner channels                  -
    d_model    channels between the blocks               M2's inner channels too; as many of each shared filter

Source: Muralidharan et al. 2024, arXiv:2407.14679, and Taghibakhshi et al. 2025, arXiv:2504.11409 (Minitron, and heads
of state spaces in groups); Kurtic et al. 2023, arXiv:2302.04089 (which units, and what makes up for them).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from m2 import M2Mixer, MonarchMLP
from ssm import LinearAttention, Mamba, Mamba2, Mamba3
from zoo.layers.attention import Attention
from zoo.layers.mlp import MLP
from zoo.layers.moe import MoE
from zoo.models.build import Model, ModelConfig, abstract
from zoo.reuse.calibration import Moments, calibrate
from zoo.reuse.compensation import refit
from zoo.reuse.grow import SAID_IN_WORDS, filled, of_layers, pattern_of, require_own_blocks
from zoo.reuse.importance import Reader, block_influence, largest, least_costly
from zoo.reuse.widths import RESIDUAL, Axes, Axis, Path, Span, sizes, widths
from zoo.stack.pattern import parse_pattern

Kept = dict[str, np.ndarray]
"""The units that stay of each width that shrinks."""
_NOTHING = Axis(())
_HEADS = {Attention: "attn", LinearAttention: "linear_attn", Mamba: "mamba", Mamba2: "mamba2", Mamba3: "mamba3"}


def prune(
    model: Model,
    calibration: Iterable[Mapping[str, Array]],
    *,
    d_model: int | None = None,
    d_ff: int | None = None,
    n_heads: int | Mapping[str, int] | None = None,
    n_layers: int | Sequence[int] | None = None,
    vocabulary: Sequence[int] | None = None,
    compensate: bool = True,
) -> Model:
    """A smaller model of a trained one.

    Layers go first, then widths, by what is read after that. Inner widths do not follow d_model.

    Args:
      model: a causal or masked language model of attention, linear attention, Mamba-1, -2 or -3, M2, with dense or
        block-diagonal channel mixers or experts.
      calibration: batches as `calibrate` takes them; a few thousand positions of what the model is for.
      d_model: channels between the blocks.
      d_ff: hidden channels of channel mixers, of each expert the same.
      n_heads: heads of mixers, of Mamba-1 inner channels; or of each kind, {"attn": 6, "mamba2": 16}.
      n_layers: how many blocks, those that turn the residual stream most; or their numbers.
      vocabulary: ids of the tokens that stay, in the order of their new ids.
      compensate: whether what is left makes up for what goes. False: for comparison.

    Returns:
      A model of the same kind, with arrays of its own.

    Raises:
      ValueError: more than there is, or a number that groups or blocks do not allow; parts whose widths cannot be
        changed, options in the pattern that say a width; no batches.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> smaller = zoo.prune(model, [{"ids": jnp.arange(24).reshape(2, 12)}], d_model=8, n_layers=1)
      >>> smaller.config.d_model, smaller.config.n_layers
      (8, 1)
    """
    batches = [dict(batch) for batch in calibration]
    if not batches:
        raise ValueError("calibration=(), expected one batch at least")
    if n_layers is not None:
        model = _with_layers(model, batches, n_layers)
    wanted = Wanted(d_model, d_ff, n_heads)
    if wanted != Wanted():
        moments = calibrate(model, batches)
        model = without(model, moments, choose(model, moments, wanted), compensate=compensate)
    return model if vocabulary is None else _with_vocabulary(model, vocabulary)


class Wanted(NamedTuple):
    """The widths that are asked for, see `prune`."""

    d_model: int | None = None
    d_ff: int | None = None
    n_heads: int | Mapping[str, int] | None = None


def choose(model: Model, moments: Moments, wanted: Wanted) -> Kept:
    """The units that stay.

    Args:
      model: as for `prune`.
      moments: of what its maps read.
      wanted: how many shall be left.
    """
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    axes, targets = _widths(model), _targets(model, wanted)
    there, kept = sizes(axes), {}
    for width, (n, parts) in targets.items():
        if not 0 < n <= there[width]:
            raise ValueError(f"{width}: {n} of {there[width]} units, expected at least 1 and no more than there are")
        if n == there[width]:
            continue
        if n % parts:
            raise ValueError(f"{width}: {n} units, expected a multiple of {parts}, as many in each group or block")
        readers = [reader for path in params for reader in _readers(path, params[path], axes[path], moments, width)]
        if not readers:
            raise ValueError(f"{width} is read by no map that was seen, so that no unit is known to be needed least")
        if width == RESIDUAL:
            kept[width] = largest(_read(readers, there[width]), n, parts)
        else:
            kept[width] = least_costly(readers, there[width], n, parts)
    for width, like in _bound(model).items():
        if like in kept:
            kept[width] = kept[like]
    return kept


def without(model: Model, moments: Moments, kept: Kept, *, compensate: bool = True) -> Model:
    """A model of these units alone.

    Args:
      model, moments: as for `choose`.
      kept: from there.
      compensate: whether maps that read units are refitted to those that stay.
    """
    if not kept:
        return model
    axes = _widths(model)
    factors = _norm_factors(model, axes, moments, kept)
    target = abstract(_config(model, kept, sizes(axes), factors))
    values: dict[Path, Array] = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(param[...], np.float64) * factors.get(path, 1.0)
        moment = moments.get(".".join(map(str, path))) if compensate else None
        for number in sorted(range(value.ndim), key=lambda n: not axes[path][n].read):
            axis = axes[path][number]
            if any(span.width in kept for span in axis.spans):
                if moment is not None and axis.read and value.ndim > 1:
                    value = _refitted(value, number, axis, np.asarray(moment, np.float64), kept)
                else:
                    value = _taken(value, number, axis, kept)
        values[path] = jnp.asarray(value, param[...].dtype)
    return filled(target, values, model)


def _targets(model: Any, wanted: Wanted) -> dict[str, tuple[int, int]]:
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


def _widths(model: Model) -> dict[Path, Axes]:
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


def _config(model: Any, kept: Kept, there: Mapping[str, int], factors: Mapping[Path, np.ndarray]) -> ModelConfig:
    """The config of what is left: every width says how large it is."""
    config = model.config

    def squared(inside: bool) -> float:
        """By how much the mean squares in norms change, those of mixers or those between them."""
        found = [np.mean(np.square(f)) for path, f in factors.items() if ("mixer" in path) == inside]
        return float(np.mean(found)) if found else 1.0

    if said := SAID_IN_WORDS.search(config.pattern):
        raise ValueError(f"pattern={config.pattern!r} says {said[0]}, a width: it would stay while others change")
    left = {width: len(kept[width]) if width in kept else n for width, n in there.items()}
    d = left[RESIDUAL]
    # What is added to a mean square changes as the mean does.
    changes: dict[str, Any] = {"d_model": d, "norm_eps": config.norm_eps * squared(inside=False)}
    for path, module in nnx.iter_modules(model):
        of: Any = getattr(module, "config", None)
        n = lambda width, path=path: left[f"{'.'.join(map(str, path))}.{width}"]  # noqa: E731
        match module:
            case Attention() | LinearAttention():
                name = "attn" if isinstance(module, Attention) else "linear_attn"
                heads = {"n_heads": n("n_heads"), "n_kv_heads": n("n_kv_heads")}
                changes[name] = dataclasses.replace(of, head_dim=module.head_dim, **heads)
            case Mamba():
                changes["mamba"] = dataclasses.replace(of, dt_rank=module.dt_rank, expand=n("d_inner") / d)
            case Mamba2():
                inner = n("n_heads") * of.head_dim
                beside = module.d_inner - module.d_ssm
                eps = of.norm_eps * squared(inside=True)
                said_inner = inner if beside else None
                changes["mamba2"] = dataclasses.replace(of, expand=(beside + inner) / d, d_ssm=said_inner, norm_eps=eps)
            case Mamba3():
                changes["mamba3"] = dataclasses.replace(of, expand=n("n_heads") * of.head_dim / d)
            case M2Mixer():
                filters = module.filter_fn.channels if module.sharing > 1 else None
                changes["m2"] = dataclasses.replace(of, n_filters=filters)
            case MLP():
                changes.setdefault("mlp", dataclasses.replace(config.mlp, d_ff=n("d_ff")))
            case MonarchMLP():
                changes["monarch"] = dataclasses.replace(of, d_ff=n("d_ff"))
            case MoE():
                shared = of.d_ff_shared if module.shared is None else n("shared.d_ff") // of.n_shared
                changes["moe"] = dataclasses.replace(of, d_ff=n("d_ff"), d_ff_shared=shared)
    return dataclasses.replace(config, **changes)


def _places(axis: Axis, kept: Kept, n_blocks: int) -> np.ndarray:
    """Where on an axis what stays lies; of one that is cut into blocks a row for each: (blocks, places)."""
    (first, *_), found, start = axis.spans, [], 0
    if first.rows is not None:
        # The blocks together have a place for each unit, or two: a gate and what it opens.
        units = kept.get(first.width or "", np.arange(first.units))
        flat = np.concatenate([units + first.units * j for j in range(n_blocks * first.rows // first.units)])
        return np.reshape(flat % first.rows, (n_blocks, -1))
    for span in axis.spans:
        units = kept.get(span.width or "", np.arange(span.units))
        found.append(start + (units[:, None] * span.each + np.arange(span.each)).ravel())
        start += span.units * span.each
    return np.concatenate(found)


def _taken(value: np.ndarray, number: int, axis: Axis, kept: Kept) -> np.ndarray:
    places = _places(axis, kept, value.shape[0])
    if places.ndim == 1:
        return np.take(value, places, axis=number)
    shape = [1] * value.ndim
    shape[0], shape[number] = places.shape
    return np.take_along_axis(value, places.reshape(shape), axis=number)


def _refitted(value: np.ndarray, number: int, axis: Axis, moment: np.ndarray, kept: Kept) -> np.ndarray:
    """A map that reads a width, or the maps of blocks or experts, refitted to the units that stay."""
    places, read_last = _places(axis, kept, value.shape[0]), number == value.ndim - 1

    def one_map(weight: np.ndarray, moment: np.ndarray, places: np.ndarray) -> np.ndarray:
        return np.asarray(refit(jnp.asarray(weight), jnp.asarray(moment), places))

    if value.ndim == 2:
        return one_map(value, moment, places)
    several = [
        one_map(one.T if read_last else one, moment[b], places if places.ndim == 1 else places[b])
        for b, one in enumerate(value)
    ]
    return np.stack([one.T if read_last else one for one in several])


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


def _norm_factors(model: Model, axes: dict[Path, Axes], moments: Moments, kept: Kept) -> dict[Path, np.ndarray]:
    """What the scales of norms are multiplied by, so that the channels that stay are as large as they were.

    The mean square is over fewer channels, which have most of the whole: c = sqrt(their share of it n / n'), in each
    group that is normalised by itself.
    """
    shares: dict[Path, np.ndarray | None] = {}
    stay: dict[Path, np.ndarray] = {}
    for place, module in nnx.iter_modules(model):
        of: Any = module
        path = (*place, "scale")
        spans = axes[path][0].spans if path in axes and str(place[-1:]).startswith("('norm") else ()
        if not any(span.width in kept for span in spans):
            continue
        (axis,), scale = axes[path], np.asarray(of.scale[...], np.float64)
        where = np.zeros(len(scale), bool)
        where[_places(axis, kept, 1)] = True
        groups = (-1, getattr(module, "group_size", None) or len(scale))
        stay[path] = where.reshape(groups)
        energy = _read_behind(place, axis, axes, moments)
        if energy is None:
            shares[path] = None
            continue
        parts = (energy / np.where(scale == 0, 1, scale) ** 2).reshape(groups)
        shares[path] = (parts * stay[path]).sum(1) / np.maximum(parts.sum(1), 1e-30)
    # Behind the last norm is the head, which is not among what was seen: as the others are in the mean.
    known = [share for path, share in shares.items() if share is not None and len(stay[path]) == 1]
    mean = np.mean(known, axis=0) if known else np.ones(1)
    factors = {}
    for path, where in stay.items():
        share, n = shares[path], where.size // len(where)
        left = where.sum(1)
        square = (mean if share is None else share) * n / np.maximum(left, 1)
        factors[path] = np.repeat(np.where(left == 0, 1.0, np.sqrt(square)), n)
    return factors


def _read_behind(place: Path, axis: Axis, axes: dict[Path, Axes], moments: Moments) -> np.ndarray | None:
    """The mean squares of what a norm gives, read off the moments of a map behind it; None where none was seen."""
    widths_here = {span.width for span in axis.spans}
    around, behind = place[:-1], {"norm": "mixer", "norm2": "mlp"}.get(str(place[-1]), "")
    inside = around if around and around[-1] == "mixer" else (*around, behind)
    for path, found in axes.items():
        name = ".".join(map(str, path))
        if path[: len(inside)] != inside or name not in moments or "norm_f" in place:
            continue
        read = next((one for one in found if one.read), _NOTHING)
        if widths_here <= {span.width for span in read.spans}:
            diagonal = np.diagonal(np.asarray(moments[name], np.float64), axis1=-2, axis2=-1)
            whole = diagonal.ravel() if read.spans[0].rows is not None else np.atleast_2d(diagonal).mean(axis=0)
            return whole[-axis.size :]
    return None


def _with_layers(model: Any, batches: Sequence[Mapping[str, Array]], n_layers: int | Sequence[int]) -> Any:
    """A model of some of its blocks."""
    config = model.config
    words = parse_pattern(config.pattern, config.n_layers)
    require_own_blocks(config, words)
    if isinstance(n_layers, int):
        if not 0 < n_layers <= config.n_layers:
            raise ValueError(f"n_layers={n_layers}, expected 1 to the model's {config.n_layers}")
        stay = largest(block_influence(model, batches), n_layers)
    else:
        stay = np.asarray(n_layers)
        if not len(stay) or sorted(set(n_layers)) != list(n_layers) or stay[0] < 0 or stay[-1] >= config.n_layers:
            raise ValueError(f"n_layers={n_layers!r}, expected numbers of blocks, rising, below {config.n_layers}")
    if not config.first_norm and stay[0] != 0:
        raise ValueError(f"n_layers={stay.tolist()} with first_norm=False, expected the first block to stay")
    pattern = pattern_of(tuple(words[i] for i in stay), config.pattern)
    changed = dataclasses.replace(config, n_layers=len(stay), pattern=pattern)
    return of_layers(model, changed, [[int(i)] for i in stay], set())


def _with_vocabulary(model: Any, ids: Sequence[int]) -> Any:
    """A model of some of its tokens."""
    config, rows = model.config, np.asarray(ids)
    if rows.ndim != 1 or not len(rows) or len(set(rows.tolist())) < len(rows):
        raise ValueError(f"vocabulary={ids!r}, expected ids, each once")
    if rows.min() < 0 or rows.max() >= config.vocab_size:
        raise ValueError(
            f"vocabulary has the id {rows[np.argmax(np.abs(rows))]}, expected 0 to {config.vocab_size - 1}"
        )
    target = abstract(dataclasses.replace(config, vocab_size=len(rows), pad_vocab_multiple=1))
    values = {}
    shapes = {path: param.shape for path, param in nnx.to_flat_state(nnx.state(target, nnx.Param))}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = param[...]
        for number, (n, left) in enumerate(zip(value.shape, shapes[path], strict=True)):
            value = jnp.take(value, rows, axis=number) if n != left else value
        values[path] = value
    return filled(target, values, model)
