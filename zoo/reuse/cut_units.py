"""A model of some of its units: every parameter cut to them, and what reads them refitted.

Source: Kurtic et al. 2023, arXiv:2302.04089, section 3.1 (what makes up for units that go).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from zoo.reuse.calibration import Moments
from zoo.reuse.choose_units import prunable_widths
from zoo.reuse.compensation import refit
from zoo.reuse.grow import SAID_IN_WORDS, filled
from zoo.reuse.linear_maps import owned
from zoo.reuse.norm_scales import norm_factors
from zoo.reuse.widths import RESIDUAL, Axis, Kept, Path, places_on, sizes
from zoo.stack.pattern import format_pattern, parse_pattern


def without(model: Model, moments: Moments, kept: Kept, *, compensate: bool = True) -> Model:
    """A model of these units alone.

    Args:
      model, moments: as for `choose`.
      kept: from there.
      compensate: whether maps that read units are refitted to those that stay.
    """
    if not kept:
        return owned(model)
    axes = prunable_widths(model)
    factors = norm_factors(model, axes, moments, kept)
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
    hidden: dict[int, int] = {}
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
                changes["mlp"] = dataclasses.replace(config.mlp, d_ff=n("d_ff"))
                hidden |= {part: n("d_ff") for part in path if isinstance(part, int)}
            case MonarchMLP():
                changes["monarch"] = dataclasses.replace(of, d_ff=n("d_ff"))
            case MoE():
                shared = of.d_ff_shared if module.shared is None else n("shared.d_ff") // of.n_shared
                changes["moe"] = dataclasses.replace(of, d_ff=n("d_ff"), d_ff_shared=shared)
    if len(set(hidden.values())) > 1:  # then words say how many
        words = enumerate(parse_pattern(config.pattern, config.n_layers))
        each = [w._replace(channel=f"{w.channel}[d_ff={hidden[i]}]") if i in hidden else w for i, w in words]
        changes |= {"mlp": config.mlp, "pattern": format_pattern(tuple(each))}
    return dataclasses.replace(config, **changes)


def _taken(value: np.ndarray, number: int, axis: Axis, kept: Kept) -> np.ndarray:
    places = places_on(axis, kept, value.shape[0])
    if places.ndim == 1:
        return np.take(value, places, axis=number)
    shape = [1] * value.ndim
    shape[0], shape[number] = places.shape
    return np.take_along_axis(value, places.reshape(shape), axis=number)


def _refitted(value: np.ndarray, number: int, axis: Axis, moment: np.ndarray, kept: Kept) -> np.ndarray:
    """A map that reads a width, or the maps of blocks or experts, refitted to the units that stay."""
    places, read_last = places_on(axis, kept, value.shape[0]), number == value.ndim - 1

    def one_map(weight: np.ndarray, moment: np.ndarray, places: np.ndarray) -> np.ndarray:
        return np.asarray(refit(jnp.asarray(weight), jnp.asarray(moment), places))

    if value.ndim == 2:
        return one_map(value, moment, places)
    several = [
        one_map(one.T if read_last else one, moment[b], places if places.ndim == 1 else places[b])
        for b, one in enumerate(value)
    ]
    return np.stack([one.T if read_last else one for one in several])
