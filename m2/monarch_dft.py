"""The DFT of real signals as a Monarch product: small matrices from the left, for units that multiply matrices.

A DFT of size n = n1 n2 ... np is p products. Position t = (t1 n2 + t2) n3 + ..., frequency f = f1 + n1 (f2 + n2 (...)),
w_n = exp(-2 pi i / n):

    X[f] = sum_tp w_n^(f tp)  ...  sum_t2 w_(n1 n2)^((f1 + n1 f2) t2)  sum_t1 w_n1^(f1 t1)  x[t]

Each sum runs over one digit of the position, for all later digits and all channels at once, and its matrix depends on
the digits of the frequency that are known by then: twiddle factors are part of the matrices, not a pass of their own.
Positions stay rows and channels columns, so nothing is transposed that has channels.

Frequencies lie half-way between the usual ones, f + 1/2, where convolutions change the sign of what wraps round, and no
one looks at that. Then all of them come in pairs of conjugates, and half of those of the first digit stand for all: no
frequency 0 or n / 2 that is real and has no partner.

Letters besides those of the style guide: n size of the DFT · t, f digits of position, frequency, g the one that a
product adds · P, Q real and imaginary part before and behind it · x columns: later digits and channels.

Source: Cooley & Tukey 1965; Fu et al. 2023, arXiv:2310.12109, section 4 and arXiv:2311.05908 (FlashFFTConv). Half
frequencies: the right-angle convolution of Crandall & Fagin 1994, Discrete weighted transforms.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# DFT sizes up to which one dense matrix is the transform, and up to which two factors are. In units of 128 x 128, as a
# TPU has, one of 1,024 rows takes no longer than two of 32, and spares a pass through memory.
ORDER_1_LIMIT, ORDER_2_LIMIT = 1 << 10, 1 << 15
# A TPU's tiles have 8 rows: digits that are multiples of it need no copy.
ROWS = 8


def monarch_size(least: int) -> int:
    """The smallest size from `least` on whose factors fill tiles."""
    if least <= ORDER_1_LIMIT:
        unit = 2 * ROWS
    elif least <= ORDER_2_LIMIT:
        unit = 512 if least <= 2048 else 1024
    else:
        unit = 8192
    return -(-least // unit) * unit


def monarch_factors(n: int) -> tuple[int, ...]:
    """One to three factors of an even n, those of equal products; the first is even, and about twice the others.

    Half of the first one's frequencies stand for all, and where a signal is padded to twice its length, half of its
    positions are zeros.
    """
    if n <= ORDER_1_LIMIT:
        return (n,)
    if n <= ORDER_2_LIMIT:
        first = _divisor(n, math.sqrt(2 * n), 2)
        return first, n // first
    first = _divisor(n, 2 * math.cbrt(n), 2)
    second = _divisor(n // first, math.sqrt(n // first), 1)
    return first, second, n // first // second


def _divisor(n: int, near: float, unit: int) -> int:
    """The divisor of n nearest to a number, a multiple of `unit`, and if possible of full tiles, as the rest is."""
    divisors = [f for f in range(unit, n + 1, unit) if n % f == 0]
    full = [f for f in divisors if f % (unit * ROWS) == 0 and n // f % ROWS == 0]
    return min(full or divisors, key=lambda f: abs(math.log(f / near)))


class MonarchDFT:
    """The DFT of n real positions, zeros behind those that are given.

    A spectrum is (b, f, 2, g, d): real and imaginary parts of the frequencies that stand for all, g their last digit. A
    band keeps the usual frequencies, and with them the circular convolution; without one, what wraps round in the
    signal of a product of spectra has the other sign.

    Args:
      n: size, even.
      kept: highest frequency of the band. None keeps all.
      precision: of the products.
    """

    def __init__(self, n: int, kept: int | None = None, precision: lax.PrecisionLike = lax.Precision.HIGHEST):
        self.n, self.precision, self.sizes = n, precision, monarch_factors(n)
        n1, *others = self.sizes
        self.first = np.arange(n1 // 2) + 0.5 if kept is None else np.arange(n1 // 2 + 1)
        self.band = None
        if kept is not None and not others:
            self.first = self.first[: kept + 1]
        f, period = self.first, n1
        self.steps = []
        for size in others:
            digits, period = np.arange(size), period * size
            if kept is not None and period == n:
                # The last digit counts frequencies n / size at a time: those that have any in the band.
                lowest = digits * (n // size)
                digits = digits[(lowest <= kept) | (lowest + n // size - 1 >= n - kept)]
            self.steps.append(_Step(f, digits, size, period))
            f = (f[:, None] + period // size * digits).reshape(-1)
        if kept is not None:
            self.band = (np.minimum(f, n - f) <= kept).reshape(-1, 1, len(self.steps[-1].digits if others else f), 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The spectrum of x (b, l, d), l <= n."""
        b, l, d = x.shape
        rest = self.n // self.sizes[0]
        rows = -(-l // rest)  # the other t1 are zero
        x = jnp.pad(x, ((0, 0), (0, rows * rest - l), (0, 0))).reshape(b, rows, rest * d)
        x = matrix_times(self._first(rows), x, self.precision)
        for step in self.steps:
            rest //= step.size
            x = x.reshape(b, len(step.frequencies), 2, step.size, rest * d)
            order = "bfgqx" if rest > 1 else "bfqgx"
            x = jnp.einsum(f"fqgpt,bfptx->{order}", step.matrix(x.dtype), x, precision=self.precision)
        return x if self.steps else x.reshape(b, 1, 2, -1, d)

    def inverse(self, x: jax.Array, out: int) -> jax.Array:
        """The first `out` positions of a spectrum's signal, b out d."""
        b, d = x.shape[0], x.shape[-1]
        if self.band is not None:
            x = jnp.where(self.band, x, 0)
        rest = 1
        for step in reversed(self.steps):
            order, parts = ("bfgqx", (len(step.digits), 2)) if rest > 1 else ("bfqgx", (2, len(step.digits)))
            x = x.reshape(b, len(step.frequencies), *parts, rest * d)
            x = jnp.einsum(f"fqgpt,{order}->bfptx", step.matrix(x.dtype), x, precision=self.precision)
            rest *= step.size
        rows = -(-out // rest)
        x = matrix_times(self._first(rows, self.n).T, x.reshape(b, -1, rest * d), self.precision)
        return x.reshape(b, rows * rest, d)[:, :out]

    def first_matrix(self, rows: int, back_over: int | None = None) -> np.ndarray:
        """The first product's matrix, (P, f, t), or the transpose of the last one's; see `analysis`."""
        return analysis(self.first, self.sizes[0], rows, back_over)

    def _first(self, rows: int, back_over: int | None = None) -> np.ndarray:
        """The first product's matrix; its rows are (f P) where others follow, else (P f)."""
        matrix = self.first_matrix(rows, back_over)
        return np.swapaxes(matrix, 0, 1 if self.steps else 0).reshape(-1, rows)


class GridDFT:
    """The DFT of real numbers on a grid, zeros behind those that are given: one factor for each axis, no twiddles.

    A spectrum is (b, f, 2, g, d), f of the rows and g of the columns. What wraps round along the rows' axis has the
    other sign in the signal of a product of spectra, along the columns' it has not.

    Args:
      rows, columns: sizes; that of the rows even.
      precision: of the products.
    """

    def __init__(self, rows: int, columns: int, precision: lax.PrecisionLike = lax.Precision.HIGHEST):
        self.rows, self.columns, self.precision = rows, columns, precision
        self.first = np.arange(rows // 2) + 0.5
        self.step = _Step(np.zeros(1), np.arange(columns), columns, columns)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The spectrum of x (b, r, c, d)."""
        b, r, c, d = x.shape
        matrix = np.swapaxes(analysis(self.first, self.rows, r), 0, 1).reshape(-1, r)
        x = matrix_times(matrix, x.reshape(b, r, c * d), self.precision).reshape(b, len(self.first), 2, c, d)
        w = self.step.matrix(x.dtype)[0, ..., :c]
        return jnp.einsum("qgpt,bfptd->bfqgd", w, x, precision=self.precision)

    def inverse(self, x: jax.Array, out: tuple[int, int]) -> jax.Array:
        """The first rows and columns of a spectrum's signal, (b, *out, d)."""
        (b, d), (r, c) = (x.shape[0], x.shape[-1]), out
        w = self.step.matrix(x.dtype)[0, ..., :c]
        x = jnp.einsum("qgpt,bfqgd->bfptd", w, x, precision=self.precision).reshape(b, -1, c * d)
        matrix = np.swapaxes(analysis(self.first, self.rows, r, self.rows * self.columns), 0, 1).reshape(-1, r)
        return matrix_times(matrix.T, x, self.precision).reshape(b, r, c, d)


class _Step(NamedTuple):
    """A product for a later digit of the position."""

    frequencies: np.ndarray
    """Those that are known before."""
    digits: np.ndarray
    """Those of the next digit, in units of period / size."""
    size: int
    """Values of the position's digit."""
    period: int
    """Size of the DFT of the digits so far, this one included."""

    def matrix(self, dtype) -> jax.Array:
        """(f, Q, g, P, t): for each frequency before, (Q g) x (P t). Its transpose is the way back, but for 1 / n."""
        t = np.arange(self.size)
        # One factor for frequencies before, one for the digit: their product would be a large constant in programs.
        turns = np.outer(self.frequencies, t) / self.period, np.outer(self.digits, t) / self.size
        (turn_re, turn_im), (re, im) = lax.optimization_barrier([_roots(part, dtype) for part in turns])
        turn_re, turn_im = turn_re[:, None], turn_im[:, None]  # f g t
        re, im = turn_re * re - turn_im * im, turn_re * im + turn_im * re
        return jnp.stack([jnp.stack([re, -im], 2), jnp.stack([im, re], 2)], 1)


def _roots(turns: np.ndarray, dtype) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary part of exp(-2 pi i turns)."""
    angle = -2 * np.pi * (turns % 1)
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def analysis(frequencies: np.ndarray, n: int, rows: int, back_over: int | None = None) -> np.ndarray:
    """The DFT of size n of `rows` real numbers, (P, f, t).

    Its transpose is the way back, if each frequency stands for its conjugate too, and all are divided by `back_over`.
    """
    angle = -2 * np.pi * (np.outer(frequencies, np.arange(rows)) % n) / n
    if back_over is None:
        return np.stack([np.cos(angle), np.sin(angle)])
    weight = np.where((frequencies == 0) | (frequencies == n / 2), 1, 2)[:, None] / back_over
    return np.stack([weight * np.cos(angle), weight * np.sin(angle)])


def matrix_times(matrix: np.ndarray, x: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """matrix (o, i) times x (b, i, columns)."""
    # A copy of the matrix for each b makes it a batched product, which needs no transposition of x.
    w = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (x.shape[0], *matrix.shape))
    return lax.dot_general(w, x, (((2,), (1,)), ((0,), (0,))), precision=precision)


def spectral_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of spectra (b, f, 2, g, d), real and imaginary parts."""
    (x_re, x_im), (y_re, y_im) = (x[:, :, 0], x[:, :, 1]), (y[:, :, 0], y[:, :, 1])
    return jnp.stack([x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re], axis=2)
