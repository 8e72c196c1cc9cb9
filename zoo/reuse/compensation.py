"""What is lost of a map's weights, made up for in those that are left: least squares under the inputs' second moments.

    cost of a change D of the weights:  tr(D^T H D)        H = mean of x x^T, see `calibration`

Source: Hassibi & Stork 1993, Second order derivatives for network pruning (the formulas); Frantar & Alistarh 2022,
arXiv:2208.11580, section 4, and Frantar et al. 2022, arXiv:2210.17323, Algorithm 1 (in order, by a Cholesky factor);
Kurtic et al. 2023, arXiv:2302.04089, section 3.1 (groups of inputs that go together).

Axes: i inputs, o outputs, j inputs that are kept, k groups, q inputs of a group.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

DAMPING = 0.01
"""Added to the diagonal of H, times its mean: moments of few inputs are singular."""


def cost(change: Float[Array, "*b i o"], moment: Float[Array, "*b i i"]) -> Float[Array, "*b"]:
    """tr(D^T H D): the mean squared change of the map's output, summed over outputs."""
    exact = lax.Precision.HIGHEST
    return jnp.einsum("...io,...ij,...jo->...", change, moment, change, precision=exact)


def refit(weight: Float[Array, "i o"], moment: Float[Array, "i i"], kept: Int[np.ndarray, "j"]) -> Float[Array, "j o"]:
    """The weights of the inputs that are kept by which the map's output changes least, in the mean over what it reads.

        W' = H_KK^-1 H_K W

    Args:
      weight: W.
      moment: H, of the inputs. Of inputs that follow from those that are kept nothing is lost.
      kept: K, which inputs are.
    """
    W, H = (np.asarray(x, np.float64) for x in (weight, moment))
    damping = 1e-7 * np.mean(np.diagonal(H)) + np.finfo(np.float64).tiny
    within = H[np.ix_(kept, kept)] + damping * np.eye(len(kept))
    # Damping would pull weights to zero: it pulls them to where they are instead.
    aimed = H[kept] @ W + damping * W[kept]
    return jnp.asarray(np.linalg.solve(within, aimed), weight.dtype)


@functools.partial(jax.jit, static_argnames=("levels", "group_size"))
def round_in_order(
    weight: Float[Array, "i o"], moment: Float[Array, "i i"], *, levels: int, group_size: int
) -> tuple[Int[Array, "k q o"], Float[Array, "k 1 o"]]:
    """(codes, scales): inputs are rounded one after the other, and those that come after make up for what each lost.

    Args:
      weight: W.
      moment: H, damped here by `DAMPING`.
      levels: largest code; the largest weight of a group has it, as the group is when its turn comes. 0: codes are
        signs, and the scale is the mean size.
      group_size: q inputs share a scale, for each output. The last group is filled up with zeros.
    """
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    d_out, missing = weight.shape[1], -weight.shape[0] % group_size
    H = jnp.pad(moment.astype(wide), ((0, missing),) * 2)
    dead = jnp.diagonal(H) == 0
    H += jnp.diag(jnp.where(dead, 1, DAMPING * jnp.mean(jnp.diagonal(moment))))
    # Row t of the upper factor, over its diagonal: what the inputs after t take over of a loss at t.
    factor = jnp.linalg.cholesky(jnp.linalg.inv(H)).T
    shares = factor / jnp.diagonal(factor)[:, None]

    def group(g, carry):
        W, codes, scales = carry
        sizes = jnp.abs(lax.dynamic_slice_in_dim(W, g * group_size, group_size))
        if levels:
            largest = jnp.max(sizes, axis=0)
            scale = jnp.where(largest == 0, 1, largest / levels)
        else:
            scale = jnp.sum(sizes, axis=0) / jnp.minimum(group_size, weight.shape[0] - g * group_size)

        def one(t, carry):
            W, codes = carry
            code = jnp.clip(jnp.round(W[t] / scale), -levels, levels) if levels else jnp.where(W[t] < 0, -1.0, 1.0)
            lost = W[t] - code * scale
            after = jnp.where(jnp.arange(len(W)) > t, shares[t], 0)
            return W - after[:, None] * lost, codes.at[t].set(code.astype(jnp.int8))

        W, codes = lax.fori_loop(g * group_size, (g + 1) * group_size, one, (W, codes))
        return W, codes, scales.at[g].set(scale)

    W = jnp.pad(weight.astype(wide), ((0, missing), (0, 0)))
    n_groups = len(W) // group_size
    start = W, jnp.zeros(W.shape, jnp.int8), jnp.zeros((n_groups, d_out), wide)
    _, codes, scales = lax.fori_loop(0, n_groups, group, start)
    return codes.reshape(n_groups, group_size, d_out), scales[:, None]
