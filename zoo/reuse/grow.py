"""A small trained model becomes the start of a larger one: wider, deeper, and at first of the same output.

    large = zoo.grow(small, d_model=768, n_layers=12, rngs=nnx.Rngs(0))

Width: every unit, a channel or a head, is there several times, and what reads it gives each copy its share (function
preserving initialisation, FPI). Where the width is a multiple of what it was, all units are there equally often, means
and norms over them are the same, and so is the model's output. A copy lies beside its unit. With AKI copies write what
the layer above writes, which is not exact and learns faster, since no two units are the same.

Depth: blocks that add nothing, or copies of those that there are.

`coalesce` is the way back: what copies write is averaged, what reads them is added up. Together with `decoalesce`, to
grow by copies alone, and `interpolate` they make the V-cycle: train large for a little, coalesce, train small,
decoalesce, interpolate, train large.

Source: Chen et al. 2021, arXiv:2110.07143, sections 3.2-3.4 (bert2BERT: FPI, AKI, depth); Zou et al. 2024,
arXiv:2404.07999 (V-cycle: coalescing, de-coalescing, interpolation).
"""

import contextlib
import dataclasses
import re
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from m2 import M2Mixer, MonarchMLP
from ssm import LinearAttention, Mamba, Mamba2
from zoo.layers.attention import Attention
from zoo.layers.mlp import MLP
from zoo.layers.moe import MoE
from zoo.layers.rngs import Seed, as_rngs
from zoo.models.build import Model, ModelConfig, abstract
from zoo.models.causal import CausalLM
from zoo.models.vision_language import VisionLanguageModel
from zoo.reuse.linear_maps import owned, require_plain
from zoo.reuse.merge import merge, require_same
from zoo.reuse.widths import Axes, Axis, Path, sizes, widths
from zoo.stack.pattern import format_pattern, parse_pattern

Method = Literal["fpi", "aki"]
Depth = Literal["zero", "copy"]
# Widths that a word of the pattern may say.
SAID_IN_WORDS = re.compile(r"\b(?:n_heads|n_kv_heads|head_dim|dt_rank|d_ssm|n_filters|d_ff|d_ff_shared|d_latent)\b")
# The maps that a block ends in.
_LAST = ("out_proj", "o_proj", "out_linear", "down_proj", "wo", "expand")


