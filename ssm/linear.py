"""The linear map of state-space mixers: PyTorch's initial weights, biases exempt from weight decay."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from flax.typing import Dtype

from ssm import init


def make_linear(
    *, use_bias: bool, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
) -> Callable[..., nnx.Linear]:
    """What the linear maps of a mixer share: `linear(d_in, d_out)` makes one, and takes `nnx.Linear`'s options."""
    return functools.partial(
        nnx.Linear,
        use_bias=use_bias,
        kernel_init=init.uniform_fan_in,
        bias_init=jax.nn.initializers.zeros,
        dtype=dtype,
        param_dtype=param_dtype,
        bias_metadata={"decay": False},
        rngs=rngs,
    )
