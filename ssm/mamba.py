"""The Mamba mixer (Mamba-1): projection, short convolution, selective scan, gate.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4 and figure 3; mamba_ssm/modules/mamba_simple.py.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.absent import blank
from ssm.checks import at_least, check_dt_range, inner_width
from ssm.conv import DepthwiseConv
from ssm.linear import make_linear
from ssm.mixer import Mixer
from ssm.norm import GatedRMSNorm, rms_norm
from ssm.scan import Implementation, selective_scan, selective_step
from ssm.serialization import serializable
from ssm.tensor_cut import project


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Options of the Mamba mixer. The defaults are those of the published models.

    Examples:
      >>> ssm.Mamba(16, ssm.MambaConfig(d_state=4), rngs=nnx.Rngs(0)).A_log.shape
      (32, 4)
    """

    d_state: int = 16
    """State size n of each channel."""
    d_conv: int = 4
    """Taps of the short convolution."""
    expand: float = 2.0
    """Inner width, as a multiple of d_model."""
    dt_rank: int | None = None
    """Rank of the step-size projection. None: d_model / 16, rounded up."""
    dt_min: float = 0.001
    """Smallest initial step size."""
    dt_max: float = 0.1
    """Largest initial step size."""
    dt_floor: float = 1e-4
    """Initial step sizes are not below this."""
    dt_scale: float = 1.0
    """Scale of the step-size projection's initial weights."""
    dt_init: str = "random"
    """Step-size projection at the start: "random" or "constant"."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    bias: bool = False
    """Whether the input and output projections have biases."""
    bcdt_rms: bool = False
    """Whether B, C and the low-rank step size are normalised, as in Falcon-Mamba."""
    bcdt_rms_eps: float = 1e-6
    """Added to the mean square in that normalisation."""
    bcdt_rms_weight: bool = False
    """Whether that normalisation has weights, as in Jamba."""
    chunk_size: int | None = None
    """Positions a chunk of the scan. None: what suits the platform."""
    implementation: Implementation | None = None
    """How positions run inside a chunk: "sequential", "associative", or None for what suits the platform."""

    def __post_init__(self):
        at_least(1, d_state=self.d_state, d_conv=self.d_conv)
        if self.expand <= 0:
            raise ValueError(f"expand={self.expand}, expected more than 0")
        if self.dt_rank is not None and self.dt_rank < 1:
            raise ValueError(f"dt_rank={self.dt_rank}, expected None or at least 1")
        check_dt_range(self.dt_min, self.dt_max)
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init={self.dt_init!r}, expected 'random' or 'constant'")
        if self.bcdt_rms_weight and not self.bcdt_rms:
            raise ValueError("bcdt_rms_weight=True, expected bcdt_rms=True: there is no normalisation")


@serializable("ssm.MambaState")
class MambaState(NamedTuple):
    """What one Mamba mixer carries from one call to the next; its size does not depend on the length.

    Examples:
      >>> jax.tree.map(jnp.shape, ssm.Mamba(8, rngs=nnx.Rngs(0)).init_state(1))
      MambaState(conv=(1, 3, 16), ssm=(1, 16, 16))
    """

    conv: Float[Array, "b t e"]
    """The last d_conv - 1 inputs of the short convolution, oldest first."""
    ssm: Float[Array, "b e n"]
    """The state space's state, at least float32."""


