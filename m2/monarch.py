"""Monarch matrices: products of block-diagonal matrices, each along another stride of the vector.

    M = F_p ... F_2 F_1        F_1 = diag(w1) on contiguous blocks        F_m = P_m^T diag(w_m) P_m

A factor w (k s r) is k blocks of s x r. Each sees its input as an array (u r t) and applies block (u t) along the
middle axis, giving (u s t); P_m is the stride permutation (u r t) -> (u t r). The first has u = k, t = 1: contiguous
blocks. In a later one u is the product of the input sizes r of the factors after it, the axes that are still to come,
and t = k / u: the last has u = 1 and strides by its number of blocks. So on an array of p axes, flattened, F_1
transforms the last axis, F_2 the one before it, and F_p the first.

Order 2 is the published form, M = P^T diag(w2) P diag(w1). With N = b^p and blocks of b x b, order p has p N^((p+1)/p)
parameters and takes as many multiplications, where a dense matrix has N^2.

Axes: k q p blocks, out, in of the first factor; l s r of the second, l r = k q; n in, m out of the whole.

Source: Dao et al. 2022, arXiv:2204.00595, section 3; Fu et al. 2023, arXiv:2310.12109, section 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.typing import Dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Shaped

from m2.sequence_cut import cut_of, each_piece

# Of products of float32 numbers. Less than that is asked for: by layers, which follow `jax.default_matmul_precision`.
EXACT = jax.lax.Precision.HIGHEST

Factors = tuple[Inexact[Array, "_ _ _"], ...]


def blockdiag_matmul(
    x: Inexact[Array, "*b n"], w: Inexact[Array, "k o i"], *, precision: jax.lax.PrecisionLike = EXACT
) -> Inexact[Array, "*b m"]:
    """Multiplies each of k contiguous pieces of a vector by its own block.

        y[(k o)] = sum_i w[k, o, i] x[(k i)]

    Adds up in at least float32.

    Args:
      x: vectors of width k i.
      w: the blocks.
      precision: of the products, as in `jnp.einsum`. Float32 is multiplied as float32 on every platform unless this
        says otherwise; None is what `jax.default_matmul_precision` says, bfloat16 on a TPU.

    Returns:
      y, of width k o, in the dtype that x and w promote to.

    Raises:
      ValueError: w has no three axes, or x is not of width k i.

    Examples:
      >>> w = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
      >>> m2.blockdiag_matmul(jnp.ones(4), w).tolist()
      [1.0, 1.0, 2.0, 2.0]

    Source: HazyResearch/m2, bert/src/mm/blockdiag_multiply.py.
    """
    if w.ndim != 3:
        raise ValueError(f"w has shape {w.shape}, expected (k, o, i)")
    blocks, _, width = w.shape
    if x.ndim < 1 or x.shape[-1] != blocks * width:
        raise ValueError(f"x has shape {x.shape}, expected (..., k i) = (..., {blocks * width}) for w of {w.shape}")
    if x.ndim == 3 and (cut := cut_of(x)) is not None:
        return each_piece(functools.partial(blockdiag_matmul, precision=precision), cut, x, w)
    pieces = rearrange(_rows(x), "n (k i) -> k n i", k=blocks)
    y = rearrange(_each_block(pieces, w, precision), "k n o -> n (k o)")
    return y.reshape(*x.shape[:-1], y.shape[1])


def _each_block(pieces: jax.Array, w: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Pieces (k n i) times their blocks (k o i) as (k n o): k products of two matrices, and so are the gradients.

    With blocks anywhere else than first in either, or n more than one axis, XLA turns all around for the gradient in w.
    """
    dtype = jnp.result_type(pieces, w)
    accumulate = jnp.promote_types(dtype, jnp.float32)
    factors = pieces.astype(dtype), w.astype(dtype)
    return jnp.einsum("kni,koi->kno", *factors, precision=precision, preferred_element_type=accumulate).astype(dtype)


