"""Vision Mamba's mixer: one projection in, one out, and between them a selective state space for each direction.

Source: Zhu et al. 2024, arXiv:2401.09417, algorithm 1; hustvl/Vim, mamba_simple.py with bimamba_type "v2" and
  if_divide_out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.absent import blank
from ssm.bidirectional import both_ways
from ssm.checks import inner_width
from ssm.conv import DepthwiseConv
from ssm.linear import make_linear
from ssm.mamba import MambaConfig, Selective
from ssm.mixer import TwoSided
from ssm.tensor_cut import project


class Direction(Selective):
    """A short causal convolution, then the selective state space of what it gives: what one direction has alone."""

    def __init__(
        self, d_inner: int, dt_rank: int, config: MambaConfig, *, param_dtype: Dtype, rngs: nnx.Rngs, **kwargs
    ):
        self.conv1d = DepthwiseConv(
            d_inner, config.d_conv, use_bias=config.conv_bias, param_dtype=param_dtype, rngs=rngs
        )
        super().__init__(d_inner, dt_rank, config, param_dtype=param_dtype, rngs=rngs, **kwargs)

    def __call__(self, x, z, *, mask=None, segment_ids=None):
        """The gated output at every position, from the zero state."""
        x, _ = self.conv1d(x, mask=mask, segment_ids=segment_ids)
        return self.select(jax.nn.silu(x), z, mask=mask, segment_ids=segment_ids)[0]


class Vim(TwoSided):
    """A selective state space that reads both ways, in 6/5 of Mamba's parameters rather than twice as many.

        x, z = in_proj(u)        y = out_proj((forward(x, z) + flip(backward(flip(x), flip(z)))) / 2)

    Args:
      d_model: width of input and output.
      config: options; see `MambaConfig`.
      causal: must be False: there is no state to go on from.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections and convolution. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, D and the step-size bias are at least float32.
      rngs: source of keys, stream "params".

    Raises:
      ValueError: causal=True.

    Examples:
      >>> ssm.Vim(8, ssm.MambaConfig(d_state=4), rngs=nnx.Rngs(0))(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)
    """

    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: MambaConfig = MambaConfig(),
        *,
        causal: bool = False,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if causal:
            raise ValueError("causal=True: the mixer reads both ways, expected causal=False")
        self.config = config
        d_inner, dt_rank = inner_width(config.expand, d_model), config.dt_rank or math.ceil(d_model / 16)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = make_linear(use_bias=config.bias, **options)
        self.in_proj = linear(d_model, 2 * d_inner, ("embed", "side by side"))
        self.forward = Direction(d_inner, dt_rank, config, **options)
        self.backward = Direction(d_inner, dt_rank, config, **options)
        self.out_proj = linear(d_inner, d_model, ("inner", "embed"), kernel_init=init.residual(residual_scale))

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: input.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
        """
        width = self.out_proj.in_features
        x, z = project(self.in_proj, blank(mask, x), [(width, width)] * 2)  # b l e
        positions = {"mask": mask, "segment_ids": segment_ids}
        return self.out_proj(both_ways(self.forward, self.backward, x, z, mirrors=True, **positions))
