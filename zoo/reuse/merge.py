"""Several tunes of one model in one: averages, task arithmetic, and changes thinned out before they are added.

    model = zoo.merge(base, [maths, code], method="dare", rate=0.9, weights=[0.5, 0.5], key=jax.random.key(0))

The change of a tune is what it moved of the base, delta = tuned - base, a parameter at a time.

Source: Wortsman et al. 2022, arXiv:2203.05482 (soups); Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic);
Yadav et al. 2023, arXiv:2306.01708, section 3 (TIES); Yu et al. 2023, arXiv:2311.03099, section 3.2 (DARE).
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from zoo.models.frozen import copied
from zoo.reuse.linear_maps import Model, named, require_plain

# What modules make of parameters of the same shapes.
_READ_BY = ("n_heads", "n_kv_heads", "head_dim", "rope_dim", "causal", "norm_first", "mixer_residual")
Method = Literal["average", "task_arithmetic", "dare", "drop", "ties"]


def merge(
    base: Model | None,
    tuned: Sequence[Model],
    *,
    method: Method = "dare",
    rate: float = 0.9,
    weights: Sequence[float] | float | None = None,
    exclude: str | None = None,
    key: jax.Array | None = None,
) -> Model:
    """One model of several that were tuned from the same base.

        average            sum_t w_t tuned_t / sum_t w_t
        task_arithmetic    base + sum_t w_t delta_t
        dare               base + sum_t w_t keep_t delta_t / (1 - rate), keep_t = 1 with probability 1 - rate
        drop               the same without the division, for comparison: its expectation is another
        ties               base + sum_t w_t trimmed_t, over those of the sign that most of the sum has, averaged

    Args:
      base: what all were tuned from. None, for an average alone.
      tuned: models of the same structure, one at least.
      method: how.
      rate: share of each parameter's changes that is dropped, at random by dare and drop, the smallest by ties; at
        least 0 and below 1. Others have no use for it.
      weights: of each tune, or one of all. None: 1 / len(tuned) for dare, drop, task_arithmetic; 1 for others.
      exclude: names of parameters that stay the base's (or the first tune's), a regular expression on the end of
        their names, such as "classifier.*": heads of other tasks, which may be of other shapes or missing. None: none.
      key: of what is dropped at random. dare and drop need it.

    Raises:
      ValueError: another method, rate, number of weights; a model of another structure, or with adapters, quantised or
        frozen; no base or key where one is needed; nothing that `exclude` names.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> tuned = [zoo.create("mamba-130m", rngs=seed, d_model=16, n_layers=2, vocab_size=32) for seed in (1, 2)]
      >>> soup = zoo.merge(None, tuned, method="average")
      >>> soup.config == model.config
      True
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}, expected one of {', '.join(get_args(Method))}")
    if not tuned:
        raise ValueError("tuned=[], expected one model at least")
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}, expected at least 0 and below 1")
    if base is None and method != "average":
        raise ValueError(f"base=None with method={method!r}, expected a model: only an average needs none")
    if key is None and method in ("dare", "drop"):
        raise ValueError(f"key=None with method={method!r}, expected a key: what is dropped is drawn")
    factors = _factors(method, weights, len(tuned))
    start = tuned[0] if base is None else base
    for argument, model in (("base", start), *((f"tuned[{i}]", model) for i, model in enumerate(tuned))):
        require_plain(model, argument)
    flat = [_parameters(model) for model in (start, *tuned)]
    kept = set() if exclude is None else set(named("exclude", exclude, {name for of in flat for name in of}))
    for i, other in enumerate(tuned):
        require_same(start, other, f"tuned[{i}]", kept)
    graphdef, *parts = nnx.split(start, nnx.Param, ...)
    params, rest = parts
    merged = {}
    for number, (path, variable) in enumerate(nnx.to_flat_state(params)):
        name = ".".join(map(str, path))
        if name in kept:
            merged[path] = variable.replace(jnp.array(variable[...]))
            continue
        values = [_wide(parameters[name][...]) for parameters in flat]
        if method == "average":
            value = sum(f * v for f, v in zip(factors, values[1:], strict=True))
        else:
            thin = _thinned(method, rate, None if key is None else jax.random.fold_in(key, number))
            deltas = [thin(t, tuned - values[0]) for t, tuned in enumerate(values[1:])]
            change = ties if method == "ties" else weighted_sum
            value = values[0] + change(deltas, factors)
        merged[path] = variable.replace(value.astype(variable[...].dtype))
    return copied(nnx.merge(graphdef, nnx.from_flat_state(merged), rest))