def _rows(x: jax.Array) -> jax.Array:
    """Vectors (... n) as the rows of one matrix."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def monarch_matmul(
    x: Inexact[Array, "*b n"],
    w1: Inexact[Array, "k q p"],
    w2: Inexact[Array, "l s r"],
    *more: Inexact[Array, "_ _ _"],
    reverse: bool = False,
    precision: jax.lax.PrecisionLike = EXACT,
) -> Inexact[Array, "*b m"]:
    """Multiplies vectors by a Monarch matrix, factor by factor.

        order 2:  a[(k q)] = sum_p w1[k, q, p] x[(k p)]        y[(s l)] = sum_r w2[l, s, r] a[(r l)]
        order p:  y = F_p ... F_1 x, as the module's docstring defines them

    Args:
      x: vectors of width k p.
      w1: the first factor, on contiguous blocks.
      w2: the second factor, l r = k q.
      *more: further factors, each of the width that the one before it gives. Of a factor that neither comes first nor
        last, the number of blocks is a multiple of the product u of the input sizes of the factors after it.
      reverse: F_1 ... F_p x instead. With transposed blocks that is M^T x, with inverted ones M^-1 x. The sizes that u
        is made of are then the blocks' output sizes.
      precision: of the products, as in `jnp.einsum`. Float32 is multiplied as float32 on every platform unless this
        says otherwise; None is what `jax.default_matmul_precision` says, bfloat16 on a TPU.

    Returns:
      y, of width l s at order 2, in the dtype that the arguments promote to.

    Raises:
      ValueError: widths that do not follow on each other.

    Examples:
      >>> factors = m2.monarch_init(jax.random.key(0), (4, 3, 3), (3, 4, 4))  # 84 numbers for 12 x 12
      >>> m2.monarch_matmul(jnp.ones((5, 12)), *factors).shape
      (5, 12)

    Source: Dao et al. 2022, arXiv:2204.00595, section 3.1; HazyResearch/m2, bert/src/mm/blockdiag_butterfly_multiply.py
    for order 2 with uneven blocks.
    """
    factors = (w1, w2, *more)
    outer = _outer_sizes([w.shape for w in factors], reverse)
    if x.ndim < 1 or x.shape[-1] != (width := _width(factors[-1 if reverse else 0].shape)):
        raise ValueError(f"x has shape {x.shape}, expected (..., {width}) for factors {_shapes(factors)}")
    if x.ndim == 3 and (cut := cut_of(x)) is not None:
        options: dict[str, Any] = {"reverse": reverse, "precision": precision}
        return each_piece(functools.partial(monarch_matmul, **options), cut, x, *factors)
    order, y = list(zip(factors, outer, strict=True)), _rows(x)
    for w, u in reversed(order) if reverse else order:
        pieces = rearrange(y, "n (u r t) -> (u t) n r", u=u, r=w.shape[2])
        y = rearrange(_each_block(pieces, w, precision), "(u t) n s -> n (u s t)", u=u)
    return y.reshape(*x.shape[:-1], y.shape[1])


def monarch_to_dense(*factors: Inexact[Array, "_ _ _"], reverse: bool = False) -> Inexact[Array, "m n"]:
    """The dense matrix W with W x = monarch_matmul(x, *factors).

    Args:
      *factors, reverse: as in `monarch_matmul`.

    Raises:
      ValueError: fewer than two factors, or widths that do not follow on each other.

    Examples:
      >>> factors = m2.monarch_init(jax.random.key(0), (4, 3, 3), (3, 4, 4))
      >>> x = jnp.arange(12.0)
      >>> bool(jnp.allclose(m2.monarch_to_dense(*factors) @ x, m2.monarch_matmul(x, *factors), atol=1e-4))
      True
    """
    if len(factors) < 2:
        raise ValueError(f"factors are {len(factors)}, expected at least 2")
    identity = jnp.eye(_width(factors[-1 if reverse else 0].shape), dtype=jnp.result_type(*factors))
    return monarch_matmul(identity, *factors, reverse=reverse).T


def monarch_inverse(*factors: Inexact[Array, "_ _ _"]) -> Factors:
    """The factors of the inverse, to be applied in the other order.

        M^-1 = F_1^-1 ... F_p^-1        monarch_matmul(M x, *monarch_inverse(*factors), reverse=True) = x

    The inverse of a Monarch matrix is block-diagonal and strided matrices again, but last to first, which is a Monarch
    matrix of the same kind only up to permutations of its input and output. So the blocks are inverted where they are.

    Args:
      *factors: as in `monarch_matmul`, with square blocks. A singular block gives infinite or undefined numbers.

    Returns:
      As many factors of the same shapes, in at least float32.

    Raises:
      ValueError: blocks that are not square, or widths that do not follow on each other.

    Examples:
      >>> factors = m2.monarch_init(jax.random.key(0), (4, 3, 3), (3, 4, 4))
      >>> x = jnp.arange(12.0)
      >>> y = m2.monarch_matmul(m2.monarch_matmul(x, *factors), *m2.monarch_inverse(*factors), reverse=True)
      >>> bool(jnp.allclose(x, y, atol=1e-3))
      True
    """
    for m, w in enumerate(factors, 1):
        if w.ndim == 3 and w.shape[1] != w.shape[2]:
            reason = "a product through blocks that are not square has no inverse block by block"
            raise ValueError(f"w{m} has shape {w.shape}, expected square blocks: {reason}")
    _outer_sizes([w.shape for w in factors])
    return tuple(jnp.linalg.inv(w.astype(jnp.promote_types(w.dtype, jnp.float32))) for w in factors)


def project_to_monarch(
    W: Inexact[Array, "*b m n"], n_blocks: int | tuple[int, int], *, hidden: int | None = None
) -> tuple[Inexact[Array, "*b k q p"], Inexact[Array, "*b l s r"]]:
    """The Monarch matrix of order 2 that is closest to a dense one in the Frobenius norm.

        W[(s l), (k p)] ~ sum over the hidden entries a = (k q) = (r l) of w2[l, s, r] w1[k, q, p]

    For each pair (k, l) those entries a that lie in piece k and at l modulo the second number of blocks give a rank to
    the s x p matrix W[(. l), (k .)]. These matrices share no entry, so the truncated SVD of each is the optimum; both
    factors get the root of the singular value. Exact where W is such a Monarch matrix. Not meant to be differentiated.

    Args:
      W: dense matrices, acting on columns: y = W x.
      n_blocks: (k, l), the blocks of the first and second factor; one number stands for both. k divides n, l divides m.
      hidden: width between the factors, a multiple of k and of l. None takes k l: rank one for each pair. A multiple
        j k l gives each pair the rank j.

    Returns:
      (w1, w2): shapes (k, hidden / k, n / k) and (l, m / l, hidden / l), in at least float32.

    Raises:
      ValueError: numbers of blocks that do not divide the widths.

    Examples:
      >>> factors = m2.monarch_init(jax.random.key(0), (4, 3, 3), (3, 4, 4))
      >>> W = m2.monarch_to_dense(*factors)
      >>> again = m2.project_to_monarch(W, (4, 3))  # what is a Monarch matrix is found
      >>> bool(jnp.allclose(m2.monarch_to_dense(*again), W, atol=1e-4))
      True

    Source: Dao et al. 2022, arXiv:2204.00595, section 3.2 and theorem 1.
    """
    k, l = (n_blocks, n_blocks) if isinstance(n_blocks, int) else n_blocks
    if W.ndim < 2 or k < 1 or l < 1 or W.shape[-1] % k or W.shape[-2] % l:
        expected = "(k, l) such that k divides n and l divides m"
        raise ValueError(f"n_blocks={n_blocks} for W of shape (..., m, n) = {W.shape}, expected {expected}")
    hidden = k * l if hidden is None else hidden
    if hidden < 1 or hidden % k or hidden % l:
        raise ValueError(f"hidden={hidden}, expected a multiple of both numbers of blocks, {k} and {l}")

    # 1. Which pair each hidden entry joins, and the how manieth of that pair it is.
    entry = np.arange(hidden)
    piece, stride = entry // (hidden // k), entry % l
    pair = piece * l + stride
    rank = np.array([np.sum(pair[:a] == pair[a]) for a in entry])

    # 2. One SVD a pair. Entries beyond the rank that a matrix can have stay zero.
    blocks = rearrange(W, "... (s l) (k p) -> ... k l s p", k=k, l=l)
    U, singular, Vh = jnp.linalg.svd(blocks.astype(jnp.promote_types(W.dtype, jnp.float32)), full_matrices=False)
    there = rank < singular.shape[-1]
    rank = np.where(there, rank, 0)
    root = jnp.where(there, jnp.sqrt(singular[..., piece, stride, rank]), 0)[..., None]

    # 3. Each entry takes its singular vectors: a row of w1, a column of w2.
    w1 = root * Vh[..., piece, stride, rank, :]
    w2 = root * jnp.swapaxes(U, -1, -2)[..., piece, stride, rank, :]
    return rearrange(w1, "... (k q) p -> ... k q p", k=k), rearrange(w2, "... (r l) s -> ... l s r", l=l)


def monarch_init(key: Key[Array, ""], *shapes: tuple[int, int, int], dtype: Dtype = jnp.float32) -> Factors:
    """Random factors that keep the variance: entries of variance 1 / (input size of the block), normal.

    Args:
      key: random key.
      *shapes: of the factors, (blocks, out, in), in the order of `monarch_matmul`.
      dtype: of the factors.

    Raises:
      ValueError: widths that do not follow on each other.

    Examples:
      >>> [w.shape for w in m2.monarch_init(jax.random.key(0), (4, 2, 3), (2, 4, 4))]
      [(4, 2, 3), (2, 4, 4)]
    """
    _outer_sizes(shapes)
    keys = jax.random.split(key, len(shapes))
    return tuple(block_init(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


# Each block alone: variance 1 / fan_in.
block_init = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=0
)


def dft_factors(*sizes: int, inverse: bool = False, dtype: DTypeLike | None = None) -> Factors:
    """The discrete Fourier transform as a Monarch matrix, after one permutation of its input.

        X[h] = sum_j exp(-2 pi i j h / N) x[j]
        X = monarch_matmul(digit_reversal(x, *sizes), *dft_factors(*sizes))

    for N = n_1 n_2 ... n_p. This is the decimation in time of Cooley and Tukey: factor 1 holds the transforms of size
    n_p; each later one those of the size before, n_{p-1}, ..., n_1, twiddles included:
    w[(u t), s, r] = exp(-2 pi i r (s T + t) / (n T)), with T = n_{a+1} ... n_p for n = n_a and t < T.

    Args:
      *sizes: n_1, ..., n_p, at least two.
      inverse: the inverse transform instead, which includes 1 / N.
      dtype: of the factors, complex. None: the widest that is switched on. Phases are computed in complex128.

    Raises:
      ValueError: fewer than two sizes, or one below 1.

    Examples:
      >>> x = jnp.arange(12.0)
      >>> y = m2.monarch_matmul(m2.digit_reversal(x.astype(complex), 3, 4), *m2.dft_factors(3, 4))
      >>> bool(jnp.allclose(y, jnp.fft.fft(x), atol=1e-4))
      True

    Source: Cooley & Tukey 1965; Dao et al. 2022, arXiv:2204.00595, appendix on the DFT as a Monarch matrix.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes={sizes}, expected at least two, each at least 1")
    dtype = jnp.result_type(complex) if dtype is None else dtype
    factors = []
    for a in reversed(range(len(sizes))):
        n, inner, outer = sizes[a], math.prod(sizes[a + 1 :]), math.prod(sizes[:a])
        t, s, r = np.ogrid[:inner, :n, :n]
        turns = r * (s * inner + t) % (n * inner) / (n * inner)
        blocks = np.exp(2j * np.pi * turns) / n if inverse else np.exp(-2j * np.pi * turns)
        factors.append(jnp.asarray(np.tile(blocks, (outer, 1, 1)), dtype))
    return tuple(factors)


