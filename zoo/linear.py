"""The linear map of attention and dense channel mixers."""

import jax
from flax import nnx
from flax.typing import Dtype


def linear(
    d_in: int, d_out: int, *, bias: bool = False, scale: float = 1.0, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear map with GPT-2's initial weights, normal(0.02) times `scale`; its bias is exempt from weight decay."""
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        kernel_init=jax.nn.initializers.normal(0.02 * scale),
        dtype=dtype,
        param_dtype=param_dtype,
        bias_metadata={"decay": False},
        rngs=rngs,
    )
