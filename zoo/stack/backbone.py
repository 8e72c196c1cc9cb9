"""A stack of blocks whose mixers follow a pattern: the body of every model."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import ssm
from m2 import M2Config, MonarchMLPConfig
from zoo.layers.attention import AttentionConfig
from zoo.layers.mlp import MLPConfig
from zoo.layers.moe import MoE, MoEConfig
from zoo.layers.norm import norm
from zoo.layers.parallel import Parallel
from zoo.layers.zamba2 import Context, SharedTransformer, Zamba2, Zamba2Config
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, find_kind
from zoo.stack.pattern import Folded, Word, fold, mixer_name, parse_pattern, word_options
from zoo.stack.scan_layers import looped_blocks, run_blocks


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shape and options of a stack of blocks."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    pattern: str = "mamba"
    """Mixers of the blocks, e.g. "mamba", "attn/mlp", "(mamba2*3 attn/mlp)*2 mamba2", "mamba2+attn/mlp", or Megatron's
    letters as in "M-M-M*-"; cycles to n_layers."""
    causal: bool = True
    """Whether positions see only themselves and earlier ones. Otherwise state spaces run both ways, averaged."""
    dropout: float = 0.0
    """Share of each mixer's output that is dropped in training."""
    drop_path: float = 0.0
    """Share of the rows that skip the last block's mixers in training, less in earlier blocks in a line from 0."""
    layer_scale: float | None = None
    """Initial value of a learned factor for each channel of each mixer's output. None: no such factors."""
    residual_multiplier: float = 1.0
    """Multiplies each mixer's output before it is added to its input (Granite)."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation around each mixer, and at the end where it comes before them."""
    norm_place: Literal["pre", "post"] = "pre"
    """pre: x + mixer(norm(x)), and a last norm at the end. post: norm(x + mixer(x)), as in BERT."""
    mixer_residual: bool = True
    """Whether the sequence mixer's output is added to its input. M2-BERT's replaces it, without a norm of its own."""
    norm_eps: float = 1e-5
    """Added to the variance in normalisation."""
    norm_bias: bool = True
    """Whether norm="layer" has a bias."""
    first_norm: bool = True
    """Whether the first block has a norm before its sequence mixer. ModernBERT's has the embedding's alone."""
    dtype: str = "float32"
    """Dtype of the heavy computation: float32, bfloat16, float16 or float64. Parameters stay in param_dtype."""
    param_dtype: str = "float32"
    """Dtype that parameters are kept in."""
    residual_in_fp32: bool = True
    """Whether the residual stream is kept in at least float32."""
    remat: bool = False
    """Whether the backward pass recomputes each block instead of keeping its insides."""
    scan_layers: bool = False
    """Whether equal blocks are compiled once and looped over, also inside what comes several times: as many blocks are
    compiled as the canonical pattern has words. Each call stacks a copy of the parameters, where they are not kept
    stacked (`stack_layers`), as training keeps them."""
    mamba: ssm.MambaConfig = ssm.MambaConfig()
    """Options of "mamba"."""
    mamba2: ssm.Mamba2Config = ssm.Mamba2Config()
    """Options of "mamba2"."""
    mamba3: ssm.Mamba3Config = ssm.Mamba3Config()
    """Options of "mamba3"."""
    vim: ssm.MambaConfig = ssm.MambaConfig()
    """Options of "vim", Mamba-1 both ways between shared projections."""
    ss2d: ssm.SS2DConfig = ssm.SS2DConfig()
    """Options of "ss2d", Mamba-1 in several orders over an image."""
    m2: M2Config = M2Config()
    """Options of "m2"."""
    attn: AttentionConfig = AttentionConfig()
    """Options of "attn"."""
    zamba2: Zamba2Config = Zamba2Config()
    """Options of "zamba2", Mamba-2 behind a transformer that several depths share."""
    linear_attn: ssm.LinearAttentionConfig = ssm.LinearAttentionConfig()
    """Options of "linear_attn", linear attention with a decay."""
    mlp: MLPConfig = MLPConfig()
    """Options of "mlp"."""
    monarch: MonarchMLPConfig = MonarchMLPConfig()
    """Options of "monarch"."""
    moe: MoEConfig = MoEConfig()
    """Options of "moe", a mixture of experts."""

    def __post_init__(self):
        for name in ("d_model", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected 0 <= dropout < 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}, expected 0 <= drop_path < 1")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in (known := ("bfloat16", "float16", "float32", "float64")):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.drop_path and not self.mixer_residual:
            raise ValueError(f"drop_path={self.drop_path} with mixer_residual=False: nothing is left of what skips")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm={self.norm!r}, expected 'rms' or 'layer'")
        if self.norm_place not in ("pre", "post"):
            raise ValueError(f"norm_place={self.norm_place!r}, expected 'pre' or 'post'")
        if not self.first_norm and self.norm_place == "post":
            raise ValueError("first_norm=False, expected norm_place='pre': a block's norm comes behind its mixer")
        words = parse_pattern(self.pattern, self.n_layers)
        if not self.first_norm and words[0].shared:
            raise ValueError(f"first_norm=False, expected pattern={self.pattern!r} to begin with a block of its own")
        for word in set(words):
            alone = len(word.mixers) == 1 and self.causal and self.norm_place == "pre"
            if "zamba2" in word.plain.mixers and not alone:
                raise ValueError(
                    f"pattern={self.pattern!r}: expected zamba2 alone in its block, causal, norms before it"
                )
            for mixer in word.mixers + ((word.channel,) if word.channel else ()):
                word_config(self, mixer)


