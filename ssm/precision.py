"""How exactly products are taken: decided, not left to the platform, where float32 may mean bfloat16 (TPU) or TF32.

    operations        products of float32 (or wider) operands are float32's on every platform. Those of 16-bit operands
                      multiply as they are, which is exact, and add up in float32. So it is in this package, in m2 and
                      in zoo's attention, pooling, routing and mixing of experts
    states, decays    and step sizes, and all that sums them up or multiplies them with a float32 number: float32
    models' layers    `nnx.Linear` and `nnx.Conv`, the matrices of experts, the vocabulary: JAX's own default, which
                      `jax.default_matmul_precision` changes, and `--train.matmul-precision` in the experiments

In a model of bfloat16 an operation rounds what enters a product (scores after their decay, the state as it is read) to
bfloat16 as its inputs are. RESULTS.md says what that moves.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax


def exact(*operands: Any) -> lax.Precision | None:
    """The `precision` of a product of arrays: HIGHEST where it is one of float32 or wider, None for 16 bits."""
    return lax.Precision.HIGHEST if jnp.result_type(*operands).itemsize >= 4 else None
