"""The Mamba-3 mixer: a trapezoidal state space whose keys and queries are rotated by data-dependent angles.

Source: "Mamba-3" (ICLR 2026), arXiv:2603.15569, section 3; mamba_ssm/modules/mamba3.py.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int

from ssm import init
from ssm.absent import blank
from ssm.checks import at_least, check_dt_range, count_heads, inner_width, is_known_size
from ssm.linear import make_linear
from ssm.mixer import Mixer
from ssm.norm import GatedRMSNorm
from ssm.segments import last_inputs, segment_runs, segment_starts
from ssm.sequence_cut import Along, cut_of, entering_states
from ssm.serialization import serializable
from ssm.tensor_cut import cut, project
from ssm.trapezoid import TrapezoidState, trapezoid, trapezoid_step

# Positions whose turns are summed at once; 16 to 2,048 take about the same time on a CPU.
TURNS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Mamba3Config:
    """Options of the Mamba-3 mixer. The defaults are those of the official module.

    Examples:
      >>> ssm.Mamba3Config(is_mimo=True).mimo_rank  # inputs and outputs a head
      4
    """

    d_state: int = 128
    """State size n of each channel."""
    expand: float = 2.0
    """Inner width, as a multiple of d_model."""
    head_dim: int = 64
    """Channels of a head, which share decay, step and angles."""
    n_groups: int = 1
    """Groups of heads; each group has its own B and C before their biases."""
    rope_fraction: float = 0.5
    """Share of the state's channels that is rotated."""
    is_mimo: bool = False
    """Whether a head has several inputs and outputs (MIMO) instead of one (SISO)."""
    mimo_rank: int = 4
    """Inputs and outputs a head with is_mimo."""
    is_outproj_norm: bool = False
    """Whether each head's output is normalised before its gate."""
    A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"
    """How a projection becomes a decay rate. The official code has heavy_tail since June 2026, softplus before."""
    A_floor: float = 1e-4
    """Decay rates are not below this."""
    norm_eps: float = 1e-5
    """Added to the mean square in the normalisations."""
    dt_min: float = 0.001
    """Smallest initial step size."""
    dt_max: float = 0.1
    """Largest initial step size."""
    dt_floor: float = 1e-4
    """Initial step sizes are not below this."""
    chunk_size: int | None = None
    """Positions a chunk. None: what suits the platform, divided by the rank."""

    def __post_init__(self):
        at_least(1, head_dim=self.head_dim, n_groups=self.n_groups, mimo_rank=self.mimo_rank)
        check_dt_range(self.dt_min, self.dt_max)
        if self.d_state < 2 or self.d_state % 2:
            raise ValueError(f"d_state={self.d_state}, expected an even number: its channels are rotated in pairs")
        if not 0 < self.rope_fraction <= 1 or self.n_angles < 1:
            raise ValueError(
                f"rope_fraction={self.rope_fraction}, expected at most 1, and at least one pair of d_state"
            )
        if self.A_activation not in ("heavy_tail", "softplus"):
            raise ValueError(f"A_activation={self.A_activation!r}, expected 'heavy_tail' or 'softplus'")

    @property
    def n_angles(self) -> int:
        """Rotated pairs of channels."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def rank(self) -> int:
        """Inputs and outputs a head."""
        return self.mimo_rank if self.is_mimo else 1


@serializable("ssm.Mamba3State")
class Mamba3State(NamedTuple):
    """What one Mamba-3 mixer carries from one call to the next; its size does not depend on the length.

    Examples:
      >>> mixer = ssm.Mamba3(16, ssm.Mamba3Config(d_state=8, head_dim=8), rngs=nnx.Rngs(0))
      >>> mixer.init_state(1).ssm.shape
      (1, 4, 8, 8)
    """

    angle: Float[Array, "b h s"]
    """Angle of each rotated pair, in radians, 0 to 2 pi."""
    ssm: Float[Array, "b h p n"]
    """The state space's state, at least float32."""
    k: Float[Array, "b r h n"]
    """The last position's key: B with its bias, rotated."""
    v: Float[Array, "b h p"]
    """The last position's input, before the projection to the ranks."""