def word_config(config: BackboneConfig, mixer: str) -> Any:
    """The options of a word's mixer or channel mixer in full: those of the config, and in their place the word's own.

    Raises:
      ValueError: together they make no mixer.
    """
    default, given = find_kind(mixer_name(mixer)).config_default, getattr(config, mixer_name(mixer), None)
    options = given if isinstance(given, type(default)) else default  # a registered mixer mostly has no field
    try:
        return dataclasses.replace(options, **word_options(mixer))
    except ValueError as error:
        raise ValueError(f"pattern={config.pattern!r}: {mixer}: {error}") from error


def needs_grid(config: BackboneConfig, mixer: str) -> bool:
    """Whether a pattern's mixer goes by the rows and columns of an image, and mixes nothing else."""
    return getattr(word_config(config, mixer), "needs_grid", False)


class Block(nnx.Module):
    """A sequence mixer, then a channel mixer, each with its norm and its residual; either may be missing.

    pre   x + mixer(norm(x))
    post  norm(x + mixer(x))
    post, without the sequence mixer's residual: mixer(x)

    Args:
      config: shape and options.
      word: its mixers.
      first: whether it is the backbone's first, which goes without the norm before its sequence mixer where
        first_norm=False.
      rngs: source of keys, stream "params".
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
        own = any(getattr(MIXERS[mixer_name(mixer)].constructor, "has_norm", False) for mixer in word.mixers)
        self.norm = make_norm(config, rngs) if normed and not own else None
        mixers = [make_mixer(config, mixer, **kwargs) for mixer in word.mixers]
        self.mixer = Parallel(mixers) if len(mixers) > 1 else mixers[0] if mixers else None
        self.norm2 = make_norm(config, rngs) if word.channel else None
        self.mlp = make_channel_mixer(config, word.channel, **kwargs) if word.channel else None
        self.scale = _layer_scale(config) if mixers else None
        self.scale2 = _layer_scale(config) if word.channel else None
        self.dropout = nnx.Dropout(config.dropout)
        self.drop_path = config.drop_path > 0

    def __call__(self, x, *, mask=None, segment_ids=None, key=None, skip=None, grid=None, context=None):
        """One block over whole sequences. `key` switches dropout on; a share `skip` of the rows goes past it."""
        positions = {"mask": mask, "segment_ids": segment_ids}
        return self.run(x, **positions, key=key, skip=skip, grid=grid, context=context)[0]

    def run(self, x, *, mask=None, segment_ids=None, key=None, skip=None, grid=None, context=None):
        """As `__call__`, and the auxiliary loss of the channel mixer: (y, loss), 0 where it has none."""
        options = self._options(mask, segment_ids, context)
        if getattr(self.mixer, "needs_grid", False):
            if grid is None:
                raise ValueError(f"{type(self.mixer).__name__} mixes images, expected grid=(rows, columns)")
            options["grid"] = grid
        y, _, loss = self._run(x, lambda x: (self.mixer(x, **options), ()), (), mask, key, skip)
        return y, loss

    def _options(self, mask, segment_ids, context):
        return {"mask": mask, "segment_ids": segment_ids, **self._context(context)}

    def _context(self, context):
        return {"context": context} if getattr(self.mixer, "needs_context", False) else {}

    def init_state(self, batch_size, max_len, context):
        """The mixer's state before the first position."""
        return () if self.mixer is None else self.mixer.init_state(batch_size, max_len, **self._context(context))

    def extend(self, x, state, *, mask=None, segment_ids=None, key=None, skip=None, context=None):
        """One block from the mixer's state. `key` and `skip` are as in `__call__`."""
        options = self._options(mask, segment_ids, context)
        mix = lambda x: self.mixer.extend(x, state, **options)  # noqa: E731
        return self._run(x, mix, state, mask, key, skip)[:2]

    def _run(self, x, mix, state, mask, key, skip):
        rngs, loss = None if key is None else nnx.Rngs(dropout=key), jnp.float32(0)
        if self.mixer is not None:
            y, state = mix(self.norm(x) if self.norm_first and self.norm is not None else x)
            y = self._drop(self._scaled(y, self.scale), rngs, skip)
            x = x + y if self.mixer_residual else y.astype(x.dtype)
            if not self.norm_first and self.norm is not None:
                x = self.norm(x)
        if self.mlp is not None:
            y = self.norm2(x) if self.norm_first else x
            if isinstance(self.mlp, MoE):
                y, loss = self.mlp.run(y, mask=mask, rngs=rngs)
            else:
                y = self.mlp(y, rngs=rngs)
            x = x + self._drop(self._scaled(y, self.scale2), rngs, skip)
            if not self.norm_first:
                x = self.norm2(x)
        return x, state, loss

    def _scaled(self, y, scale):
        y = y if scale is None else y * scale[...]
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier

    def _drop(self, x, rngs, skip):
        if rngs is None:
            return x
        x = self.dropout(x, deterministic=False, rngs=rngs)
        if not self.drop_path or skip is None:
            return x
        stays = jax.random.bernoulli(rngs.dropout(), 1 - skip, (len(x), 1, 1))
        return jnp.where(stays, x / (1 - skip).astype(x.dtype), 0)