def weighted_sum(deltas: Sequence[Float[Array, "..."]], weights: Sequence[float]) -> Float[Array, "..."]:
    """sum_t w_t delta_t"""
    return functools.reduce(jnp.add, (w * delta for w, delta in zip(weights, deltas, strict=True)))


def ties(deltas: Sequence[Float[Array, "..."]], weights: Sequence[float]) -> Float[Array, "..."]:
    """For each number the mean of the changes that have the sign of their sum, by weight; 0 where there is none."""
    stack, w = jnp.stack(list(deltas)), jnp.asarray(weights).reshape(-1, *[1] * deltas[0].ndim)
    agrees = (jnp.sign(stack) == jnp.sign(jnp.sum(w * stack, axis=0))) & (stack != 0)
    count = jnp.sum(agrees, axis=0)
    return jnp.sum(jnp.where(agrees, w * stack, 0), axis=0) / jnp.maximum(count, 1)


def drop_at_random(
    delta: Float[Array, "..."], rate: float, key: jax.Array, *, rescale: bool = True
) -> Float[Array, "..."]:
    """Keeps each number with probability 1 - rate, divided by it unless `rescale` is False; the others are 0."""
    keep = jax.random.bernoulli(key, 1 - rate, delta.shape)
    return jnp.where(keep, delta / (1 - rate) if rescale else delta, 0)


def keep_largest(delta: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Keeps the share 1 - rate of the numbers that is largest, rounded up; the others are 0."""
    n_dropped = int(rate * delta.size)
    if n_dropped == 0:
        return delta
    order = jnp.argsort(jnp.abs(delta).ravel())
    return delta.ravel().at[order[:n_dropped]].set(0).reshape(delta.shape)


def _thinned(method: Method, rate: float, key) -> Callable:
    if method in ("dare", "drop"):
        return lambda t, delta: drop_at_random(delta, rate, jax.random.fold_in(key, t), rescale=method == "dare")
    return lambda t, delta: keep_largest(delta, rate) if method == "ties" else delta


def _factors(method: Method, weights, n: int) -> list[float]:
    if weights is None:
        weights = 1.0 if method in ("average", "ties") else 1 / n
    factors = [float(w) for w in weights] if np.ndim(weights) else [float(weights)] * n
    if len(factors) != n:
        raise ValueError(f"weights={weights!r}, expected one for each of the {n} models")
    if not all(map(math.isfinite, factors)):
        raise ValueError(f"weights={weights!r}, expected finite numbers")
    if method == "average":
        if sum(factors) == 0:
            raise ValueError(f"weights={weights!r}, expected a sum other than 0")
        return [f / sum(factors) for f in factors]
    return factors


def _parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def require_same(model: nnx.Module, other: nnx.Module, argument: str, kept: Collection[str] = ()) -> None:
    """Raises a ValueError unless the parameters of two models mean the same.

    Args:
      model: the first one.
      other: the other.
      argument: what errors call it.
      kept: names of parameters that do not matter.
    """
    params, theirs = (_parameters(m) for m in (model, other))
    if missing := sorted((params.keys() ^ theirs.keys()) - set(kept)):
        raise ValueError(f"{argument} has other parameters than the first model, such as {missing[0]}")
    for name, value in params.items():
        if name not in kept and value.shape != theirs[name].shape:
            raise ValueError(f"{argument}.{name} has shape {theirs[name].shape}, the first model's {value.shape}")
    modules = dict(nnx.iter_modules(other))
    for path, module in nnx.iter_modules(model):
        for name in _READ_BY if path in modules else ():
            ours, of_other = getattr(module, name, None), getattr(modules[path], name, None)
            if ours != of_other:
                where = ".".join(map(str, (argument, *path, name)))
                raise ValueError(f"{where} is {of_other}, the first model's {ours}")


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
