"""Zamba2's mixer: Mamba-2 that reads, beside the stream, what a transformer shared by several depths makes of it.

    t = shared(stream beside embeddings)
    y = mamba2(norm(stream + linear(t)))

The shared transformer has attention and an MLP, is twice as wide at its entry, and has no residuals. Each depth has a
linear map of its own behind it, and low-rank adapters inside it.

Source: Glorioso et al. 2024, arXiv:2411.15242, section 2 and figure 2; transformers' modeling_zamba2.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

import ssm
from m2.mlp import ACTIVATIONS
from ssm.absent import blank
from ssm.serialization import serializable
from zoo.layers.attention import Attention, AttentionConfig, AttentionState
from zoo.layers.linear import linear
from zoo.layers.names import unknown_name
from zoo.layers.norm import norm


@dataclasses.dataclass(frozen=True)
class Zamba2Config:
    """Options of Zamba2's mixer. Those of its Mamba-2 are those of "mamba2".

    Examples:
      >>> zoo.Zamba2Config().adapter_rank
      128
    """

    block: int = 0
    """Which of the shared transformers it reads: depths with the same number share one."""
    n_heads: int = 32
    """Query heads. Each is 2 d_model / n_heads wide."""
    n_kv_heads: int | None = None
    """Key and value heads, shared by groups of query heads. None: as many as query heads."""
    rope: bool = False
    """Whether queries and keys are rotated by their positions."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    d_ff: int | None = None
    """Hidden width of the shared MLP, which is gated. None: 4 d_model."""
    activation: str = "gelu"
    """Non-linearity of its gate."""
    bias: bool = False
    """Whether its projections have biases."""
    adapter_rank: int = 128
    """Rank of each depth's adapters."""
    attention_adapter: bool = False
    """Whether queries, keys and values have adapters too. The MLP's hidden layer always has."""

    def __post_init__(self):
        for name in ("n_heads", "adapter_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.block < 0:
            raise ValueError(f"block={self.block}, expected at least 0")
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))


@serializable("zoo.Zamba2State")
class Zamba2State(NamedTuple):
    """What one mixer carries from one call to the next. Attention's keys are its own, not shared."""

    attention: AttentionState
    mamba2: ssm.Mamba2State


class Adapter(nnx.Module):
    """A low-rank linear map: up(down(x))."""

    def __init__(self, d_in: int, rank: int, d_out: int, **options):
        self.down_proj = linear(d_in, rank, axes=("embed", None), **options)
        self.up_proj = linear(rank, d_out, axes=(None, "side by side"), **options)

    def __call__(self, x: Float[Array, "b l i"]) -> Float[Array, "b l o"]:
        """Maps the last axis."""
        return self.up_proj(self.down_proj(x))


class SharedTransformer(nnx.Module):
    """Attention and an MLP over the stream beside the embeddings: (b, l, 2 d) in, (b, l, d) out."""

    def __init__(
        self,
        d_model: int,
        config: Zamba2Config,
        *,
        norm_eps: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        if 2 * d_model % config.n_heads:
            raise ValueError(f"n_heads={config.n_heads} must divide 2 d_model = {2 * d_model}")
        self.activation, d_ff = config.activation, config.d_ff or 4 * d_model
        head_dim = 2 * d_model // config.n_heads
        attention = AttentionConfig(
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=head_dim,
            position="rope" if config.rope else "none",
            rope_base=config.rope_base,
            softmax_scale=(head_dim / 2) ** -0.5,
        )
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = norm(2 * d_model, epsilon=norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.attention = Attention(2 * d_model, attention, d_out=d_model, **options)
        self.norm2 = norm(d_model, epsilon=norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(d_model, d_ff, axes=("embed", "inner"), bias=config.bias, **options)
        self.up_proj = linear(d_model, d_ff, axes=("embed", "inner"), bias=config.bias, **options)
        self.down_proj = linear(d_ff, d_model, axes=("inner", "embed"), bias=config.bias, **options)

    def mix_channels(self, x: Float[Array, "b l d"], adapter: Adapter) -> Float[Array, "b l d"]:
        """The MLP, its hidden layer moved by a depth's adapter."""
        x = self.norm2(x)
        gate, up = jnp.split(adapter(x), 2, axis=-1)
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x) + gate) * (self.up_proj(x) + up))


