"""The linear map of attention and dense channel mixers."""

from typing import Literal

import jax
from flax import nnx
from flax.typing import Dtype

from ssm.init import residual
from ssm.linear import rows_dot_general


def linear(
    d_in: int,
    d_out: int,
    *,
    axes: tuple = ("embed", None),
    bias: bool = False,
    scale: float = 1.0,
    init: Literal["normal", "uniform"] = "normal",
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear map from what `axes` says first to what it says last; its bias is exempt from weight decay.

    Its initial weights are `scale` times GPT-2's, normal(0.02), or PyTorch's, uniform within 1 / sqrt(fan_in).
    """
    normal, uniform = jax.nn.initializers.normal(0.02 * scale), residual(scale)
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        kernel_init=normal if init == "normal" else uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_metadata={"axes": axes},
        bias_metadata={"decay": False, "axes": axes[1:]},
        dot_general=rows_dot_general,
        rngs=rngs,
    )
