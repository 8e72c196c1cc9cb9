"""The normalisations of models: they compute in at least float32 and leave the cast to the next projection."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` whose gradient is one term of the residual stream's.

    Without an axis of its own x is read three times beside the residual, and the last of the four sums of gradients
    takes a number for each position: that XLA:CPU makes again wherever it is read, together with all those of later
    blocks, so that the cost of the backward pass grows with the square of the depth.
    """

    def __call__(self, x, *, mask=None):
        """Normalises the last axis."""
        return super().__call__(x[None], mask=mask)[0]


def norm(
    width: int,
    kind: Literal["rms", "layer"] = "rms",
    *,
    epsilon: float,
    bias: bool = True,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.RMSNorm | LayerNorm:
    """Normalises the last axis. Its parameters are exempt from weight decay and kept in at least float32.

    Args:
      width: of the last axis.
      kind: "rms", or "layer", which takes the mean away.
      epsilon: added to the variance.
      bias: whether "layer" has one.
      param_dtype: of the model's other parameters.
      rngs: not drawn from: scales are ones and biases zeros.
    """
    no_decay = {"decay": False, "axes": (None,)}
    options: dict[str, Any] = {
        "epsilon": epsilon,
        "param_dtype": jnp.promote_types(param_dtype, jnp.float32),
        "use_fast_variance": False,
        "scale_metadata": no_decay,
        "rngs": rngs,
    }
    if kind == "rms":
        return nnx.RMSNorm(width, **options)
    return LayerNorm(width, use_bias=bias, bias_metadata=no_decay, **options)
