"""Linear attention with a decay: attention's query, key, value and output maps around the state of Mamba-2.

    S_t = exp(g_t) S_{t-1} + v_t k_t^T        y_t = S_t q_t        (S: p x n, a head)

It is the state-space dual under attention's names, q = C, k = B, v = x, and so what softmax attention is converted into
(`zoo.seed_from_attention`). Against `ssm.ssd`, groups are the other way round: heads have a query and a decay each, and
share keys and values, as in grouped-query attention. And the step size sets the decay alone: it does not scale the
input.

Axes: k key-value heads; the others as everywhere.

Source: mmMamba (Liao et al. 2025, arXiv:2502.13145), section 3 and its published code; Wang et al. 2024,
arXiv:2408.15237 (Mamba in the Llama).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.absent import blank
from ssm.checks import at_least, check_dt_range, check_shapes
from ssm.conv import DepthwiseConv
from ssm.decayed_attention import decayed_attention
from ssm.linear import make_linear
from ssm.mixer import Mixer
from ssm.norm import GatedRMSNorm
from ssm.sequence_cut import Along, cut_of
from ssm.serialization import serializable
from ssm.tensor_cut import convolve, side_by_side

# Where silu(z) = 1.
OPEN_GATE = 1.2784645427610738


def linear_attention(
    q: Float[Array, "b l h n"],
    k: Float[Array, "b l k n"],
    v: Float[Array, "b l k p"],
    log_decay: Float[Array, "b l h"],
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    along: Along | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Runs decayed linear attention over whole sequences of any length.

        S_t = exp(g_t) S_{t-1} + v_t k_t^T        y_t = S_t q_t

    Written out, y_t = sum_{s <= t} (q_t . k_s) exp(g_{s+1} + ... + g_t) v_s: causal attention without softmax and
    without 1 / sqrt(n). Cost and memory grow with the length.

    Args:
      q: queries, one a head.
      k, v: keys and values, shared by the h / k heads of a group; head i belongs to group i // (h / k).
      log_decay: g <= 0, the logarithm of the decay of each head at each position.
      initial_state: S before the first position, or None for zeros.
      mask: False where a position is not there, whatever lies there: the state passes it unchanged, y is 0.
      segment_ids: documents packed in a row, each a run of equal ids: the state is zero where a run begins. The run
        that the first position belongs to goes on from `initial_state`.
      chunk_size: positions a chunk; changes speed and memory, not the result. None takes the default.
      along: inside `jax.shard_map`, where the row's other pieces are; see `ssm.sequence_cut`. States are the row's.

    Returns:
      (y, final_state): y in v's dtype, the state after the last position in at least float32.

    Raises:
      ValueError: shapes that disagree, key-value heads that do not divide the heads, or a chunk_size below 1.

    Examples:
      >>> q = k = v = jnp.ones((1, 3, 1, 2))
      >>> y, state = ssm.linear_attention(q, k, v, jnp.log(jnp.full((1, 3, 1), 0.5)))  # each step halves what was
      >>> y[0, :, 0, 0].tolist()
      [2.0, 3.0, 3.5]

    Source: Yang et al. 2023, arXiv:2312.06635, section 4, with one decay a head; Dao & Gu 2024, arXiv:2405.21060.
    """
    check_shapes(
        q=(q, "b l h n"),
        k=(k, "b l k n"),
        v=(v, "b l k p"),
        log_decay=(log_decay, "b l h"),
        initial_state=(initial_state, "b h p n"),
        mask=(mask, "b l"),
        segment_ids=(segment_ids, "b l"),
    )
    if along is None and (cut := cut_of(q)) is not None:
        positions = {"q": q, "k": k, "v": v, "log_decay": log_decay, "mask": mask, "segment_ids": segment_ids}
        run = functools.partial(linear_attention, chunk_size=chunk_size)
        return cut.run(run, positions, {"initial_state": initial_state})
    q, k, v, log_decay = (blank(mask, m) for m in (q, k, v, log_decay))
    k, v = (_for_each_head(m, q.shape[2]) for m in (k, v))
    log_decay = log_decay.astype(jnp.result_type(v, log_decay, jnp.float32))
    weight = blank(mask, jnp.ones_like(log_decay))
    y, state = decayed_attention(
        *(v, weight, log_decay, k, q),
        initial_state=initial_state if along is None else along.at_first(initial_state),
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        along=along,
    )
    return y.astype(v.dtype), state if along is None else along.of_last(state)