class Zamba2(nnx.Module):
    """Zamba2's mixer: stream and embeddings in, what is added to the stream out. It has its norm itself.

    Args:
      d_model: width of input and output.
      config: options; see `Zamba2Config`.
      backbone: of the model that it is in: its `mamba2` has the options of Mamba-2, its `norm_eps` that of the norms.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of the projections and products.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Raises:
      ValueError: heads that do not divide 2 d_model.

    Examples:
      >>> config = zoo.CausalLMConfig(
      ...     vocab_size=32, d_model=16, n_layers=2, pattern="zamba2@a*2", zamba2=zoo.Zamba2Config(n_heads=2, d_ff=16),
      ...     mamba2=ssm.Mamba2Config(d_state=8, head_dim=8),
      ... )
      >>> zoo.CausalLM(config, rngs=0)(jnp.ones((1, 5), jnp.int32)).shape
      (1, 5, 32)
    """

    causal = True
    has_norm = True
    needs = ("embeddings", "shared")

    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: Zamba2Config = Zamba2Config(),
        *,
        backbone: Any,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        wide, rank = 2 * d_model, config.adapter_rank
        self.adapter = Adapter(d_model, rank, 2 * (config.d_ff or 4 * d_model), **options)
        heads = (config.n_heads, *[config.n_kv_heads or config.n_heads] * 2)
        widths = [wide // config.n_heads * n for n in heads] if config.attention_adapter else []
        self.qkv_adapters = nnx.List([Adapter(wide, rank, width, **options) for width in widths])
        self.linear = linear(d_model, d_model, axes=("embed", None), **options)
        self.norm = norm(d_model, epsilon=backbone.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.mamba2 = ssm.Mamba2(d_model, backbone.mamba2, residual_scale=residual_scale, **options)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        embeddings: Float[Array, "b l d"],
        shared: Mapping[str, Any],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: the stream, without a norm.
          embeddings: what entered the first block.
          shared: the shared transformers by their names.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        positions = {"mask": mask, "segment_ids": segment_ids}
        x, embeddings = blank(mask, x), blank(mask, embeddings)
        transformer, both, added = self._read(x, embeddings, shared)
        mixed = transformer.attention(both, added=added, **positions)
        return self.mamba2(self._join(x, transformer, mixed), **positions)

    def init_state(self, batch_size: int, max_len: int | None = None, *, shared: Mapping[str, Any]) -> Zamba2State:
        """The state before the first position. Attention needs `max_len`."""
        attention = shared[self.shared_name(self.config)].attention
        return Zamba2State(attention.init_state(batch_size, max_len), self.mamba2.init_state(batch_size))

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: Zamba2State,
        *,
        embeddings: Float[Array, "b l d"],
        shared: Mapping[str, Any],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], Zamba2State]:
        """Goes on from `state` by l positions; any split gives the same as the whole."""
        positions = {"mask": mask, "segment_ids": segment_ids}
        x, embeddings = blank(mask, x), blank(mask, embeddings)
        transformer, both, added = self._read(x, embeddings, shared)
        mixed, attention = transformer.attention.extend(both, state.attention, added=added, **positions)
        y, mamba2 = self.mamba2.extend(self._join(x, transformer, mixed), state.mamba2, **positions)
        return y, Zamba2State(attention, mamba2)

    @staticmethod
    def shared_name(config: Zamba2Config) -> str:
        """The name of the transformer that a mixer with these options reads."""
        return f"zamba2.{config.block}"

    @staticmethod
    def make_shared(d_model: int, config: Zamba2Config, *, backbone: Any, **options: Any) -> SharedTransformer:
        """That transformer; `backbone` is as for the mixer, and the options are those of `SharedTransformer`."""
        return SharedTransformer(d_model, config, norm_eps=backbone.norm_eps, **options)

    def _read(self, x, embeddings, shared):
        """The shared transformer, what its attention reads, and what the adapters add to queries, keys and values."""
        transformer = shared[self.shared_name(self.config)]
        both = transformer.norm(jnp.concatenate([x, embeddings], axis=-1))
        return transformer, both, [adapter(both) for adapter in self.qkv_adapters] or None

    def _join(self, x, transformer, mixed):
        """What Mamba-2 reads, given what attention gives."""
        return self.norm(x + self.linear(transformer.mix_channels(mixed, self.adapter)))
