"""The normalisations of models: they compute in at least float32 and leave the cast to the next projection."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype


def norm(
    width: int,
    kind: Literal["rms", "layer"] = "rms",
    *,
    epsilon: float,
    bias: bool = True,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.RMSNorm | nnx.LayerNorm:
    """Normalises the last axis. Its parameters are exempt from weight decay and kept in at least float32.

    Args:
      width: of the last axis.
      kind: "rms", or "layer", which takes the mean away.
      epsilon: added to the variance.
      bias: whether "layer" has one.
      param_dtype: of the model's other parameters.
      rngs: not drawn from: scales are ones and biases zeros.
    """
    no_decay = {"decay": False}
    options: dict[str, Any] = {
        "epsilon": epsilon,
        "param_dtype": jnp.promote_types(param_dtype, jnp.float32),
        "use_fast_variance": False,
        "scale_metadata": no_decay,
        "rngs": rngs,
    }
    if kind == "rms":
        return nnx.RMSNorm(width, **options)
    return nnx.LayerNorm(width, use_bias=bias, bias_metadata=no_decay, **options)