class Mamba3(Mixer):
    """Mamba-3 mixer: sequence in, sequence out, linear in the length; no convolution.

    Args:
      d_model: width of input and output.
      config: options; see `Mamba3Config`.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections. None: that of the parameters and the input.
      param_dtype: dtype that the projections are kept in. All other parameters are at least float32.
      rngs: source of keys, stream "params".

    Weight decay leaves out every parameter marked `decay=False`: D, norms and biases; not mimo_x, mimo_z, mimo_o.

    Raises:
      ValueError: widths that head_dim or n_groups do not divide.

    Examples:
      >>> mixer = ssm.Mamba3(16, ssm.Mamba3Config(d_state=8, head_dim=8), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)
    """

    runs_cut = mirrors = carries = True

    def __init__(
        self,
        d_model: int,
        config: Mamba3Config = Mamba3Config(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.d_inner = inner_width(config.expand, d_model)
        named = f"expand * d_model = {self.d_inner}"
        self.n_heads = count_heads(self.d_inner, config.head_dim, config.n_groups, most=self.d_inner, named=named)
        heads = ("heads", self.n_heads)  # channels, those of a head side by side
        wide = jnp.promote_types(param_dtype, jnp.float32)
        bc = config.rank * config.n_groups * config.d_state
        widths = [self.d_inner, self.d_inner, bc, bc, self.n_heads, self.n_heads, self.n_heads, config.n_angles]
        units = (*[self.n_heads] * 2, 1, 1, *[self.n_heads] * 3, 1)
        self.parts = tuple(zip(widths, units, strict=True))  # z, x, B, C, dt, A, trap, angle

        def param(value, **metadata):
            return nnx.Param(value.astype(wide), axes=("heads", *[None] * (value.ndim - 1)), **metadata)

        linear = make_linear(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_proj = linear(d_model, sum(widths), ("embed", "side by side"))
        dt_bias = init.dt_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = param(dt_bias(rngs.params(), (self.n_heads,)), decay=False)
        self.B_bias = param(jnp.ones((self.n_heads, config.rank, config.d_state)), decay=False)
        self.C_bias = param(jnp.ones((self.n_heads, config.rank, config.d_state)), decay=False)
        self.B_norm = GatedRMSNorm(config.d_state, eps=config.norm_eps, param_dtype=param_dtype)
        self.C_norm = GatedRMSNorm(config.d_state, eps=config.norm_eps, param_dtype=param_dtype)
        if config.is_mimo:
            shape = (self.n_heads, config.rank, config.head_dim)
            self.mimo_x = param(jnp.full(shape, 1 / config.rank))
            self.mimo_z = param(jnp.ones(shape))
            self.mimo_o = param(jnp.full(shape, 1 / config.rank))
        self.D = param(jnp.ones((self.n_heads,)), decay=False)
        norm = GatedRMSNorm(
            self.d_inner,
            group_size=config.head_dim,
            norm_before_gate=True,
            eps=config.norm_eps,
            axis=heads,
            param_dtype=param_dtype,
        )
        self.norm = norm if config.is_outproj_norm else None
        self.out_proj = linear(self.d_inner, d_model, (heads, "embed"), kernel_init=init.residual(residual_scale))

    def init_state(self, batch_size: int, max_len: int | None = None) -> Mamba3State:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        config, wide = self.config, self.D.dtype
        dtype = self.dtype or self.in_proj.kernel.dtype
        return Mamba3State(
            angle=jnp.zeros((batch_size, self.n_heads, config.n_angles), wide),
            ssm=jnp.zeros((batch_size, self.n_heads, config.head_dim, config.d_state), wide),
            k=jnp.zeros((batch_size, config.rank, self.n_heads, config.d_state), dtype),
            v=jnp.zeros((batch_size, self.n_heads, config.head_dim), dtype),
        )

    def _mix(self, x, state, mask, segment_ids):
        config, wide = self.config, self.D.dtype
        if x.shape[1] == 0:
            empty = jnp.zeros((x.shape[0], 0, self.d_inner), x.dtype)
            return self.out_proj(empty), self.init_state(x.shape[0]) if state is None else state
        z, x, B, C, dt, A, lam, angle = project(self.in_proj, x, self.parts)
        low = x.dtype
        z, x = (rearrange(m, "b l (h p) -> b l h p", h=self.n_heads) for m in (z, x))
        dt = jax.nn.softplus(dt.astype(wide) + self.dt_bias[...])
        A = -jnp.maximum(_RATES[config.A_activation](A.astype(wide)), config.A_floor)
        lam = jax.nn.sigmoid(lam.astype(wide))
        dt = blank(mask, dt)

        turns = 0.5 * jnp.tanh(angle.astype(wide))[:, :, None] * dt[..., None]  # b l h s
        before = None if state is None else state.angle / (2 * math.pi)
        theta = 2 * math.pi * accumulate_turns(turns, before, segment_ids)
        k = self._rotated(B, self.B_norm, self.B_bias, theta).astype(low)
        q = self._rotated(C, self.C_norm, self.C_bias, theta).astype(low)
        v = self._to_ranks(x).astype(low)

        if state is not None and x.shape[1] == 1 and segment_ids is None:
            at_once = (m[:, 0] for m in (v, k, q, dt, A, lam))
            here = None if mask is None else mask[:, 0]
            y, after = trapezoid_step(self._trapezoid_state(state, low), *at_once, self.D[...], mask=here)
            y = y[:, None]
        else:
            y, after = trapezoid(
                *(v, k, q, dt, A, lam, self.D[...]),
                initial_state=None if state is None else self._trapezoid_state(state, low),
                mask=mask,
                segment_ids=segment_ids,
                chunk_size=config.chunk_size,
            )
        previous = jnp.zeros_like(x[:, :1]) if state is None else state.v[:, None]
        last_x = last_inputs(x, previous, mask, segment_ids)[:, 0]
        if state is not None:
            after, last_x = after._replace(k=after.k.astype(state.k.dtype)), last_x.astype(state.v.dtype)
        y = self.out_proj(self._gated(y, z).astype(low))
        return y, Mamba3State(theta[:, -1] % (2 * math.pi), after.h, after.k, last_x)

    def _rotated(self, maps, norm, bias, theta):
        """B or C as projected -> normalised, one for each head, biased and rotated: b l r h n."""
        config = self.config
        maps = rearrange(maps, "b l (r g n) -> b l r g n", r=config.rank, g=config.n_groups)
        maps = norm(maps.astype(theta.dtype))
        maps = cut(jnp.repeat(maps, self.n_heads // config.n_groups, axis=3), 3)
        maps = maps + rearrange(bias[...], "h r n -> r h n")
        return rotate(maps, theta[:, :, None], neighbours=not config.is_mimo)

    def _to_ranks(self, x):
        """b l h p -> b l r h p"""
        if not self.config.is_mimo:
            return x[:, :, None]
        return x[:, :, None] * jnp.swapaxes(self.mimo_x[...], 0, 1)

    def _trapezoid_state(self, state, dtype):
        v = self._to_ranks(state.v[:, None])[:, 0]
        return TrapezoidState(state.ssm, state.k.astype(dtype), v.astype(dtype))

    def _gated(self, y, z):
        """b l r h p -> b l e: normalised and gated, the ranks summed."""
        z = z[:, :, None] * jnp.swapaxes(self.mimo_z[...], 0, 1) if self.config.is_mimo else z[:, :, None]
        if self.norm is None:
            y = y * jax.nn.silu(z)
        else:
            flat = (rearrange(m, "b l r h p -> b l r (h p)") for m in (y, z))
            y = rearrange(self.norm(*flat), "b l r (h p) -> b l r h p", h=self.n_heads)
        if not self.config.is_mimo:
            return rearrange(y, "b l 1 h p -> b l (h p)")
        # A sum, not a product of matrices: einsum would take h and p for batches, and turn y around for it.
        weight = rearrange(self.mimo_o[...], "h r p -> r h p")
        return rearrange(jnp.sum(y * weight, axis=2), "b l h p -> b l (h p)")


def _heavy_tail(x):
    """1 + x above 0, 1 / (1 - x) below: positive, with a slope that is continuous at 0."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


_RATES = {"heavy_tail": _heavy_tail, "softplus": jax.nn.softplus}


def rotate(x: Float[Array, "*b n"], theta: Float[Array, "*#b s"], *, neighbours: bool) -> Float[Array, "*b n"]:
    """Rotates pairs of channels: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos).

    Args:
      x: vectors of even width n.
      theta: angles of the first s of n / 2 pairs, in radians; the others stay.
      neighbours: pairs are (2i, 2i + 1), as in the official single-input kernel; else (i, i + n / 2), as in the
        official multi-input kernel.
    """
    pairs = "... (i two) -> two ... i" if neighbours else "... (two i) -> two ... i"
    one, other = rearrange(x, pairs, two=2)
    still = [(0, 0)] * (theta.ndim - 1) + [(0, one.shape[-1] - theta.shape[-1])]
    cos, sin = jnp.pad(jnp.cos(theta), still, constant_values=1), jnp.pad(jnp.sin(theta), still)
    turned = one * cos - other * sin, one * sin + other * cos
    left, right = pairs.split(" -> ")
    return rearrange(jnp.stack(turned), f"{right} -> {left}")


def accumulate_turns(
    turns: Float[Array, "b l h s"],
    before: Float[Array, "b h s"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    along: Along | None = None,
) -> Float[Array, "b l h s"]:
    """Running sum of `turns` from `before`, or 0, on, less whole turns: -1/2 to 1/2. From 0 where a segment begins.

    Taking whole turns off is exact, so rounding is that of small numbers, however long the sequence. With `along`, of
    a piece of the row; see `ssm.sequence_cut`.
    """
    if along is None and (cut := cut_of(turns)) is not None:

        def of_piece(turns, segment_ids, before, mask, along):
            return accumulate_turns(turns, before, segment_ids, along), ()

        return cut.run(of_piece, {"turns": turns, "segment_ids": segment_ids, "mask": None}, {"before": before})[0]
    if before is not None and along is None:
        turns = turns.at[:, 0].add(before)

    sums = _add_up(turns)
    if segment_ids is not None:
        starts = segment_starts(segment_ids, along)
        start = lax.cummax(jnp.where(starts, jnp.arange(turns.shape[1]), 0), axis=1)[..., None, None]
        earlier = jnp.take_along_axis(jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0))), start, axis=1)
        sums = _wrap(sums - earlier)
    if along is None:
        return sums
    runs = jnp.zeros(turns.shape[:2], int) if segment_ids is None else segment_runs(segment_ids, along)
    given = along.at_first(jnp.zeros_like(sums[:, 0]) if before is None else before.astype(sums.dtype))
    entering = entering_states(along, (runs[:, -1] == 0).astype(sums.dtype), sums[:, -1], given)
    return _wrap(sums + jnp.where((runs == 0)[..., None, None], entering[:, None], 0))


def _wrap(turns):
    return turns - jnp.round(turns)


def _add_up(turns):
    """Running sums of turns (b l h s), less whole turns: all at once inside chunks, then one chunk after the other.

    As fast as all of a row at once, and in a row whose length is not known yet (`jax.export`) as well.
    """
    b, length = turns.shape[:2]
    q = min(TURNS_AT_ONCE, length) if is_known_size(length) else TURNS_AT_ONCE
    c = -(-length // q)
    chunks = jnp.pad(_wrap(turns), ((0, 0), (0, c * q - length), (0, 0), (0, 0))).reshape(b, c, q, *turns.shape[2:])
    sums = lax.associative_scan(lambda one, other: _wrap(one + other), chunks, axis=2)
    last = jnp.moveaxis(sums[:, :, -1], 1, 0)
    _, before = lax.scan(lambda total, chunk: (_wrap(total + chunk), total), jnp.zeros_like(last[0]), last)
    return _wrap(sums + jnp.moveaxis(before, 0, 1)[:, :, None]).reshape(b, c * q, *turns.shape[2:])[:, :length]