def grow(
    model: Model,
    *,
    d_model: int | None = None,
    n_layers: int | None = None,
    d_ff: int | None = None,
    method: Method = "fpi",
    depth: Depth = "zero",
    rngs: Seed,
) -> Model:
    """A larger model out of a trained one.

    Heads grow with d_model and keep their width; so do inner widths, `expand` times d_model. States, ranks, taps,
    groups, experts, filters and the vocabulary stay.

    Args:
      model: a causal or masked language model of attention, linear attention, Mamba-1, -2 or -3, M2, with dense or
        block-diagonal channel mixers or experts.
      d_model: width between the blocks, at least the model's. A multiple of it keeps the output; otherwise some
        channels are there once more than others, which norms and means do not see as they did.
      n_layers: at least the model's. The pattern goes on.
      d_ff: hidden width of channel mixers, where there are any. None: it grows as d_model does.
      method: fpi copies. aki takes what copies write from the next layer of the same shape.
      depth: zero: new blocks add nothing, with the parameters of the last block of their word but for the last map.
        copy: they are that block again, which changes the output.
      rngs: stream "params", or a seed, for channels that are there once more.

    Returns:
      A model of the same kind, with arrays of its own.

    Raises:
      ValueError: a width or depth below the model's; parts whose widths cannot be changed, options in the pattern that
        say a width, or counts that do not divide; depth="zero" where norms come after the blocks.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> larger = zoo.grow(model, d_model=32, n_layers=4, rngs=nnx.Rngs(0))
      >>> bool(jnp.allclose(larger(jnp.ones((1, 3), jnp.int32)), model(jnp.ones((1, 3), jnp.int32)), atol=1e-4))
      True
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}, expected one of {', '.join(get_args(Method))}")
    if depth not in get_args(Depth):
        raise ValueError(f"depth={depth!r}, expected one of {', '.join(get_args(Depth))}")
    require_language(model)
    config: Any = model.config
    for name, new in (("d_model", d_model), ("n_layers", n_layers)):
        if new is not None and new < getattr(config, name):
            raise ValueError(f"{name}={new}, expected at least the model's {getattr(config, name)}")
    wide = with_width(model, d_model or config.d_model, d_ff)
    return _deepened(_widened(model, wide, method, as_rngs(rngs)), n_layers or config.n_layers, depth)


def coalesce(model: Model, *, d_model: int | None = None, n_layers: int | None = None) -> Model:
    """A smaller model out of a large one: neighbouring units become one, and neighbouring layers.

    What units write is averaged, what reads them is added up; layers are averaged. `coalesce` of `grow` gives the model
    that was grown, as far as widths go.

    Args:
      model: as for `grow`.
      d_model: a divisor of the model's; inner widths and heads shrink alike.
      n_layers: a divisor of the model's; the layers that become one must be of one word.

    Raises:
      ValueError: no divisor, or parts whose widths cannot be changed.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.coalesce(model, d_model=8, n_layers=1).config.d_model
      8
    """
    require_language(model)
    config: Any = model.config
    for name, new in (("d_model", d_model), ("n_layers", n_layers)):
        if new is not None and (new < 1 or getattr(config, name) % new):
            raise ValueError(f"{name}={new}, expected a divisor of the model's {getattr(config, name)}")
    narrow = _narrowed(model, with_width(model, d_model or config.d_model, None))
    return _averaged(narrow, n_layers or config.n_layers)


def decoalesce(model: Model, *, d_model: int | None = None, n_layers: int | None = None) -> Model:
    """A large model out of a small one: every unit several times, and every layer. `coalesce` of it is the small one.

    Args:
      model: as for `grow`.
      d_model: a multiple of the model's; inner widths and heads grow alike.
      n_layers: a multiple of the model's.

    Raises:
      ValueError: no multiple, or parts whose widths cannot be changed.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.coalesce(zoo.decoalesce(model, d_model=48, n_layers=6), d_model=16, n_layers=2).config.n_layers
      2
    """
    require_language(model)
    for name, new in (("d_model", d_model), ("n_layers", n_layers)):
        if new is not None and (new < 1 or new % getattr(model.config, name)):
            raise ValueError(f"{name}={new}, expected a multiple of the model's {getattr(model.config, name)}")
    return grow(model, d_model=d_model, n_layers=n_layers, depth="copy", rngs=0)


def interpolate(model: Model, other: Model, alpha: float = 0.5) -> Model:
    """(1 - alpha) model + alpha other, parameter by parameter: the V-cycle's way back into the large model.

    Args:
      model: the large model as it was.
      other: the small one, trained and grown; of the same shape.
      alpha: 0.5 for language, 0.25 for images in the source.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> zoo.interpolate(model, model, 0.5).config == model.config
      True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}, expected 0 to 1")
    require_same(model, other, "other")
    return merge(None, [model, other], method="average", weights=[1 - alpha, alpha])


def require_language(model: Model) -> None:
    """Raises a ValueError for a model of two stacks, or one of other weights than parameters."""
    if isinstance(model, VisionLanguageModel):
        raise ValueError("a VisionLanguageModel keeps its size, expected a language model, before they are joined")
    require_plain(model)


