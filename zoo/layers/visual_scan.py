"""ML-Mamba's visual selective scan: patches read one another in several orders before a language model reads them."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm import Mamba2, Mamba2Config
from ssm.checks import inner_width
from ssm.scan_order import merge_scans, scan_image, scan_order
from zoo.layers.mlp import MLP, MLPConfig
from zoo.layers.norm import norm


class VisualScan(nnx.Module):
    """A Mamba-2 for each order over an image, what they say of each place added up; SwiGLU may follow.

        h = x + merge(Mamba-2 of each order of norm(x))        y = h + SwiGLU(norm(h))

    The residuals and norms are those of every block here; the paper's figure has none.

    Args:
      d_model: width of input and output.
      orders: bidirectional: row by row and back. cross: column by column and back as well.
      config: options of the state spaces; their head_dim becomes the largest divisor of the inner width up to it.
      gated: whether SwiGLU follows.
      dtype: of the computation.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params".

    Source: Huang & Hu 2024, arXiv:2407.19832, section 3.3 (MVSS with BSM and CSM).
    """

    def __init__(
        self,
        d_model: int,
        orders: Literal["bidirectional", "cross"] = "bidirectional",
        config: Mamba2Config = Mamba2Config(),
        gated: bool = False,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.orders = orders
        inner = config.d_ssm or inner_width(config.expand, d_model)
        head_dim = max(n for n in range(1, config.head_dim + 1) if inner % n == 0)
        config = dataclasses.replace(config, head_dim=head_dim, n_groups=math.gcd(config.n_groups, inner // head_dim))
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.directions = nnx.List([Mamba2(d_model, config, **options) for _ in scan_order(orders, (1, 1))])
        norms: dict[str, Any] = {"epsilon": 1e-5, "bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = norm(d_model, "rms", **norms)
        self.norm2 = norm(d_model, "rms", **norms) if gated else None
        self.mlp = MLP(d_model, MLPConfig(gated=True), **options) if gated else None

    def __call__(self, x: Float[Array, "b l d"], grid: tuple[int, int]) -> Float[Array, "b l d"]:
        """Mixes the patches of images, row by row in x."""
        scans = scan_image(self.norm(x), self.orders, grid)  # b s l d
        y = jnp.stack([mixer(scans[:, i]) for i, mixer in enumerate(self.directions)], axis=1)
        x = x + merge_scans(y, self.orders, grid).astype(x.dtype)
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.mlp(self.norm2(x)).astype(x.dtype)