def _layer_scale(config: BackboneConfig) -> nnx.Param | None:
    if config.layer_scale is None:
        return None
    return nnx.Param(jnp.full((config.d_model,), config.layer_scale, config.param_dtype), decay=False)


def _shared_transformer(config: BackboneConfig, block: int, rngs: nnx.Rngs) -> SharedTransformer:
    """The transformer that the depths with a number share, with the options of the first of them."""
    mixers = [mixer for word in parse_pattern(config.pattern, config.n_layers) for mixer in word.mixers]
    found = [word_config(config, mixer) for mixer in mixers if mixer_name(mixer) == "zamba2"]
    options = next(options for options in found if options.block == block)
    dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    return SharedTransformer(
        config.d_model, options, norm_eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


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


class Backbone(nnx.Module):
    """Blocks and a final normalisation, without an embedding: text, image patches and features all enter."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.words = parse_pattern(config.pattern, config.n_layers)
        # Which layer is at each depth: one of its own, or for words that share one that of the first of them.
        built: dict[Any, int] = {}
        self.order = tuple(built.setdefault(w if w.shared else depth, len(built)) for depth, w in enumerate(self.words))
        words = [self.words[self.order.index(i)] for i in range(len(built))]
        self.layers = nnx.List([Block(config, word, first=i == 0, rngs=rngs) for i, word in enumerate(words)])
        # What several depths read, once: the parameters of a module are in one place of the tree.
        blocks = [block.mixer.config.block for block in self.layers if isinstance(block.mixer, Zamba2)]
        self.shared_ids = tuple(dict.fromkeys(blocks))
        self.shared = nnx.List([_shared_transformer(config, i, rngs) for i in self.shared_ids])
        self.norm_f = make_norm(config, rngs) if config.norm_place == "pre" else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block at each depth. `layers` has each block once, where the pattern lets several depths share it."""
        return tuple(self.layers[i] for i in self.order)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, "b l d"]:
        """Runs the stack over whole sequences.

        Args:
          x: input.
          mask: False where a position is not there.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          rngs: stream "dropout" switches dropout on; None leaves it off.
          grid: rows and columns of an image whose places the positions are, for mixers that go by them.

        Raises:
          ValueError: a mixer of images without a grid.
        """
        return self.run(x, mask=mask, segment_ids=segment_ids, rngs=rngs, grid=grid)[0]

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and what training adds to its loss: the sum of the channel mixers' auxiliary losses."""
        x, noise = self._enter(x), self._noise(rngs)
        context = self._context(x)
        carry = x, jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))  # the stream, the losses so far

        def run(graphdef, params, carry, noise):
            (x, total), (key, skip) = carry, noise or (None, None)
            block = nnx.merge(graphdef, params)
            positions = {"mask": mask, "segment_ids": segment_ids, "grid": grid, "context": context}
            x, loss = block.run(x, key=key, skip=skip, **positions)
            return x, total + loss.astype(total.dtype)

        if self.config.remat:
            run = jax.checkpoint(run, static_argnums=0)

        blocks = [nnx.split(block) for block in self.blocks]
        done, items = self._items
        if done:
            carry = run(*blocks[0], carry, _of_block(noise, 0))
        rest = jax.tree.map(lambda a: a[done:], noise)
        x, loss = run_blocks(run, items, blocks[done:], rest, carry)
        return self._leave(x), loss

    @property
    def _items(self) -> tuple[int, Folded]:
        """How many blocks run by themselves first, and the words of the others, folded where they are to be loops."""
        done = int(not self.config.first_norm)  # the first block is not like those that its word comes back for
        words = self.words[done:]
        return done, fold(words) if self.config.scan_layers else words

    @property
    def looped_layers(self) -> tuple[tuple[int, ...], ...]:
        """Numbers in `layers` of those that `scan_layers` runs as one loop; a tuple for each word of the pattern."""
        done, items = self._items
        return tuple(tuple(self.order[done + i] for i in places) for places in looped_blocks(items))

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds something to its loss (see `run`): there is a mixture of experts."""
        return any(isinstance(block.mlp, MoE) for block in self.layers)

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first position: one mixer's state a block. Attention needs `max_len`."""
        context = self._context(None)
        return tuple(block.init_state(batch_size, max_len, context) for block in self.blocks)

    def _context(self, embeddings) -> Context:
        return Context(embeddings, dict(zip(self.shared_ids, self.shared, strict=True)))

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], tuple]:
        """Goes on from `state` by l positions; any split gives the same as the whole. `rngs` is as in `__call__`."""
        x, noise, after = self._enter(x), self._noise(rngs), []
        context = self._context(x)

        def run(graphdef, params, x, state, noise):
            key, skip = noise or (None, None)
            block = nnx.merge(graphdef, params)
            positions = {"mask": mask, "segment_ids": segment_ids, "context": context}
            return block.extend(x, state, key=key, skip=skip, **positions)

        if self.config.remat:
            run = jax.checkpoint(run, static_argnums=0)
        for i, (block, block_state) in enumerate(zip(self.blocks, state, strict=True)):
            x, block_state = run(*nnx.split(block), x, block_state, _of_block(noise, i))
            after.append(block_state)
        return self._leave(x), tuple(after)

    def _leave(self, x):
        return x if self.norm_f is None else self.norm_f(x)

    def _noise(self, rngs):
        """(key, share of rows that skip it) of every block, or None."""
        channels = {word.channel for word in self.words if word.channel}
        inside = any(getattr(word_config(self.config, channel), "dropout", 0) for channel in channels)
        if rngs is None or not (self.config.dropout or self.config.drop_path or inside):
            return None
        n = len(self.words)
        return jax.random.split(rngs.dropout(), n), self.config.drop_path * jnp.arange(n) / max(1, n - 1)

    def _enter(self, x):
        dtype = jnp.dtype(self.config.dtype)
        return x.astype(jnp.promote_types(dtype, jnp.float32) if self.config.residual_in_fp32 else dtype)


def _of_block(noise, i):
    """A block's own part of the noise of several, or None."""
    return jax.tree.map(lambda a: a[i], noise)