def with_width(model: Model, d_model: int, d_ff: int | None) -> ModelConfig:
    """A model's config at another width, in which all that does not grow with it says how large it is.

    Raises:
      ValueError: options in the pattern that say a width, or counts that do not divide.
    """
    config: Any = model.config
    if d_model == config.d_model and d_ff is None:
        return config
    if said := SAID_IN_WORDS.search(config.pattern):
        raise ValueError(f"pattern={config.pattern!r} says {said[0]}, a width: it would stay while d_model changes")
    changes: dict[str, Any] = {"d_model": d_model}
    if isinstance(model, CausalLM) and config.norm_place == "post" and config.tie_embeddings:
        # No norm of its own before the head, which is the embedding: each channel is there as often in both.
        changes["logits_multiplier"] = config.logits_multiplier * config.d_model / d_model

    def scaled(name: str, n: int) -> int:
        if n * d_model % config.d_model:
            raise ValueError(
                f"d_model={d_model}, expected one that makes {name}={n} x d_model / {config.d_model} whole"
            )
        return n * d_model // config.d_model

    for _, module in nnx.iter_modules(model):
        of: Any = getattr(module, "config", None)
        match module:
            case Attention() | LinearAttention():
                if d_model != config.d_model and getattr(of, "position", None) == "alibi":
                    raise ValueError("position='alibi': a head's slope follows from how many there are")
                shared = module.n_kv_heads != module.n_heads and module.n_kv_heads * d_model % config.d_model
                kv_heads = module.n_kv_heads if shared else scaled("n_kv_heads", module.n_kv_heads)
                heads = {"n_heads": scaled("n_heads", module.n_heads), "n_kv_heads": kv_heads}
                name = "attn" if isinstance(module, Attention) else "linear_attn"
                changes[name] = dataclasses.replace(of, head_dim=module.head_dim, **heads)
            case Mamba():
                changes["mamba"] = dataclasses.replace(of, dt_rank=module.dt_rank)
            case Mamba2() if of.d_ssm is not None:
                changes["mamba2"] = dataclasses.replace(of, d_ssm=scaled("d_ssm", of.d_ssm))
            case M2Mixer():
                changes["m2"] = dataclasses.replace(of, n_filters=module.filter_fn.channels)
            case MLP():
                changes.setdefault("mlp", dataclasses.replace(config.mlp, d_ff=d_ff or scaled("d_ff", module.d_ff)))
            case MonarchMLP():
                width = d_ff or scaled("d_ff", of.width(config.d_model))
                changes["monarch"] = dataclasses.replace(of, d_ff=width)
            case MoE():
                width = d_ff or scaled("d_ff", of.expert().width(config.d_model))
                shared_width = of.d_ff_shared and scaled("d_ff_shared", of.d_ff_shared)
                changes["moe"] = dataclasses.replace(of, d_ff=width, d_ff_shared=shared_width)
    if d_ff is not None and d_ff < 1:
        raise ValueError(f"d_ff={d_ff}, expected at least 1")
    return dataclasses.replace(config, **changes)


