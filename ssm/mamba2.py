"""The Mamba-2 mixer: one projection, a short convolution, the state-space dual, a gated normalisation.

Source: Dao & Gu 2024, arXiv:2405.21060, section 7 and figure 6; mamba_ssm/modules/mamba2.py.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm import init
from ssm.absent import blank
from ssm.checks import at_least, check_dt_range, count_heads, inner_width
from ssm.conv import DepthwiseConv
from ssm.linear import make_linear
from ssm.mixer import Mixer
from ssm.norm import GatedRMSNorm
from ssm.serialization import serializable
from ssm.ssd import ssd, ssd_step
from ssm.tensor_cut import convolve, project


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Options of the Mamba-2 mixer. The defaults are those of the published models.

    Examples:
      >>> ssm.Mamba2(16, ssm.Mamba2Config(d_state=8, head_dim=8), rngs=nnx.Rngs(0)).A_log.shape  # expand 16 / 8 heads
      (4,)
    """

    d_state: int = 128
    """State size n of each channel."""
    d_conv: int = 4
    """Taps of the short convolution."""
    expand: float = 2.0
    """Inner width, as a multiple of d_model."""
    head_dim: int = 64
    """Channels of a head, which share one decay."""
    n_groups: int = 1
    """Groups of heads; each group has its own B and C."""
    d_ssm: int | None = None
    """Inner channels that go through the state space; the others are a gated unit beside it. None: all."""
    rmsnorm: bool = True
    """Whether the output is normalised, in n_groups groups."""
    norm_before_gate: bool = False
    """Whether the normalisation comes before the gate instead of after it."""
    norm_eps: float = 1e-5
    """Added to the mean square in the normalisation."""
    A_min: float = 1.0
    """Smallest initial decay rate -A."""
    A_max: float = 16.0
    """Largest initial decay rate -A."""
    D_has_hdim: bool = False
    """Whether the skip has a weight for each channel instead of one a head."""
    dt_min: float = 0.001
    """Smallest initial step size."""
    dt_max: float = 0.1
    """Largest initial step size."""
    dt_floor: float = 1e-4
    """Initial step sizes are not below this."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Step sizes are clipped to this range, in every pass."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    conv_init: float | None = None
    """Bound of the short convolution's initial weights. None: 1 / sqrt(d_conv)."""
    bias: bool = False
    """Whether the input and output projections have biases."""
    out_bias: bool | None = None
    """Whether the output projection has one. None: as `bias` says."""
    in_multiplier: float = 1.0
    """Multiplies the input, as maximal-update parametrisation may ask for (Falcon-H1)."""
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Multiply the parts of the input projection: z, x, B, C, dt."""
    out_multiplier: float = 1.0
    """Multiplies the output."""
    chunk_size: int | None = None
    """Positions a chunk of the state-space dual. None: what suits the platform."""

    def __post_init__(self):
        at_least(1, d_state=self.d_state, d_conv=self.d_conv, head_dim=self.head_dim, n_groups=self.n_groups)
        check_dt_range(self.dt_min, self.dt_max)
        if not 0 < self.A_min <= self.A_max:
            raise ValueError(f"A_min={self.A_min} and A_max={self.A_max}, expected 0 < A_min <= A_max")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"dt_limit={self.dt_limit}, expected 0 <= lowest <= highest")


@serializable("ssm.Mamba2State")
class Mamba2State(NamedTuple):
    """What one Mamba-2 mixer carries from one call to the next; its size does not depend on the length.

    Examples:
      >>> mixer = ssm.Mamba2(16, ssm.Mamba2Config(d_state=8, head_dim=8), rngs=nnx.Rngs(0))
      >>> jax.tree.map(jnp.shape, mixer.init_state(1))
      Mamba2State(conv=(1, 3, 48), ssm=(1, 4, 8, 8))
    """

    conv: Float[Array, "b t e"]
    """The last d_conv - 1 inputs (x, B, C) of the short convolution, oldest first."""
    ssm: Float[Array, "b h p n"]
    """The state space's state, at least float32."""


