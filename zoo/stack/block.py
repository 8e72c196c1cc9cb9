"""One block of a stack: a sequence mixer and a channel mixer, each with its norm and its residual."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import ssm
from ssm.absent import blank
from zoo.layers.bottleneck import Bottleneck
from zoo.layers.depth_router import DepthRouter
from zoo.layers.needs import POSITIONS, hand, has, needs_of_state, run_mixer
from zoo.layers.norm import norm
from zoo.layers.parallel import Parallel
from zoo.stack.backbone_config import BackboneConfig, mixer_needs, word_config
from zoo.stack.depths import RoutedState, extend_routed, run_routed
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, find_kind
from zoo.stack.pattern import Word, mixer_name


class Block(nnx.Module):
    """A sequence mixer, then a channel mixer, each with its norm and its residual; either may be missing.

    pre   x + mixer(norm(x))
    post  norm(x + mixer(x))
    post, without the sequence mixer's residual: mixer(x)

    With a capacity, a router chooses the positions that go through it, see `zoo.stack.depths`.

    Args:
      config: shape and options.
      word: its mixers.
      first: whether it is the backbone's first, which goes without the norm before its sequence mixer where
        first_norm=False.
      rngs: source of keys, stream "params".

    Examples:
      >>> config = zoo.BackboneConfig(d_model=16, n_layers=1, pattern="mamba")
      >>> zoo.Block(config, zoo.Word(("mamba",)), rngs=nnx.Rngs(0))(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)
    """

    def __init__(self, config: BackboneConfig, word: Word, *, first: bool = False, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {
            # Keeps the variance of the residual stream from growing with depth: GPT-2's rule as Mamba applies it.
            "residual_scale": config.n_layers**-0.5,
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        self.norm_first = config.norm_place == "pre"
        self.mixer_residual = config.mixer_residual
        self.residual_multiplier = config.residual_multiplier
        normed = word.mixers and (self.norm_first or self.mixer_residual) and not (first and not config.first_norm)
        own = any(has(MIXERS[mixer_name(mixer)].constructor, "has_norm") for mixer in word.mixers)
        self.norm = make_norm(config, rngs) if normed and not own else None
        mixers = [make_mixer(config, mixer, **kwargs) for mixer in word.mixers]
        needs = [mixer_needs(config, mixer) for mixer in word.mixers]
        self.mixer = Parallel(mixers, needs) if len(mixers) > 1 else mixers[0] if mixers else None
        self.needs = needs[0] if len(needs) == 1 else ()
        self.norm2 = make_norm(config, rngs) if word.channel else None
        self.mlp = make_channel_mixer(config, word.channel, **kwargs) if word.channel else None
        self.mlp_needs = mixer_needs(config, word.channel) if word.channel else ()
        self.shortcut = _bottleneck(config, config.shortcut_rank, **kwargs) if mixers else None
        self.adapter = _bottleneck(config, config.adapter_width, **kwargs) if mixers else None
        self.adapter2 = _bottleneck(config, config.adapter_width, **kwargs) if word.channel else None
        self.scale = _layer_scale(config) if mixers else None
        self.scale2 = _layer_scale(config) if word.channel else None
        self.dropout = nnx.Dropout(config.dropout)
        self.drop_path = config.drop_path > 0
        self.router = _router(config, word.capacity, rngs)
        self.norms_apart = word.shared is not None and not config.share_norms

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds something to its loss for one of the mixers; see `run`."""
        return any(has(part, "has_auxiliary_loss") for part in (self.mixer, self.mlp, self.router))

    def __call__(self, x, *, mask=None, segment_ids=None, key=None, skip=None, **given):
        """One block over whole sequences.

        Args:
          x, mask, segment_ids: as in `Backbone`.
          key: switches dropout on.
          skip: share of the rows that go past the block, with a key.
          **given: what the mixers need besides, see `zoo.layers.needs`; and a router, see `zoo.stack.depths`.
        """
        return self.run(x, mask=mask, segment_ids=segment_ids, key=key, skip=skip, **given)[0]

    def run(self, x, *, mask=None, segment_ids=None, key=None, skip=None, **given):
        """As `__call__`, and what training adds to its loss for the mixers: (y, loss)."""
        given |= {"mask": mask, "segment_ids": segment_ids}
        if self.router is not None:
            return run_routed(self, x, given, key=key, skip=skip)
        return self.run_all(x, key=key, skip=skip, **given)

    def run_all(self, x, *, mask=None, segment_ids=None, key=None, skip=None, weight=None, **given):
        """`run` of all positions, without the router; what the last mixer adds counts `weight` (b, l, 1), or 1."""
        given |= {"mask": mask, "segment_ids": segment_ids}

        def mix(x):
            y, loss = run_mixer(self.mixer, x, **self._handed(given))
            return y, (), loss

        y, _, loss = self._run(blank(mask, x), mix, given, key, skip, weight)
        return y, loss

    def init_state(self, batch_size, max_len=None, **given):
        """The mixer's state before the first position."""
        if self.mixer is None:
            return () if self.router is None else RoutedState((), jnp.zeros(batch_size, jnp.int32))
        handed = given if isinstance(self.mixer, Parallel) else hand(self.mixer, needs_of_state(self.needs), given)
        state = self.mixer.init_state(batch_size, max_len, **handed)
        return state if self.router is None else RoutedState(state, jnp.zeros(batch_size, jnp.int32))

    def extend(self, x, state, *, mask=None, segment_ids=None, key=None, skip=None, **given):
        """One block from the mixer's state. `key` and `skip` are as in `__call__`."""
        given |= {"mask": mask, "segment_ids": segment_ids}
        if self.router is not None:
            return extend_routed(self, x, state, given, key=key, skip=skip)
        return self.extend_all(x, state, key=key, skip=skip, **given)

    def extend_all(self, x, state, *, mask=None, segment_ids=None, key=None, skip=None, weight=None, **given):
        """`extend` by all positions, without the router; see `run_all`."""
        given |= {"mask": mask, "segment_ids": segment_ids}

        def mix(x):
            y, after = self.mixer.extend(x, state, **self._handed(given))
            return y, after, jnp.float32(0)

        y, after, _ = self._run(blank(mask, x), mix, given, key, skip, weight)
        return y, state if self.mixer is None else after

    def mix(self, x, mixer):
        """The half of the sequence mixer alone, without dropout, `mixer(x)` in its place."""
        return self._mixed(x, lambda x: (mixer(x), (), jnp.float32(0)), None, None)[0]

    def feed(self, x):
        """The half of the channel mixer alone, without dropout; of one that needs nothing besides."""
        return x if self.mlp is None else self._fed(x, {}, None, None)[0]

    def _handed(self, given):
        """What the mixer is called with: several side by side choose themselves."""
        return given if isinstance(self.mixer, Parallel) else hand(self.mixer, (*POSITIONS, *self.needs), given)

    def _run(self, x, mix, given, key, skip, weight=None):
        """The block around `mix`, which gives the mixer's output, its state and its loss: all three of the block."""
        rngs, state, loss = None if key is None else nnx.Rngs(dropout=key), (), jnp.float32(0)
        if self.mixer is not None:
            x, state, loss = self._mixed(x, mix, rngs, skip, weight if self.mlp is None else None)
        if self.mlp is not None:
            x, more = self._fed(x, given, rngs, skip, weight)
            loss = loss + more
        return x, state, loss

    def _mixed(self, x, mix, rngs, skip, weight=None):
        """The sequence mixer's half."""
        entering = self.norm(x) if self.norm_first and self.norm is not None else x
        y, state, loss = mix(entering)
        if self.shortcut is not None:
            y = y + self.shortcut(entering).astype(y.dtype)
        y = _counted(self._drop(self._scaled(_adapted(y, self.adapter), self.scale), rngs, skip), weight)
        x = x + y if self.mixer_residual else y.astype(x.dtype)
        if not self.norm_first and self.norm is not None:
            x = self.norm(x)
        return x, state, loss

    def _fed(self, x, given, rngs, skip, weight=None):
        """The channel mixer's half."""
        y = self.norm2(x) if self.norm_first else x
        y, loss = run_mixer(self.mlp, y, rngs=rngs, **hand(self.mlp, self.mlp_needs, given))
        x = x + _counted(self._drop(self._scaled(_adapted(y, self.adapter2), self.scale2), rngs, skip), weight)
        return x if self.norm_first else self.norm2(x), loss

    def _scaled(self, y, scale):
        y = y if scale is None else y * scale[...]
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier

    def _drop(self, x, rngs, skip):
        if rngs is None:
            return x
        x = self.dropout(x, deterministic=False, rngs=rngs)
        if not self.drop_path or skip is None:
            return x
        stays = jax.random.bernoulli(rngs.dropout(), 1 - skip, (x.shape[0], 1, 1))
        return jnp.where(stays, x / (1 - skip).astype(x.dtype), 0)