def linear_attention_step(
    state: Float[Array, "b h p n"],
    q: Float[Array, "b h n"],
    k: Float[Array, "b k n"],
    v: Float[Array, "b k p"],
    log_decay: Float[Array, "b h"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """Advances decayed linear attention by one position.

        S' = exp(g) S + v k^T        y = S' q

    Args:
      state: S, at least float32. Zeros before the first position.
      q, k, v, log_decay: as in `linear_attention`, at this position.

    Returns:
      (y, S'): y in v's dtype, S' in at least float32.

    Examples:
      >>> state, one = jnp.zeros((1, 1, 2, 2)), jnp.ones((1, 1, 2))
      >>> y, state = ssm.linear_attention_step(state, one, one, one, jnp.zeros((1, 1)))
      >>> y.tolist()
      [[[2.0, 2.0]]]
    """
    check_shapes(state=(state, "b h p n"), q=(q, "b h n"), k=(k, "b k n"), v=(v, "b k p"), log_decay=(log_decay, "b h"))
    dtype = jnp.result_type(state, v, log_decay, jnp.float32)
    each_k, each_v = (_for_each_head(m[:, None].astype(dtype), q.shape[1])[:, 0] for m in (k, v))
    state = jnp.exp(log_decay.astype(dtype))[..., None, None] * state + each_v[..., None] * each_k[:, :, None]
    y = jnp.einsum("bhpn,bhn->bhp", state, q.astype(dtype), precision=lax.Precision.HIGHEST)
    return y.astype(v.dtype), state


def _for_each_head(m, heads):
    """Keys or values, b l k *, as each of the heads reads them, b l h *."""
    groups = m.shape[2]
    if groups < 1 or heads % groups:
        raise ValueError(f"k and v have {groups} heads, expected a number that divides the {heads} of q")
    return jnp.repeat(m, heads // groups, axis=2)


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """Options of linear attention with a decay. The defaults are mmMamba's.

    Examples:
      >>> ssm.LinearAttentionConfig(n_heads=4, n_kv_heads=2).head_dim is None  # d_model / n_heads
      True
    """

    n_heads: int | None = None
    """Heads, each with its own query, decay and gate. None: d_model / head_dim, with head_dim 64 unless given."""
    n_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of heads. None: as many as heads."""
    head_dim: int | None = None
    """Width of a head, and size of its state. None: d_model / n_heads, or 64."""
    d_conv: int = 2
    """Taps of the short convolution over values, keys and queries."""
    activation: Literal["silu", "identity"] = "silu"
    """What follows the convolution."""
    norm: bool = True
    """Whether the output of each head is normalised, before the gate. Softmax's normaliser has no other stand-in."""
    norm_eps: float = 1e-5
    """Added to the mean square in the normalisation."""
    gate: bool = True
    """Whether the output is multiplied by silu of a projection of the input."""
    gate_bias: bool = False
    """Whether that projection has a bias, which starts where silu is 1: an open gate."""
    bias: bool = False
    """Whether the query, key, value and output projections have biases."""
    init: Literal["mamba2", "mimic"] = "mamba2"
    """How what attention does not have starts: as in Mamba-2, or to mimic attention (step sizes that do not depend on
    the input, slow decay, a convolution that lets the position itself through, a small gate)."""
    dt_min: float = 0.001
    """Smallest initial step size."""
    dt_max: float = 0.1
    """Largest initial step size."""
    chunk_size: int | None = None
    """Positions a chunk. None: what suits the platform."""

    def __post_init__(self):
        heads = {name: getattr(self, name) for name in ("n_heads", "n_kv_heads", "head_dim")}
        at_least(1, d_conv=self.d_conv, **{name: n for name, n in heads.items() if n is not None})
        check_dt_range(self.dt_min, self.dt_max)
        if self.activation not in ("silu", "identity"):
            raise ValueError(f"activation={self.activation!r}, expected 'silu' or 'identity'")
        if self.init not in ("mamba2", "mimic"):
            raise ValueError(f"init={self.init!r}, expected 'mamba2' or 'mimic'")
        if self.gate_bias and not self.gate:
            raise ValueError("gate_bias=True, expected gate=True")


@serializable("ssm.LinearAttentionState")
class LinearAttentionState(NamedTuple):
    """What the mixer carries from one call to the next; its size does not depend on the length.

    Examples:
      >>> mixer = ssm.LinearAttention(16, ssm.LinearAttentionConfig(n_heads=2), rngs=nnx.Rngs(0))
      >>> jax.tree.map(jnp.shape, mixer.init_state(1))
      LinearAttentionState(conv=(1, 1, 48), ssm=(1, 2, 8, 8))
    """

    conv: Float[Array, "b t e"]
    """The last d_conv - 1 inputs (v, k, q) of the short convolution, oldest first."""
    ssm: Float[Array, "b h p n"]
    """The state of each head, at least float32."""


class LinearAttention(Mixer):
    """Decayed linear attention as a mixer: sequence in, sequence out, linear in the length.

        v, k, q = act(conv1d(x W_v, x W_k, x W_q))      dt = softplus(x W_dt + dt_bias)      g = -exp(A_log) dt
        y = norm(linear_attention(q, k, v, g)) * silu(x W_gate)                              out = y W_o

    `q_proj`, `k_proj`, `v_proj` and `o_proj` are attention's, of the same shapes. Positions have no embedding (the
    decay tells near from far), scores no factor 1 / sqrt(head_dim) (the norm of each head takes any factor out).

    Args:
      d_model: width of input and output.
      config: options; see `LinearAttentionConfig`.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections and convolution. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, dt_bias and the norm are at least float32.
      rngs: source of keys, stream "params".

    Weight decay leaves out every parameter marked `decay=False`: A_log, dt_bias, the norm and the biases.

    Raises:
      ValueError: head counts that do not divide.

    Examples:
      >>> mixer = ssm.LinearAttention(16, ssm.LinearAttentionConfig(n_heads=2), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)
    """

    runs_cut = mirrors = carries = True

    def __init__(
        self,
        d_model: int,
        config: LinearAttentionConfig = LinearAttentionConfig(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.n_heads = config.n_heads or max(1, d_model // (config.head_dim or 64))
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        if config.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={d_model} unless head_dim is given")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        self.head_dim = config.head_dim or d_model // self.n_heads
        wide = jnp.promote_types(param_dtype, jnp.float32)
        inner, shared = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.convolved = *((shared, self.n_kv_heads),) * 2, (inner, self.n_heads)  # v, k, q

        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear, plain = (make_linear(use_bias=bias, **options) for bias in (config.bias, False))
        heads, kv_heads = ("heads", self.n_heads), ("kv heads", self.n_kv_heads)  # channels, those of a head in a run
        self.q_proj = linear(d_model, inner, ("embed", heads))
        self.k_proj = linear(d_model, shared, ("embed", kv_heads))
        self.v_proj = linear(d_model, shared, ("embed", kv_heads))
        self.o_proj = linear(inner, d_model, (heads, "embed"), kernel_init=init.residual(residual_scale))
        self.conv1d = DepthwiseConv(
            2 * shared + inner,
            config.d_conv,
            use_bias=True,
            axis="side by side",
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dt_proj = plain(d_model, self.n_heads, ("embed", "heads"))
        dt_bias = init.dt_bias(config.dt_min, config.dt_max, 0.0)
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (self.n_heads,), wide), decay=False, axes=("heads",))
        A_log = init.A_log(1.0, 16.0)(rngs.params(), (self.n_heads,), wide)
        self.A_log = nnx.Param(A_log, decay=False, axes=("heads",))
        norm = GatedRMSNorm(self.head_dim, norm_before_gate=True, eps=config.norm_eps, param_dtype=param_dtype)
        self.norm = norm if config.norm else None
        open_gate = jax.nn.initializers.constant(OPEN_GATE)
        gate = make_linear(use_bias=config.gate_bias, **options)
        self.gate_proj = gate(d_model, inner, ("embed", heads), bias_init=open_gate) if config.gate else None
        if config.init == "mimic":
            self._start_as_attention(rngs)

    def _start_as_attention(self, rngs: nnx.Rngs) -> None:
        """Source: mmMamba's published code. Decays are exp(-e dt), 0.762 to 0.997 over the default range of dt."""
        # Under a trace, `parameter[...] = value` searches all that was traced before, `set_value` nothing.
        taps, bias = self.conv1d.kernel, self.conv1d.bias
        self.dt_proj.kernel.set_value(jnp.zeros_like(self.dt_proj.kernel[...]))
        self.A_log.set_value(jnp.ones_like(self.A_log[...]))
        taps.set_value(jnp.zeros_like(taps[...]).at[:, -1].set(1))
        if bias is not None:
            bias.set_value(jnp.zeros_like(bias[...]))
        if self.gate_proj is not None:
            kernel = self.gate_proj.kernel
            xavier = jax.nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")  # gain 2^-2.5
            kernel.set_value(xavier(rngs.params(), kernel.shape, kernel.dtype))

    def init_state(self, batch_size: int, max_len: int | None = None) -> LinearAttentionState:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        dtype = self.dtype or self.q_proj.kernel.dtype
        return LinearAttentionState(
            conv=jnp.zeros((batch_size, self.config.d_conv - 1, self.conv1d.kernel.shape[0]), dtype),
            ssm=jnp.zeros((batch_size, self.n_heads, self.head_dim, self.head_dim), self.A_log.dtype),
        )

    def _mix(self, x, state, mask, segment_ids):
        conv_state, ssm_state = (None, None) if state is None else state
        dt = jax.nn.softplus(self.dt_proj(x).astype(self.dt_bias.dtype) + self.dt_bias[...])
        log_decay = -jnp.exp(self.A_log[...]) * dt
        z = None if self.gate_proj is None else self._heads(self.gate_proj(x))

        vkq = side_by_side([project(x) for project in (self.v_proj, self.k_proj, self.q_proj)], self.convolved)
        positions = {"mask": mask, "segment_ids": segment_ids}
        convolved, conv_state = convolve(self.conv1d, vkq, conv_state, self.convolved, **positions)
        activation = jax.nn.silu if self.config.activation == "silu" else lambda x: x
        v, k, q = (self._heads(activation(m)) for m in convolved)

        if ssm_state is not None and x.shape[1] == 1 and segment_ids is None:
            before = ssm_state
            y, ssm_state = linear_attention_step(before, q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0])
            y = y[:, None]
            if mask is not None:
                ssm_state = jnp.where(mask[..., None, None], ssm_state, before)
        else:
            options = {"mask": mask, "segment_ids": segment_ids, "chunk_size": self.config.chunk_size}
            y, ssm_state = linear_attention(q, k, v, log_decay, initial_state=ssm_state, **options)
        if self.norm is not None:
            y = self.norm(y, z)
        elif z is not None:
            y = y * jax.nn.silu(z)
        return self.o_proj(rearrange(y, "b l h p -> b l (h p)")), LinearAttentionState(conv_state, ssm_state)

    def _heads(self, m):
        return rearrange(m, "b l (h p) -> b l h p", p=self.head_dim)