class Mamba2(Mixer):
    """Mamba-2 mixer: sequence in, sequence out, linear in the length.

    Args:
      d_model: width of input and output.
      config: options; see `Mamba2Config`.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections and convolution. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, D and dt_bias are at least float32.
      rngs: source of keys, stream "params".

    Weight decay leaves out every parameter marked `decay=False`: A_log, D, dt_bias, the norm and the biases.

    Raises:
      ValueError: widths that head_dim or n_groups do not divide.

    Examples:
      >>> mixer = ssm.Mamba2(16, ssm.Mamba2Config(d_state=8, head_dim=8), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)
    """

    runs_cut = mirrors = carries = True

    def __init__(
        self,
        d_model: int,
        config: Mamba2Config = Mamba2Config(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.d_inner = inner_width(config.expand, d_model)
        self.d_ssm = self.d_inner if config.d_ssm is None else config.d_ssm
        named = f"the width of the state space, {self.d_ssm} of expand * d_model = {self.d_inner}"
        self.n_heads = count_heads(self.d_ssm, config.head_dim, config.n_groups, most=self.d_inner, named=named)
        state_dtype = jnp.promote_types(param_dtype, jnp.float32)
        heads = ("heads", self.n_heads)  # channels, those of a head side by side
        bc = config.n_groups * config.d_state
        d_mlp = self.d_inner - self.d_ssm
        # z0 and x0 are the gated unit beside the state space; x, B and C go through the convolution together.
        inner = self.d_ssm, self.n_heads
        self.convolved = inner, (bc, config.n_groups), (bc, config.n_groups)
        self.parts = *((d_mlp, max(1, d_mlp)),) * 2, inner, self.convolved, (self.n_heads, self.n_heads)

        linear = make_linear(use_bias=config.bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_proj = linear(d_model, 2 * (d_mlp + self.d_ssm + bc) + self.n_heads, ("embed", "side by side"))
        self.conv1d = DepthwiseConv(
            self.d_ssm + 2 * bc,
            config.d_conv,
            use_bias=config.conv_bias,
            axis="side by side",
            kernel_bound=config.conv_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        dt_bias = init.dt_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = nnx.Param(dt_bias(rngs.params(), (self.n_heads,), state_dtype), decay=False, axes=("heads",))
        A_log = init.A_log(config.A_min, config.A_max)
        self.A_log = nnx.Param(A_log(rngs.params(), (self.n_heads,), state_dtype), decay=False, axes=("heads",))
        D = jnp.ones((self.d_ssm if config.D_has_hdim else self.n_heads,), state_dtype)
        self.D = nnx.Param(D, decay=False, axes=(heads,))
        norm = GatedRMSNorm(
            self.d_ssm,
            group_size=self.d_ssm // config.n_groups,
            norm_before_gate=config.norm_before_gate,
            eps=config.norm_eps,
            axis=heads,
            param_dtype=param_dtype,
        )
        self.norm = norm if config.rmsnorm else None
        out_bias = config.bias if config.out_bias is None else config.out_bias
        entry = "side by side" if d_mlp else heads
        self.out_proj = linear(
            self.d_inner, d_model, (entry, "embed"), use_bias=out_bias, kernel_init=init.residual(residual_scale)
        )

    def init_state(self, batch_size: int, max_len: int | None = None) -> Mamba2State:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        dtype = self.dtype or self.in_proj.kernel.dtype
        return Mamba2State(
            conv=jnp.zeros((batch_size, self.config.d_conv - 1, self.conv1d.kernel.shape[0]), dtype),
            ssm=jnp.zeros((batch_size, self.n_heads, self.config.head_dim, self.config.d_state), self.A_log.dtype),
        )

    def _mix(self, x, state, mask, segment_ids):
        config = self.config
        conv_state, ssm_state = (None, None) if state is None else state
        x = x if config.in_multiplier == 1 else x * config.in_multiplier
        scale = None if config.multipliers == (1.0,) * 5 else self._multipliers(jnp.promote_types(x.dtype, jnp.float32))
        z0, x0, z, xBC, dt = project(self.in_proj, x, self.parts, scale)
        positions = {"mask": mask, "segment_ids": segment_ids}
        convolved, conv_state = convolve(self.conv1d, xBC, conv_state, self.convolved, **positions)
        x, B, C = (jax.nn.silu(m) for m in convolved)
        x = rearrange(x, "b l (h p) -> b l h p", p=config.head_dim)
        B, C = (rearrange(m, "b l (g n) -> b l g n", g=config.n_groups) for m in (B, C))
        dt = jax.nn.softplus(dt.astype(self.dt_bias.dtype) + self.dt_bias[...])
        if config.dt_limit != (0.0, math.inf):
            dt = jnp.clip(dt, *config.dt_limit)
        A, D = -jnp.exp(self.A_log[...]), self.D[...]
        if config.D_has_hdim:
            D = D.reshape(self.n_heads, config.head_dim)

        if ssm_state is not None and x.shape[1] == 1 and segment_ids is None:
            dt = blank(mask, dt)
            y, ssm_state = ssd_step(ssm_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
            y = y[:, None]
        else:
            y, ssm_state = ssd(x, dt, A, B, C, D, initial_state=ssm_state, chunk_size=config.chunk_size, **positions)
        y = rearrange(y, "b l h p -> b l (h p)")
        y = y * jax.nn.silu(z) if self.norm is None else self.norm(y, z)
        if z0.shape[-1]:
            y = jnp.concatenate([jax.nn.silu(z0) * x0, y], axis=-1)
        y = self.out_proj(y)
        return y if config.out_multiplier == 1 else y * config.out_multiplier, Mamba2State(conv_state, ssm_state)

    def _multipliers(self, dtype):
        """The multiplier of each channel of the input projection; the gated unit's are those of z and x."""
        z, x, B, C, dt = self.config.multipliers
        d_mlp, bc = self.parts[0][0], self.config.n_groups * self.config.d_state
        widths = (d_mlp, d_mlp, self.d_ssm, self.d_ssm, bc, bc, self.n_heads)
        return jnp.repeat(jnp.asarray((z, x, z, x, B, C, dt), dtype), np.array(widths), total_repeat_length=sum(widths))