def digit_reversal(x: Shaped[Array, "*b n"], *sizes: int) -> Shaped[Array, "*b n"]:
    """Reverses the axes of a flattened array: (n_p ... n_1) -> (n_1 ... n_p). `reversed(sizes)` undoes it.

    Args:
      x: vectors of width n_1 ... n_p.
      *sizes: n_1, ..., n_p.

    Raises:
      ValueError: x has another width.

    Examples:
      >>> m2.digit_reversal(jnp.arange(6), 3, 2).tolist()
      [0, 3, 1, 4, 2, 5]
    """
    if x.ndim < 1 or x.shape[-1] != math.prod(sizes):
        raise ValueError(f"x has shape {x.shape}, expected (..., {math.prod(sizes)}) for sizes={sizes}")
    batch = x.shape[:-1]
    axes = (*range(len(batch)), *reversed(range(len(batch), len(batch) + len(sizes))))
    return x.reshape(*batch, *reversed(sizes)).transpose(axes).reshape(x.shape)


def _outer_sizes(shapes: Sequence[tuple[int, ...]], reverse: bool = False) -> list[int]:
    """u of each factor, after a check that the factors fit together."""
    if len(shapes) < 2:
        raise ValueError(f"factors are {len(shapes)}, expected at least 2")
    given, taken = (2, 1) if reverse else (1, 2)
    for m, shape in enumerate(shapes, 1):
        if len(shape) != 3:
            raise ValueError(f"w{m} has shape {shape}, expected (blocks, out, in)")
        if m > 1 and shape[0] * shape[taken] != (width := shapes[m - 2][0] * shapes[m - 2][given]):
            raise ValueError(f"w{m} has shape {shape}, expected {width} = blocks * size, to fit w{m - 1}")
    outer = [shapes[0][0]] + [math.prod(shape[taken] for shape in shapes[m + 1 :]) for m in range(1, len(shapes))]
    for m, (shape, u) in enumerate(zip(shapes, outer, strict=True), 1):
        if shape[0] % u:
            raise ValueError(f"w{m} has shape {shape}, expected a multiple of {u} blocks, for the factors after it")
    return outer


def _width(shape: tuple[int, ...]) -> int:
    """The width of the vectors that a factor takes."""
    return shape[0] * shape[2]


def _shapes(factors) -> str:
    return ", ".join(str(w.shape) for w in factors)
