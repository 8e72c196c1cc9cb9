"""Causal Monarch: the long convolution in a learned polynomial basis, causal by the degrees of its polynomials.

    y = M^-1 (M k . M u)        M[i, j] = q_j(w^i),  w = exp(-2 pi i / N),  input in the first N / 2 positions

Column j of M holds a basis polynomial at the N-th roots of unity, so M u are the values of u(Z) = sum_j u_j q_j(Z), the
product multiplies k(Z) u(Z), and M^-1 reads its coefficients in the basis. With j = j0 t + j1 and

    q_j(Z) = l_{j1}(Z) r_{j1,j0}(Z^t)

M is a Monarch matrix of order 2 (`causal_monarch_factors`). It is causal if

    (a) nothing has a lower degree than its index: l_{j1} starts at Z^{j1}, r_{j1,j0} at Y^{j0}, so q_j at Z^j, and
        q_j q_i starts at Z^(j+i): it is made of basis polynomials from j + i on
    (b) nothing wraps: q_j has degree below N / 2 for the positions j < N / 2 that hold input

The coefficients of l and r are therefore triangular, l (t t) and r (t s s), N = 2 t s, and M = F T: the triangular
Monarch matrix T takes the coefficients of u to those of Z^0, Z^1, ..., and F is the DFT. F^-1 (F T k . F T u) is the
zero-padded FFT convolution of T k and T u, so all that is computed is

    y = T^-1 (T k * T u)

two block-diagonal products for T, two block-diagonal triangular solves for T^-1, all of it real: O(l^1.5) with t and s
about the root of l. Polynomials that are monomials make T the identity, and this the causal convolution itself.

Conditioning. Say the lowest coefficients are 1, and the absolute values of the others of each l_{j1} add up to at most
rho_l, of each r_{j1,j0} to rho_r. While both are below 1, in the 1-norm

    |T| <= (1 + rho_l) (1 + rho_r)        |T^-1| <= 1 / ((1 - rho_l) (1 - rho_r))

Above 1, T^-1 can grow as 2^(t + s). A lowest coefficient of 0 makes T singular.

Axes: t polynomials l, coefficients of each (m in sums); s polynomials r for each of them, coefficients of each (e).

Source: Fu et al. 2023, arXiv:2310.12109, section 4 and the appendix on causal Monarch matrices.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Complex, Float, Key

from m2.conv import fft_conv
from m2.monarch import dft_factors
from m2.sequence_cut import by_channels, cut_of


def causal_monarch(
    u: Float[Array, "b l d"],
    k: Float[Array, "d l"],
    l_coefficients: Float[Array, "t t"],
    r_coefficients: Float[Array, "t s s"],
) -> Float[Array, "b l d"]:
    """Mixes positions causally, as a convolution does, in a learned basis of polynomials.

        y = M^-1 (M k . M u) = T^-1 (T k * T u)

    Differentiable in every argument. Computed in at least float32.

    Args:
      u: input, of any length up to t s; what is missing is padded with zeros.
      k: filter of each channel: its coefficients in the basis, k_j at position j.
      l_coefficients: row j1 holds l_{j1}, lowest degree first. Entries left of the diagonal count as zero, whatever
        they are; those on it must not be near 0 (see the module's docstring for the conditioning).
      r_coefficients: likewise r_{j1,j0} in [j1, j0]. Their degrees stay below s, half of what N = 2 t s allows.

    Returns:
      y, in u's dtype. The first positions do not depend on how many follow.

    Raises:
      ValueError: shapes that disagree, or a length above t s.

    Examples:
      >>> left, right = m2.causal_monarch_init(jax.random.key(0), 16)
      >>> m2.causal_monarch(jnp.ones((2, 16, 3)), jnp.ones((3, 16)), left, right).shape
      (2, 16, 3)

    Source: Fu et al. 2023, arXiv:2310.12109, section 4, the theorem on causal Monarch matrices.
    """
    t, s = _check_coefficients(l_coefficients, r_coefficients)
    if u.ndim != 3 or u.shape[1] > t * s:
        raise ValueError(f"u has shape {u.shape}, expected (b, l, d) with l at most t s = {t * s}")
    length = u.shape[1]
    if k.shape != (u.shape[2], length):
        raise ValueError(f"k has shape {k.shape}, expected (d, l) = {(u.shape[2], length)}")
    if (cut := cut_of(u)) is not None:
        run = lambda u, k, _, basis: causal_monarch(u, k, *basis)  # noqa: E731
        return by_channels(run, cut, u, k, whole=(l_coefficients, r_coefficients))
    dtype = jnp.result_type(u, k, l_coefficients, r_coefficients, jnp.float32)
    steps = -(-length // t)  # of the s, those that this length reaches
    basis = jnp.triu(l_coefficients.astype(dtype)), jnp.triu(r_coefficients.astype(dtype)[:, :steps, :steps])
    missing = (0, steps * t - length)
    u_monomial = _to_monomials(jnp.pad(u.astype(dtype), ((0, 0), missing, (0, 0))), *basis)
    k_monomial = _to_monomials(jnp.pad(k.astype(dtype).T, (missing, (0, 0)))[None], *basis)[0].T
    return _from_monomials(fft_conv(u_monomial, k_monomial), *basis)[:, :length].astype(u.dtype)


def causal_monarch_factors(
    l_coefficients: Float[Array, "t t"], r_coefficients: Float[Array, "t s s"]
) -> tuple[Complex[Array, "t n n"], Complex[Array, "n t t"]]:
    """The factors of M itself: those of the DFT, each block times its triangular coefficients.

        M u = monarch_matmul(digit_reversal(u, t, 2 s), w1, w2)        u of width N = 2 t s

    Args:
      l_coefficients, r_coefficients: as in `causal_monarch`. The r_{j1,j0} with j0 >= s, which meet only the padding,
        are taken as monomials.

    Returns:
      (w1, w2): shapes (t, 2 s, 2 s) and (2 s, t, t).

    Raises:
      ValueError: shapes that disagree.

    Examples:
      >>> left, right = m2.causal_monarch_init(jax.random.key(0), 16)
      >>> [factor.ndim for factor in m2.causal_monarch_factors(left, right)]
      [3, 3]
    """
    t, s = _check_coefficients(l_coefficients, r_coefficients)
    dtype = jnp.result_type(l_coefficients, r_coefficients, jnp.complex64)
    w1, w2 = dft_factors(t, 2 * s, dtype=dtype)
    rest = jnp.broadcast_to(jnp.eye(2 * s, dtype=r_coefficients.dtype), (t, 2 * s, 2 * s))
    r = rest.at[:, :s, :s].set(jnp.triu(r_coefficients))
    return jnp.matmul(w1, r.mT, precision="highest"), jnp.matmul(w2, jnp.triu(l_coefficients).T, precision="highest")


def causal_monarch_init(
    key: Key[Array, ""], length: int, *, noise: float = 0.1, dtype: Dtype = jnp.float32
) -> tuple[Float[Array, "t t"], Float[Array, "t s s"]]:
    """Polynomials near the monomials, for sequences of up to `length` positions.

    The lowest coefficients are 1. The others are normal with standard deviation noise / t and noise / s, so that their
    absolute values add up to less than about noise, rho in the module's docstring.

    Args:
      key: random key.
      length: longest sequence, at least 1. t is its root rounded up, s as many as are needed.
      noise: 0 makes `causal_monarch` the causal convolution.
      dtype: of the coefficients.

    Returns:
      (l_coefficients, r_coefficients).

    Raises:
      ValueError: a length below 1.

    Examples:
      >>> left, right = m2.causal_monarch_init(jax.random.key(0), 16)
      >>> left.ndim, right.ndim
      (2, 3)
    """
    if length < 1:
        raise ValueError(f"length={length}, expected at least 1")
    t = math.isqrt(length - 1) + 1
    s = -(-length // t)
    l_key, r_key = jax.random.split(key)

    def near_monomials(key, shape):
        size = shape[-1]
        return jnp.eye(size, dtype=dtype) + jnp.triu(jax.random.normal(key, shape, dtype), 1) * (noise / size)

    return near_monomials(l_key, (t, t)), near_monomials(r_key, (t, s, s))


def _to_monomials(u, l, r):
    """T u: coefficients in the basis to those of Z^0, Z^1, ..."""
    x = rearrange(u, "b (s t) d -> t s (b d)", t=len(l))
    x = jnp.einsum("tse,tsx->tex", r, x, precision=lax.Precision.HIGHEST)
    x = jnp.einsum("tm,tex->emx", l, x, precision=lax.Precision.HIGHEST)
    return rearrange(x, "e m (b d) -> b (e m) d", b=len(u))


def _from_monomials(y, l, r):
    """T^-1 y, each factor of T undone by substitution: position j needs only what comes before it."""
    x = rearrange(y, "b (e m) d -> m (e b d)", m=len(l))
    x = lax.linalg.triangular_solve(l, x, left_side=True, transpose_a=True)
    x = rearrange(x, "t (e x) -> t e x", e=r.shape[1])
    x = lax.linalg.triangular_solve(r, x, left_side=True, transpose_a=True)
    return rearrange(x, "t s (b d) -> b (s t) d", b=len(y))


def _check_coefficients(l_coefficients, r_coefficients):
    """(t, s), after a check that the coefficients agree on them."""
    if l_coefficients.ndim != 2 or l_coefficients.shape[0] != l_coefficients.shape[1]:
        raise ValueError(f"l_coefficients has shape {l_coefficients.shape}, expected (t, t)")
    t, shape = len(l_coefficients), r_coefficients.shape
    if len(shape) != 3 or shape[0] != t or shape[1] != shape[2]:
        raise ValueError(f"r_coefficients has shape {shape}, expected (t, s, s) with t={t}")
    return t, shape[1]