def _widened(model: Model, config: ModelConfig, method: Method, rngs: nnx.Rngs) -> Model:
    if config == model.config:
        return owned(model)
    before, target = widths(model), abstract(config)
    after = widths(target)
    seed = int(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
    numbers = sizes(before)
    copies = {width: _copies(width, numbers[width], n, seed) for width, n in sizes(after).items()}
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    values = {}
    for path, axes in after.items():
        value = _expanded(params[path], before[path], axes, copies)
        above = _above(path, params) if method == "aki" else None
        if above is not None:
            other = _expanded(params[above], before[above], axes, copies)
            value = jnp.where(_only_copies(before[path], axes, copies), other, value)
        values[path] = value
    return filled(target, values, model)


def _narrowed(model: Model, config: ModelConfig) -> Model:
    if config == model.config:
        return owned(model)
    before, target = widths(model), abstract(config)
    after = widths(target)
    numbers = sizes(after)
    copies = {width: _copies(width, numbers[width], n, 0) for width, n in sizes(before).items()}
    params = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    values = {}
    for path, axes in after.items():
        value = params[path].astype(jnp.promote_types(params[path].dtype, jnp.float32))
        for number, (small, large) in enumerate(zip(axes, before[path], strict=True)):
            index = _places(small, large, copies)[0]
            total = jax.ops.segment_sum(jnp.moveaxis(value, number, 0), index, small.size)
            if not small.read:
                total /= np.bincount(index, minlength=small.size).reshape(-1, *[1] * (value.ndim - 1))
            value = jnp.moveaxis(total, 0, number)
        values[path] = value.astype(params[path].dtype)
    return filled(target, values, model)


def _copies(width: str, n: int, more: int, seed: int) -> np.ndarray:
    """For each unit of the larger width, the unit of the smaller one that it is a copy of: copies side by side."""
    if more < n:
        raise ValueError(f"{width.rpartition('.')[2]}={more}, expected at least the model's {n}")
    once_more = np.random.default_rng(seed).choice(n, more % n, replace=False)
    return np.sort(np.concatenate([np.repeat(np.arange(n), more // n), once_more]))


def _places(old: Axis, new: Axis, copies: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each place of a larger axis: its place in the smaller, of how many copies it is, whether not the first."""
    index, counts, further, start = [], [], [], 0
    for small, large in zip(old.spans, new.spans, strict=True):
        units = np.arange(small.units) if small.width is None else copies[small.width]
        each = small.each
        if small.rows is not None and large.rows is not None:
            if large.rows % small.rows:
                raise ValueError(
                    f"{str(small.width).rpartition('.')[2]}={large.units}, expected a multiple of {small.units}: it is "
                    "cut into blocks"
                )
            units, each = np.repeat(np.arange(small.rows), large.rows // small.rows), 1
        first = np.r_[True, units[1:] != units[:-1]]
        index.append(start + (units[:, None] * each + np.arange(each)).ravel())
        counts.append(np.repeat(np.bincount(units)[units], each))
        further.append(np.repeat(~first, each))
        start += small.units * small.each if small.rows is None else small.rows
    return np.concatenate(index), np.concatenate(counts), np.concatenate(further)


def _expanded(value: Array, old: Axes, new: Axes, copies: dict[str, np.ndarray]) -> Array:
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    for number, (small, large) in enumerate(zip(old, new, strict=True)):
        index, counts, _ = _places(small, large, copies)
        wide = jnp.take(wide, index, axis=number)
        if large.read:
            wide /= counts.reshape([-1 if axis == number else 1 for axis in range(value.ndim)])
    return wide.astype(value.dtype)


def _only_copies(old: Axes, new: Axes, copies: dict[str, np.ndarray]) -> np.ndarray:
    """Where a parameter writes to a unit that is a copy."""
    where = np.zeros([axis.size for axis in new], bool)
    for number, (small, large) in enumerate(zip(old, new, strict=True)):
        if not large.read:
            further = _places(small, large, copies)[2]
            where |= further.reshape([-1 if axis == number else 1 for axis in range(len(new))])
    return where


def _above(path: Path, params: dict[Path, Array]) -> Path | None:
    """The same parameter of the next layer that has it in this shape, or None."""
    if "layers" not in path:
        return None
    at = path.index("layers") + 1
    later = sorted(
        p[at] for p in params if len(p) == len(path) and p[:at] == path[:at] and p[at + 1 :] == path[at + 1 :]
    )
    same = [i for i in later if i > path[at] and params[(*path[:at], i, *path[at + 1 :])].shape == params[path].shape]
    return (*path[:at], same[0], *path[at + 1 :]) if same else None


def filled(target: Model, values: dict[Path, Array], model: Model) -> Model:
    """A model with these parameters; its other variables are those of another model."""
    graphdef, state = nnx.split(target)
    theirs = dict(nnx.to_flat_state(nnx.state(model)))
    of = lambda path, variable: variable.replace(values[path]) if path in values else theirs[path]  # noqa: E731
    return owned(
        nnx.merge(graphdef, nnx.from_flat_state([(path, of(path, v)) for path, v in nnx.to_flat_state(state)]))
    )


def _deepened(model: Model, n_layers: int, depth: Depth) -> Model:
    config: Any = model.config
    if n_layers == config.n_layers:
        return model
    words = parse_pattern(config.pattern, config.n_layers)
    require_own_blocks(config, words)
    if depth == "copy":
        sources = [i * config.n_layers // n_layers for i in range(n_layers)]
        after = pattern_of(tuple(words[i] for i in sources), config.pattern)
        zeroed: set[int] = set()
    else:
        if config.norm_place != "pre" or not config.mixer_residual:
            raise ValueError(
                f"depth='zero' with norm_place={config.norm_place!r} and mixer_residual={config.mixer_residual}, "
                "expected 'pre' and True: other blocks cannot add nothing"
            )
        more = parse_pattern(config.pattern, n_layers)
        if more[: config.n_layers] != words:
            more = words + tuple(words[i % len(words)] for i in range(n_layers - config.n_layers))
        last = {word: i for i, word in enumerate(words)}
        sources = [*range(config.n_layers), *(last[word] for word in more[config.n_layers :])]
        after, zeroed = pattern_of(more, config.pattern), set(range(config.n_layers, n_layers))
    changed = dataclasses.replace(config, n_layers=n_layers, pattern=after)
    return of_layers(model, changed, [[i] for i in sources], zeroed)


def _averaged(model: Model, n_layers: int) -> Model:
    config: Any = model.config
    if n_layers == config.n_layers:
        return model
    words, several = parse_pattern(config.pattern, config.n_layers), config.n_layers // n_layers
    require_own_blocks(config, words)
    groups = [list(range(i, i + several)) for i in range(0, config.n_layers, several)]
    for group in groups:
        if len({words[i] for i in group}) > 1:
            raise ValueError(f"n_layers={n_layers}, but layers {group[0]} to {group[-1]} are not of one word")
    pattern = pattern_of(tuple(words[group[0]] for group in groups), config.pattern)
    return of_layers(model, dataclasses.replace(config, n_layers=n_layers, pattern=pattern), groups, set())


def of_layers(model: Model, config: ModelConfig, sources: list[list[int]], zeroed: set[int]) -> Model:
    """A model of layers that are each the mean of some of another's; those in `zeroed` end in a map of zeros."""
    target = abstract(config)
    theirs = {path: param[...] for path, param in nnx.to_flat_state(nnx.state(model))}
    graphdef, state = nnx.split(target)
    values: list[tuple[Any, Any]] = []
    flat: list[tuple[Any, Any]] = list(nnx.to_flat_state(state))
    for path, variable in flat:
        if "layers" not in path:
            values.append((path, variable.replace(theirs[path])))
            continue
        at = path.index("layers") + 1
        several = [theirs[(*path[:at], i, *path[at + 1 :])] for i in sources[path[at]]]
        value = several[0] if len(several) == 1 else _mean(several)
        if path[at] in zeroed and any(name in path for name in _LAST):
            value = jnp.zeros_like(value)
        values.append((path, variable.replace(value)))
    return owned(nnx.merge(graphdef, nnx.from_flat_state(values)))


def _mean(several: list[Array]) -> Array:
    wide = jnp.stack([x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in several])
    return jnp.mean(wide, axis=0).astype(several[0].dtype)


def require_own_blocks(config: Any, words: tuple) -> None:
    if any(word.shared for word in words):
        raise ValueError(f"pattern={config.pattern!r} has blocks that depths share, whose number cannot be changed")


def pattern_of(words: tuple, pattern: str) -> str:
    """The pattern as it is written, where it gives these words."""
    with contextlib.suppress(ValueError):  # it has more blocks
        if parse_pattern(pattern, len(words)) == words:
            return pattern
    return format_pattern(words)
