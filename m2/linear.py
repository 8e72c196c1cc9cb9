"""Linear maps whose weight is structured: one block-diagonal factor, or the two of a Monarch matrix.

Like those of every layer, their products follow `jax.default_matmul_precision`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from m2.monarch import blockdiag_matmul, monarch_init, monarch_matmul
from m2.sequence_cut import is_cut

# What linear maps give has this name, by which `jax.checkpoint` can keep it: policies that go by the primitive see a
# product with a batch of matrices, as attention's scores are, or none.
PRODUCT = "matmul"


def rows_dot_general(x, kernel, dimension_numbers, **options):
    """`lax.dot_general` of vectors (..., d) and a kernel (d, o) as one product of two matrices, for `nnx.Linear`.

    The gradient in the kernel is then one product, too. Over several axes at once XLA's is half as fast on a CPU: it
    turns both factors around first. Positions that are cut over devices stay an axis: rows of pieces are not one piece.
    """
    if x.ndim == 2 or options.get("out_sharding") is not None or is_cut():
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    return lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options).reshape(*x.shape[:-1], kernel.shape[1])


class BlockdiagLinear(nnx.Module):
    """A linear map with a block-diagonal weight: k contiguous pieces of the input, each with its own block.

        y[(k o)] = sum_i kernel[k, o, i] x[(k i)] + bias[(k o)]

    Widths that k does not divide are rounded up, the input padded with zeros and the output cut.

    Examples:
      >>> layer = m2.BlockdiagLinear(8, 16, n_blocks=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8))).shape
      (2, 16)

    Source: Fu et al. 2023, arXiv:2310.12109; HazyResearch/m2, bert/src/mm/blockdiag_linear.py, initial values included.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        n_blocks: int,
        use_bias: bool = True,
        scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          d_in, d_out: widths.
          n_blocks: k. 1 is a dense map.
          use_bias: whether a bias is added.
          scale: factor on the initial kernel.
          dtype: of the computation. None: what input and parameters promote to.
          param_dtype: of the parameters.
          rngs: stream "params".

        Raises:
          ValueError: a width or a number of blocks below 1.
        """
        _at_least_1(d_in=d_in, d_out=d_out, n_blocks=n_blocks)
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        shape = n_blocks, -(-d_out // n_blocks), -(-d_in // n_blocks)
        # The dense default, uniform in 1 / sqrt(width), times sqrt(k) for the k-th part of the entries that is left.
        kernel = scale * _uniform(shape[2] ** -0.5)(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel.astype(param_dtype), axes=("blocks", None, "embed"))
        bias = _uniform(d_out**-0.5)(rngs.params(), (d_out,), param_dtype) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias, decay=False, axes=(None,))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        """Maps vectors of width d_in to width d_out.

        Raises:
          ValueError: x has another width.
        """
        x, kernel, bias = _prepare(x, self.d_in, self.dtype, self.kernel, bias=self.bias)
        blocks, _, width = kernel.shape
        y = blockdiag_matmul(_widen(x, blocks * width), kernel, precision=None)[..., : self.d_out]
        y = checkpoint_name(y, PRODUCT)
        return y if bias is None else y + bias


class MonarchLinear(nnx.Module):
    """A linear map whose weight is a Monarch matrix: two block-diagonal factors and a stride permutation.

        y = P^T diag(w2) P diag(w1) x + bias

    Both factors have k blocks; the width between them is the smaller one of input and output. Parameters and
    multiplications are (d_in + d_out) min(d_in, d_out) / k: with k about sqrt(d), 2 d^1.5 for a square map. Widths that
    k does not divide are rounded up, the input padded with zeros and the output cut.

    Examples:
      >>> layer = m2.MonarchLinear(8, 16, n_blocks=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8))).shape
      (2, 16)

    Source: Dao et al. 2022, arXiv:2204.00595, section 3.1.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        n_blocks: int | None = None,
        use_bias: bool = True,
        scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          d_in, d_out: widths.
          n_blocks: k. None takes the common divisor of the widths that is nearest the root of the smaller one; where
            none is within a factor of 2, the root rounded.
          use_bias, scale, dtype, param_dtype, rngs: as in `BlockdiagLinear`; `scale` is on the whole map. Each
            factor starts with variance 1 / (input size of its blocks), the bias at zero.

        Raises:
          ValueError: a width or a number of blocks below 1.
        """
        n_blocks = default_n_blocks(d_in, d_out) if n_blocks is None else n_blocks
        _at_least_1(d_in=d_in, d_out=d_out, n_blocks=n_blocks)
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        i, o = -(-d_in // n_blocks), -(-d_out // n_blocks)
        between = min(i, o)
        w1, w2 = monarch_init(rngs.params(), (n_blocks, between, i), (n_blocks, o, between), dtype=param_dtype)
        self.w1 = nnx.Param(w1, axes=("blocks", None, "embed"))
        self.w2 = nnx.Param((scale * w2).astype(param_dtype), axes=("blocks", "embed", None))
        bias = jnp.zeros((d_out,), param_dtype) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias, decay=False, axes=(None,))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        """Maps vectors of width d_in to width d_out.

        Raises:
          ValueError: x has another width.
        """
        x, w1, w2, bias = _prepare(x, self.d_in, self.dtype, self.w1, self.w2, bias=self.bias)
        y = monarch_matmul(_widen(x, w1.shape[0] * w1.shape[2]), w1, w2, precision=None)[..., : self.d_out]
        y = checkpoint_name(y, PRODUCT)
        return y if bias is None else y + bias


def default_n_blocks(d_in: int, d_out: int) -> int:
    """The number of blocks that makes a Monarch matrix cheap: about the root of the smaller width, and even blocks.

    The common divisor of the widths that is nearest the root; where none is within a factor of 2, the root rounded.
    """
    _at_least_1(d_in=d_in, d_out=d_out)
    root, common = math.sqrt(min(d_in, d_out)), math.gcd(d_in, d_out)
    nearest = min((k for k in range(1, common + 1) if common % k == 0), key=lambda k: abs(k - root))
    return nearest if root / 2 <= nearest <= 2 * root else round(root)


def _prepare(x, d_in, dtype, *weights, bias):
    """Input, weights and bias (or None) in the dtype of the computation."""
    if x.ndim < 1 or x.shape[-1] != d_in:
        raise ValueError(f"x has shape {x.shape}, expected (..., d_in) with d_in={d_in}")
    arrays = [x, *(w[...] for w in weights)] + ([] if bias is None else [bias[...]])
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    arrays = [array.astype(dtype) for array in arrays]
    return arrays if bias is not None else [*arrays, None]


def _widen(x, width):
    """Pads the last axis with zeros up to `width`."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _uniform(bound: float) -> Callable:
    """An initializer uniform in [-bound, bound]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _at_least_1(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}={value}, expected at least 1")