class Selective(nnx.Module):
    """The selective state space of Mamba-1 and the projections that make its step sizes, B and C from its input.

    Args:
      d_inner: channels.
      dt_rank: rank of the step-size projection.
      config: options; see `MambaConfig`.
      dtype: dtype of the projections. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, D and the step-size bias are at least float32.
      rngs: source of keys, stream "params".

    Source: Gu & Dao 2023, arXiv:2312.00752, Algorithm 2.
    """

    def __init__(
        self,
        d_inner: int,
        dt_rank: int,
        config: MambaConfig,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.d_inner = d_inner
        self.dt_rank = dt_rank
        state_dtype = jnp.promote_types(param_dtype, jnp.float32)
        linear = make_linear(use_bias=config.bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dt_bound = config.dt_scale * self.dt_rank**-0.5
        constant = jax.nn.initializers.constant(dt_bound)
        self.x_proj = linear(self.d_inner, self.dt_rank + 2 * config.d_state, ("inner", None), use_bias=False)
        self.dt_proj = linear(
            self.dt_rank,
            self.d_inner,
            (None, "inner"),
            kernel_init=init.uniform(dt_bound) if config.dt_init == "random" else constant,
            use_bias=True,
            bias_init=lambda key, shape, _: init.dt_bias(config.dt_min, config.dt_max, config.dt_floor)(
                key, shape, state_dtype
            ),
        )
        A_log = init.real_A_log(self.d_inner, config.d_state).astype(state_dtype)
        self.A_log = nnx.Param(A_log, decay=False, axes=("inner", None))
        self.D = nnx.Param(jnp.ones((self.d_inner,), state_dtype), decay=False, axes=("inner",))
        norm = functools.partial(GatedRMSNorm, eps=config.bcdt_rms_eps, param_dtype=param_dtype)
        self.dt_norm = norm(self.dt_rank) if config.bcdt_rms_weight else None
        self.B_norm = norm(config.d_state) if config.bcdt_rms_weight else None
        self.C_norm = norm(config.d_state) if config.bcdt_rms_weight else None

    def select(
        self,
        x: Float[Array, "b l e"],
        z: Float[Array, "b l e"] | None = None,
        state: Float[Array, "b e n"] | None = None,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l e"], Float[Array, "b e n"]]:
        """`selective_scan` of x with what its projections say, gated by silu(z) where z is given, and the state after.

        Args:
          x: input, behind convolution and non-linearity.
          z: gate, or None for none.
          state: the state before the first position, or None for zeros.
          mask: False where a position is not there.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        sizes = (self.dt_rank, self.dt_rank + self.config.d_state)
        low_rank_dt, B, C = jnp.split(self.x_proj(x), sizes, axis=-1)
        if self.config.bcdt_rms:
            norms = (self.dt_norm, self.B_norm, self.C_norm)
            low_rank_dt, B, C = (
                rms_norm(m, eps=self.config.bcdt_rms_eps).astype(m.dtype) if norm is None else norm(m)
                for m, norm in zip((low_rank_dt, B, C), norms, strict=True)
            )
        # The bias joins in float32: near -4.6 (a step of 0.01), bfloat16 would move the step by 1-2 %.
        delta = low_rank_dt @ self.dt_proj.kernel[...].astype(low_rank_dt.dtype)
        bias: Any = self.dt_proj.bias
        delta = jax.nn.softplus(delta.astype(self.A_log.dtype) + bias[...])
        A = -jnp.exp(self.A_log[...])

        if state is not None and x.shape[1] == 1 and segment_ids is None:
            delta = blank(mask, delta)
            gate = None if z is None else z[:, 0]
            one, state = selective_step(state, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D[...], gate)
            y = one[:, None]
        else:
            y, state = selective_scan(
                x,
                delta,
                A,
                B,
                C,
                self.D[...],
                z,
                initial_state=state,
                mask=mask,
                segment_ids=segment_ids,
                chunk_size=self.config.chunk_size,
                implementation=self.config.implementation,
            )
        return y, state


class Mamba(Selective, Mixer):
    """Selective state-space mixer: sequence in, sequence out, linear in the length.

    Args:
      d_model: width of input and output.
      config: options; see `MambaConfig`.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections and convolution. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, D and the step-size bias are at least float32.
      rngs: source of keys, stream "params".

    Weight decay leaves out every parameter marked `decay=False`: A_log, D and the biases.

    Examples:
      >>> mixer = ssm.Mamba(16, rngs=nnx.Rngs(0))
      >>> y, state = mixer.extend(jnp.ones((2, 10, 16)), mixer.init_state(2))  # mixer(x) goes on from nothing
      >>> y.shape
      (2, 10, 16)
    """

    runs_cut = mirrors = carries = True

    def __init__(
        self,
        d_model: int,
        config: MambaConfig = MambaConfig(),
        *,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        d_inner = inner_width(config.expand, d_model)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = make_linear(use_bias=config.bias, **options)
        self.in_proj = linear(d_model, 2 * d_inner, ("embed", "side by side"))
        self.conv1d = DepthwiseConv(
            d_inner, config.d_conv, use_bias=config.conv_bias, param_dtype=param_dtype, rngs=rngs
        )
        super().__init__(d_inner, config.dt_rank or math.ceil(d_model / 16), config, **options)
        self.out_proj = linear(d_inner, d_model, ("inner", "embed"), kernel_init=init.residual(residual_scale))

    def init_state(self, batch_size: int, max_len: int | None = None) -> MambaState:
        """The state before the first position. `max_len` is accepted as every mixer does and changes nothing."""
        dtype = self.dtype or self.in_proj.kernel.dtype
        return MambaState(
            conv=jnp.zeros((batch_size, self.config.d_conv - 1, self.d_inner), dtype),
            ssm=jnp.zeros((batch_size, self.d_inner, self.config.d_state), self.A_log.dtype),
        )

    def _mix(self, x, state, mask, segment_ids):
        conv_state, ssm_state = (None, None) if state is None else state
        x, z = project(self.in_proj, x, [(self.d_inner, self.d_inner)] * 2)  # b l e
        x, conv_state = self.conv1d(x, conv_state, mask=mask, segment_ids=segment_ids)
        y, ssm_state = self.select(jax.nn.silu(x), z, ssm_state, mask=mask, segment_ids=segment_ids)
        return self.out_proj(y), MambaState(conv_state, ssm_state)
