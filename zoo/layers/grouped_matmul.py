"""Blocks of rows, each times the matrix of its group: what a mixture of experts computes.

`jax.lax.ragged_dot` is the same product, but where it is not native (CPU, and GPU by default) it multiplies every row
with every matrix: on a CPU, 16 matrices take 16 times the operations of one.

Axis letters: `c` blocks of `q` rows · `g` groups · `i o` width in, out.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssm.forward_mode import by_hand

Implementation = Literal["blocks", "ragged"]


def grouped_matmul(
    x: Float[Array, "c q i"],
    w: Float[Array, "g i o"],
    group: Int[Array, "c"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "c q o"]:
    """Multiplies each block of rows with its group's matrix.

        y[c] = x[c] w[group[c]]

    Operations are those of the rows: they do not grow with the number of groups.

    Args:
      x: the blocks.
      w: one matrix a group, in x's dtype.
      group: the group of each block, ascending. None: there are as many blocks as groups, and block c is of group c.
        That is one batched product, which devices that hold different groups share without exchanging matrices.
      implementation: "blocks", one block after the other, with gradients by hand (no forward-mode differentiation);
        "ragged", `jax.lax.ragged_dot`. None takes "ragged" where the program is compiled for a TPU, where it is native,
        and "blocks" elsewhere (no forward-mode differentiation).

    Returns:
      y in x's dtype.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(
            f"implementation={implementation!r}, expected None or one of {sorted(get_args(Implementation))}"
        )
    if group is None:
        return jnp.einsum("gqi,gio->gqo", x, w)
    if implementation == "ragged":
        return _ragged_matmul(x, w, group)
    function = _platform_matmul if implementation is None else _block_matmul
    return by_hand(function, "grouped_matmul", "zoo.forward_mode()")(x, w, group)


def _ragged_matmul(x, w, group):
    sizes = x.shape[1] * jnp.zeros(len(w), jnp.int32).at[group].add(1)
    return lax.ragged_dot(x.reshape(-1, x.shape[2]), w, sizes).reshape(*x.shape[:2], w.shape[2])


def _each_block(x, w, group):
    return lax.map(lambda block: block[0] @ w[block[1]], (x, group))


_block_matmul = jax.custom_vjp(_each_block)


def _forward(x, w, group):
    return _each_block(x, w, group), (x, w, group)


def _backward(saved, dy):
    x, w, group = saved
    dtype = jnp.promote_types(w.dtype, jnp.float32)

    # Autodiff would make and add a whole dw for every block; this adds to one matrix of it, in place.
    def step(dw, block):
        x, dy, g = block
        return dw.at[g].add(jnp.matmul(x.T, dy, preferred_element_type=dtype)), dy @ w[g].T

    dw, dx = lax.scan(step, jnp.zeros(w.shape, dtype), (x, dy, group))
    return dx, dw.astype(w.dtype), None


_block_matmul.defvjp(_forward, _backward)


# The choice lies inside the forward and the backward pass, which keep the same for either.
@jax.custom_vjp
def _platform_matmul(x, w, group):
    return lax.platform_dependent(x, w, group, tpu=_ragged_matmul, default=_each_block)


def _platform_forward(x, w, group):
    return _platform_matmul.__wrapped__(x, w, group), (x, w, group)


def _platform_backward(saved, dy):
    def ragged(x, w, group, dy):
        return jax.vjp(lambda x, w: _ragged_matmul(x, w, group), x, w)[1](dy)

    def blocks(x, w, group, dy):
        return _backward((x, w, group), dy)[:2]

    return *lax.platform_dependent(*saved, dy, tpu=ragged, default=blocks), None


_platform_matmul.defvjp(_platform_forward, _platform_backward)
