"""The two-dimensional selective scan: an image is read in several orders, each with a state space of its own.

Source: Liu et al. 2024, arXiv:2401.10166, section 4.2 and figure 3; MzeroMiko/VMamba, vmamba.py, `SS2D` with
  forward_type "v05_noz".
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.checks import inner_width
from ssm.conv2d import DepthwiseConv2d
from ssm.linear import make_linear
from ssm.mamba import MambaConfig, Selective
from ssm.mixer import TwoSided
from ssm.scan_order import ScanOrder, merge_scans, scan_image, scan_order
from ssm.sequence_cut import lay, whole_rows


@dataclasses.dataclass(frozen=True)
class SS2DConfig(MambaConfig):
    """Options of the two-dimensional selective scan. The defaults are VMamba's, but for its state size of 1.

    Examples:
      >>> ssm.SS2DConfig().scan
      'cross'
    """

    d_conv: int = 3
    """Taps to a side of the convolution over the image."""
    conv_bias: bool = False
    """Whether that convolution has a bias."""
    scan: ScanOrder = "cross"
    """Orders in which the image is read: "raster", "bidirectional", "cross" or "hilbert"."""

    def __post_init__(self):
        super().__post_init__()
        scan_order(self.scan, (1, 1))


class SS2D(TwoSided):
    """Reads an image in several orders at once, and adds up what they say of each place.

        y = out_proj(norm(merge(selective scan of each order of silu(conv(in_proj(x))))))

    Args:
      d_model: width of input and output.
      config: options; see `SS2DConfig`.
      causal: must be False.
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of projections and convolution. None: that of the parameters and the input.
      param_dtype: dtype that parameters are kept in. A_log, D, the step-size bias and the norm are at least float32.
      rngs: source of keys, stream "params".

    Raises:
      ValueError: causal=True.

    Examples:
      >>> mixer = ssm.SS2D(8, ssm.SS2DConfig(d_state=4), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 12, 8)), grid=(3, 4)).shape
      (2, 12, 8)
    """

    needs = ("grid",)
    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: SS2DConfig = SS2DConfig(),
        *,
        causal: bool = False,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if causal:
            raise ValueError("causal=True: the mixer reads an image from every side, expected causal=False")
        self.config = config
        d_inner, dt_rank = inner_width(config.expand, d_model), config.dt_rank or math.ceil(d_model / 16)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = make_linear(use_bias=config.bias, **options)
        self.in_proj = linear(d_model, d_inner, ("embed", "inner"))
        self.conv2d = DepthwiseConv2d(
            d_inner, config.d_conv, use_bias=config.conv_bias, param_dtype=param_dtype, rngs=rngs
        )
        orders = range(len(scan_order(config.scan, (1, 1))))
        self.directions = nnx.List([Selective(d_inner, dt_rank, config, **options) for _ in orders])
        no_decay = {"decay": False, "axes": ("inner",)}
        self.norm = nnx.LayerNorm(
            d_inner,
            epsilon=1e-5,
            param_dtype=jnp.promote_types(param_dtype, jnp.float32),
            use_fast_variance=False,
            scale_metadata=no_decay,
            bias_metadata=no_decay,
            rngs=rngs,
        )
        self.out_proj = linear(d_inner, d_model, ("inner", "embed"), kernel_init=init.residual(residual_scale))

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        grid: tuple[int, int],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole images.

        Args:
          x: input, a vector for each place, row by row.
          grid: rows and columns.
          mask, segment_ids: must be None: an image has neither padding nor neighbours.

        Raises:
          ValueError: a mask or segments, or a grid of another number of places.
        """
        if mask is not None or segment_ids is not None:
            raise ValueError("a two-dimensional scan reads whole images, expected neither mask nor segment_ids")
        b, length, _ = x.shape
        if grid[0] * grid[1] != length:
            raise ValueError(f"grid={grid} of {grid[0] * grid[1]} places, expected {length}, the length of x")
        # Rows of an image are no pieces of its places: where these are cut over devices, the channels are instead.
        x = lay(self.in_proj(x), 2)
        with whole_rows():
            x = jax.nn.silu(self.conv2d(x.reshape(b, *grid, x.shape[-1]))).reshape(x.shape)
            sequences = scan_image(x, self.config.scan, grid)
            outputs = [direction.select(sequences[:, s])[0] for s, direction in enumerate(self.directions)]
            wide = jnp.promote_types(x.dtype, jnp.float32)
            y = merge_scans(jnp.stack(outputs, axis=1).astype(wide), self.config.scan, grid)
            y = self.norm(lay(y, 2)).astype(x.dtype)
        return lay(self.out_proj(y), 1)