class DepthNorms(nnx.Module):
    """The norms of a depth that shares a block with an earlier one, but not its norms.

    Source: Xue et al. 2021, arXiv:2107.11817 (WideNet), section 2.3.
    """

    def __init__(self, block: Block, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.norm = None if block.norm is None else make_norm(config, rngs)
        self.norm2 = None if block.norm2 is None else make_norm(config, rngs)


def _layer_scale(config: BackboneConfig) -> nnx.Param | None:
    if config.layer_scale is None:
        return None
    return nnx.Param(jnp.full((config.d_model,), config.layer_scale, config.param_dtype), decay=False, axes=(None,))


def _bottleneck(
    config: BackboneConfig, width: int | None, *, residual_scale: float, **kwargs: Any
) -> Bottleneck | None:
    return None if width is None else Bottleneck(config.d_model, width, **kwargs)


def _router(config: BackboneConfig, capacity: float | None, rngs: nnx.Rngs) -> DepthRouter | None:
    if capacity is None:
        return None
    options: dict[str, Any] = {"causal": config.causal, "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}
    return DepthRouter(config.d_model, config.mod, capacity=capacity, **options)


def _counted(y, weight):
    return y if weight is None else (y * weight).astype(y.dtype)


def _adapted(y, adapter):
    return y if adapter is None else y + adapter(y).astype(y.dtype)


def make_mixer(config: BackboneConfig, mixer: str, **kwargs) -> Any:
    """A word's mixer; where the backbone looks both ways, a state space is one of each direction."""
    kind = MIXERS[mixer_name(mixer)]
    if kind.in_backbone:
        kwargs["backbone"] = config
    build = functools.partial(kind.constructor, config.d_model, word_config(config, mixer), **kwargs)
    if kind.two_sided:
        return build(causal=config.causal)
    return build() if config.causal else ssm.Bidirectional(build(), build())


def make_channel_mixer(config: BackboneConfig, channel: str, **kwargs) -> Any:
    """A word's channel mixer."""
    kind = CHANNEL_MIXERS[mixer_name(channel)]
    return kind.constructor(config.d_model, word_config(config, channel), **kwargs)


def shared_name(config: BackboneConfig, mixer: str) -> str | None:
    """The name of the module that a word's mixer or channel mixer shares with other depths, if it shares one."""
    constructor: Any = find_kind(mixer_name(mixer)).constructor
    return constructor.shared_name(word_config(config, mixer)) if "shared" in mixer_needs(config, mixer) else None


def make_shared(config: BackboneConfig, mixer: str, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module that a word's mixer or channel mixer shares with other depths, with the options of the word."""
    kind = find_kind(mixer_name(mixer))
    constructor: Any = kind.constructor
    kwargs: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
    if kind.in_backbone:
        kwargs["backbone"] = config
    return constructor.make_shared(config.d_model, word_config(config, mixer), rngs=rngs, **kwargs)


def make_norm(config: BackboneConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """The configured normalisation."""
    return norm(
        config.d_model,
        config.norm,
        epsilon=config.norm_eps,
        bias=config.norm_bias,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
