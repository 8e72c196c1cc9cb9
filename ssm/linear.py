"""The linear map of state-space mixers: PyTorch's initial weights, biases exempt from weight decay."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype
from jax import lax

from ssm import init
from ssm.sequence_cut import is_cut


def rows_dot_general(x, kernel, dimension_numbers, **options):
    """`lax.dot_general` of vectors (..., d) and a kernel (d, o) as one product of two matrices, for `nnx.Linear`.

    The gradient in the kernel is then one product, too. Over several axes at once XLA's is half as fast on a CPU: it
    turns both factors around first. Positions that are cut over devices stay an axis: rows of pieces are not one piece.
    """
    if x.ndim == 2 or options.get("out_sharding") is not None or is_cut():
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    return lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options).reshape(*x.shape[:-1], kernel.shape[1])


def make_linear(
    *, use_bias: bool, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
) -> Callable[..., nnx.Linear]:
    """What the linear maps of a mixer share: `linear(d_in, d_out, axes)` makes one, and takes `nnx.Linear`'s options.

    `axes` says what its input and its output are along, for devices to be shared out: `axes` of its parameters.
    """

    def linear(d_in: int, d_out: int, axes: tuple, **options) -> nnx.Linear:
        shared: dict[str, Any] = {
            "use_bias": use_bias,
            "kernel_init": init.uniform_fan_in,
            "bias_init": jax.nn.initializers.zeros,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "kernel_metadata": {"axes": axes},
            "bias_metadata": {"decay": False, "axes": axes[1:]},
            "dot_general": rows_dot_general,
            "rngs": rngs,
        }
        return nnx.Linear(d_in, d_out, **shared | options)

    return linear
