"""The convolution of a few taps over an image in front of a two-dimensional scan: depthwise, tap by tap."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm import init
from ssm.checks import check_shapes


def depthwise_conv2d(
    x: Float[Array, "b r c e"], weight: Float[Array, "m n e"], bias: Float[Array, "e"] | None = None
) -> Float[Array, "b r c e"]:
    """Convolves every channel of an image with its own few taps, centred; beyond the image all is zero.

        y_rc = bias + sum_ij weight_ij x_(r + i - (m-1)//2, c + j - (n-1)//2)

    A sum of shifted products, which the compiler fuses; a convolution of the framework's takes several times as long
    with its gradients, since it makes a small matrix product of each channel.

    Args:
      x: input.
      weight: m x n taps a channel, the first for the place above and to the left.
      bias: added everywhere, or None.

    Returns:
      The output in x's dtype, computed in at least float32.

    Raises:
      ValueError: shapes that disagree.

    Examples:
      >>> y = ssm.depthwise_conv2d(jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1)))
      >>> y[0, :, :, 0].astype(int).tolist()
      [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    """
    sizes = check_shapes(x=(x, "b r c e"), weight=(weight, "m n e"), bias=(bias, "e"))
    m, n, rows, columns = (sizes[name] for name in "mnrc")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x, ((0, 0), ((m - 1) // 2, m // 2), ((n - 1) // 2, n // 2), (0, 0)))
    y = jnp.zeros(x.shape, dtype)
    for i in range(m):
        for j in range(n):
            y = y + padded[:, i : i + rows, j : j + columns] * weight[i, j].astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.astype(x.dtype)


class DepthwiseConv2d(nnx.Module):
    """`depthwise_conv2d` with its parameters, `kernel` (taps, taps, 1, e) as `nnx.Conv` keeps it, and `bias` (e)."""

    def __init__(self, channels: int, taps: int, *, use_bias: bool, param_dtype: Dtype, rngs: nnx.Rngs):
        kernel = init.uniform(1 / taps)(rngs.params(), (taps, taps, 1, channels), param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "inner"))
        bias = jnp.zeros((channels,), param_dtype) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias, decay=False, axes=("inner",))

    def __call__(self, x: Float[Array, "b r c e"]) -> Float[Array, "b r c e"]:
        """Convolves images."""
        return depthwise_conv2d(x, self.kernel[...][:, :, 0], None if self.bias is None else self.bias[...])
