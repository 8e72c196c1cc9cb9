"""The slow, obvious twins: dense matrices from the index formulas, loops, and sums over every pair of positions.

They say what is true. Every fast implementation agrees with them in value and in every gradient (plain autodiff here).
"""

import math

import jax.numpy as jnp
import numpy as np

from m2.absent import blank


def strided_to_dense(w, outer):
    """The matrix F that applies block (u t) of w (k s r) to the entries (u . t) of a vector, u < outer.

    F[(u s t), (u r t)] = w[(u t), s, r], zero elsewhere. outer = k is block-diagonal, outer = 1 strides by k.
    """
    k, out_width, in_width = w.shape
    inner = k // outer
    rows, columns = np.zeros((k, out_width, 1), int), np.zeros((k, 1, in_width), int)
    for block in range(k):
        u, t = divmod(block, inner)
        rows[block, :, 0] = (u * out_width + np.arange(out_width)) * inner + t
        columns[block, 0] = (u * in_width + np.arange(in_width)) * inner + t
    return jnp.zeros((k * out_width, k * in_width), w.dtype).at[rows, columns].set(w)


def blockdiag_matmul(x, w):
    """`m2.blockdiag_matmul` by the dense block-diagonal matrix."""
    return jnp.einsum("oi,...i->...o", strided_to_dense(w, len(w)), x, precision="highest")


def monarch_to_dense(w1, *later):
    """`m2.monarch_to_dense` as a product of dense matrices, one a factor."""
    dense = strided_to_dense(w1, len(w1))
    for m, w in enumerate(later):
        outer = math.prod(v.shape[2] for v in later[m + 1 :])
        dense = jnp.matmul(strided_to_dense(w, outer), dense, precision="highest")
    return dense


def monarch_matmul(x, *factors):
    """`m2.monarch_matmul` by the dense matrix."""
    return jnp.einsum("oi,...i->...o", monarch_to_dense(*factors), x, precision="highest")


def basis_at_roots(l_coefficients, r_coefficients):
    """M[i, j] = q_j(w^i): every basis polynomial at every root of unity, one coefficient after the other.

    q_j(Z) = l_{j1}(Z) r_{j1,j0}(Z^t) with j = j0 t + j1, w = exp(-2 pi i / N), N = t s: `l_coefficients` (t, t) holds
    the coefficients of l_{j1} in row j1, `r_coefficients` (t, s, s) those of r_{j1,j0} in [j1, j0]. Nothing is masked.
    """
    t, s = r_coefficients.shape[:2]
    roots = np.exp(-2j * np.pi * np.arange(t * s) / (t * s))
    columns = []
    for j in range(t * s):
        j0, j1 = divmod(j, t)
        low = sum(l_coefficients[j1, d] * roots**d for d in range(t))
        high = sum(r_coefficients[j1, j0, e] * roots ** (t * e) for e in range(s))
        columns.append(low * high)
    return jnp.stack(columns, axis=1)


def causal_monarch(u, k, l_coefficients, r_coefficients):
    """M^-1 (M k . M u) with the dense M of any coefficients, causal or not: u (b l d), k (d l), zero-padded to N."""
    matrix = basis_at_roots(l_coefficients, r_coefficients)
    length, missing = u.shape[1], len(matrix) - u.shape[1]
    u_values = jnp.einsum("ij,bjd->bdi", matrix, jnp.pad(u, ((0, 0), (0, missing), (0, 0))))
    k_values = jnp.einsum("ij,dj->di", matrix, jnp.pad(k, ((0, 0), (0, missing))))
    y = jnp.einsum("ji,bdi->bjd", jnp.linalg.inv(matrix), k_values * u_values)
    return y[:, :length].real


def fft_conv(u, k, *, bias=None, causal=True, input_gate=None, output_gate=None, mask=None, segment_ids=None):
    """`m2.fft_conv` as a sum over every pair of positions, O(l^2)."""
    l, taps = u.shape[1], k.shape[1]
    u, input_gate, output_gate = (None if x is None else blank(mask, x) for x in (u, input_gate, output_gate))
    s = u if input_gate is None else u * input_gate
    lag = np.arange(l)[:, None] - np.arange(l)  # of output t and input s
    reached = (lag >= 0) & (lag < taps) if causal else (lag >= -(taps // 2)) & (lag < taps // 2)
    kernel = jnp.where(reached, k[:, lag % taps], 0)  # d t s; a negative lag is read from the end
    if segment_ids is not None:
        runs = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
        kernel = jnp.where((runs[:, :, None] == runs[:, None])[:, None], kernel, 0)
    y = jnp.einsum("...dts,...sd->...td", kernel, s, precision="highest")
    y = y if bias is None else y + bias * s
    return y if output_gate is None else y * output_gate


def fft_conv2d(u, k, *, bias=None, input_gate=None, output_gate=None):
    """`m2.fft_conv2d` as a sum over every pair of places, O(x^2 y^2)."""
    (_, x, y, _), (_, m, n) = u.shape, k.shape
    s = u if input_gate is None else u * input_gate
    i, j = (np.arange(size)[:, None] - np.arange(size) for size in (x, y))  # lags of output and input, by rows, columns
    reached = lambda lag, taps: (lag >= -(taps // 2)) & (lag < taps // 2)  # noqa: E731
    kernel = k[:, (i % m)[:, :, None, None], j % n]  # d r p c q; a negative lag is read from the end
    kernel = jnp.where(reached(i, m)[:, :, None, None] & reached(j, n), kernel, 0)
    out = jnp.einsum("drpcq,bpqd->brcd", kernel, s, precision="highest")
    out = out if bias is None else out + bias * s
    return out if output_gate is None else out * output_gate
