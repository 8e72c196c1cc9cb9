"""Convolutions over an image: filters as large as the image in O(x y log(x y)), and those of a few taps a side.

Letters besides those of the style guide: x rows and y columns of the image · m, n taps along them.

Source: the two-sided long convolution of m2's `fftconv_ref` (Fu et al. 2023, arXiv:2310.12109), along both axes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2.apart import apart
from m2.conv import HALF_SIZE_LIMIT, Blocks, Implementation, dft_precision, fft_size, gated_conv, half_fft, half_ifft
from m2.forward_mode import by_hand
from m2.monarch_dft import GridDFT, spectral_product
from m2.sequence_cut import by_channels, cut_of

# As in `m2.conv`, measured for two axes.
BLOCK_BYTES = 1 << 18


def fft_conv2d(
    u: Float[Array, "b x y d"],
    k: Float[Array, "d m n"],
    *,
    bias: Float[Array, "d"] | None = None,
    input_gate: Float[Array, "b x y d"] | None = None,
    output_gate: Float[Array, "b x y d"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b x y d"]:
    """Convolves every channel of an image with its own filter, of any size, that looks to every side.

        out_rc = sum_ij K_ij s_(r-i, c-j) + bias s_rc         with s = input_gate * u
                                                              i from -m/2 to m/2 - 1, j from -n/2 to n/2 - 1
        and, where there is an output gate, out_rc * output_gate_rc

    Beyond the image all is zero: nothing wraps. Taps that reach beyond an edge do nothing. Gates and the sum with
    `bias` are fused with the convolution, whose backward pass keeps nothing but the inputs and computes the rest again.
    All is computed in at least float32: half precision only enters and leaves.

    Args:
      u: input, any grid.
      k: filters, m and n even. Along each axis as in the bidirectional `fft_conv`: the first half are the taps at lags
        0, 1, ..., which multiply inputs so many rows above or columns to the left, and the others, read from the end,
        those at lags -1, -2, ... So a circular convolution of size (2 x, 2 y) with k of that size is this, on padded
        input.
      bias: weight of the input itself.
      input_gate: multiplies the input before the convolution.
      output_gate: multiplies the output, the bias's part included.
      implementation: "xla"; "monarch", the DFT as one matrix for each axis, O((x y)^1.5) for square images; or None for
        what suits the platform that the program is compiled for: "monarch" on a TPU, "xla" elsewhere.

    Returns:
      The output, in u's dtype.

    Raises:
      ValueError: shapes that disagree, or a filter with an odd number of taps along an axis.
      NotImplementedError: implementation="pallas", which has no second axis.

    Examples:
      >>> u = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> k = jnp.zeros((1, 2, 2)).at[0, 0, 0].set(2)  # the tap of a place itself
      >>> bool(jnp.allclose(m2.fft_conv2d(u, k), 2 * u, atol=1e-5))
      True

    Source: m2's `fftconv_ref` along both axes.
    """
    b, x, y, d = u.shape
    if k.ndim != 3 or k.shape[0] != d:
        raise ValueError(f"k has shape {k.shape}, expected (d, m, n) with d={d}")
    if k.shape[1] % 2 or k.shape[2] % 2:
        raise ValueError(f"k has {k.shape[1]} x {k.shape[2]} taps, expected even numbers: half of them on each side")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias has shape {bias.shape}, expected (d,) with d={d}")
    for name, gate in (("input_gate", input_gate), ("output_gate", output_gate)):
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"{name} has shape {gate.shape}, expected that of u, {u.shape}")
    if b == 0:
        return u
    if 0 in (x, y, *k.shape):
        raise ValueError(f"u has shape {u.shape} and k {k.shape}, expected at least one place and one tap")
    gates = (None if a is None else a.reshape(b, x * y, d) for a in (input_gate, output_gate))
    options: dict[str, Any] = dict(zip(("input_gate", "output_gate"), gates, strict=True))
    options |= {"bias": bias, "implementation": implementation}
    return conv_places(u.reshape(b, x * y, d), k, (x, y), **options).reshape(u.shape)


def conv_places(
    u: Float[Array, "b l d"],
    k: Float[Array, "d m n"],
    grid: tuple[int, int],
    *,
    bias: Float[Array, "d"] | None = None,
    input_gate: Float[Array, "b l d"] | None = None,
    output_gate: Float[Array, "b l d"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b l d"]:
    """`fft_conv2d` of images that are the l places of a grid, row by row."""
    if implementation == "pallas":
        raise NotImplementedError("implementation='pallas' has one axis, expected 'xla', 'monarch' or None in an image")
    if implementation not in (None, "xla", "monarch"):
        raise ValueError(f"implementation={implementation!r}, expected 'xla', 'monarch' or None")
    if (cut := cut_of(u)) is not None:
        # Rows of an image are no pieces of its places: whole images, a part of the channels on each device.
        wide = jnp.promote_types(u.dtype, jnp.float32)
        s = u.astype(wide) if input_gate is None else u.astype(wide) * input_gate.astype(wide)
        run = functools.partial(conv_places, implementation=implementation)
        y = by_channels(lambda s, filters, *_: run(s, filters[0], grid, bias=filters[1]), cut, s, (k, bias))
        return (y if output_gate is None else y * output_gate.astype(wide)).astype(u.dtype)
    rows, columns = _Axis.over(grid[0], k.shape[1]), _Axis.over(grid[1], k.shape[2])
    axes = ("b l d", "d m", "d", "b l d", "b l d", "b l")
    inputs = u, k.reshape(len(k), -1), bias, input_gate, output_gate, None

    def convolve(u, *more):  # of a device's own rows and channels
        blocks = Blocks.of(u.shape[2], u.shape[0], rows.padded * columns.padded, u.dtype, BLOCK_BYTES)
        plan = _Plan(rows, columns, implementation, jnp.dtype(u.dtype), blocks)
        return by_hand(gated_conv, "m2.fft_conv2d")(plan, u, *more)

    return apart(convolve, inputs, axes, "b l d", channels="d")


class _Axis(NamedTuple):
    """One axis of a convolution."""

    size: int
    taps: int
    earlier: int
    """Taps at lags 0, 1, ... that reach a place."""
    later: int
    """Taps at lags -1, -2, ... that do."""
    padded: int
    """Size of the FFT."""

    @classmethod
    def over(cls, size: int, taps: int) -> "_Axis":
        earlier, later = min(taps // 2, size), min(taps // 2, size - 1)
        return cls(size, taps, earlier, later, fft_size(size + max(later, earlier - 1)))

    def wrap(self, k: jax.Array, axis: int, sign: int = 1) -> jax.Array:
        """The taps along an axis of the FFT's size, lag j at j modulo it, with a sign where it wraps round."""
        k = jnp.moveaxis(k, axis, -1)
        gap = jnp.zeros((*k.shape[:-1], self.padded - self.earlier - self.later), k.dtype)
        k = jnp.concatenate([k[..., : self.earlier], gap, sign * k[..., self.taps - self.later :]], axis=-1)
        return jnp.moveaxis(k, -1, axis)


class _Plan(NamedTuple):
    """What is known before any number is."""

    rows: _Axis
    columns: _Axis
    implementation: Implementation | None
    dtype: jnp.dtype
    """That of the inputs."""
    blocks: Blocks
    platform: str = ""
    """What the program is compiled for. Set where that is known, in `gated_conv`, as `implementation` is."""

    def convolve(self, s: jax.Array, k: jax.Array, runs: None) -> jax.Array:
        """The convolution itself, s (b, l, d) with k (d, taps), places and taps row by row, in the dtype of both."""
        rows, columns = self.rows, self.columns
        k = k.reshape(-1, rows.taps, columns.taps)
        if self.implementation == "monarch":
            dft = GridDFT(rows.padded, columns.padded, dft_precision(self.dtype, self.platform))
            k = jnp.moveaxis(columns.wrap(rows.wrap(k, 1, -1), 2), 0, 2)[None]
            image = s.reshape(s.shape[0], rows.size, columns.size, -1)
            return dft.inverse(spectral_product(dft(image), dft(k)), (rows.size, columns.size)).reshape(s.shape)
        image = jnp.swapaxes(s, 1, 2).reshape(s.shape[0], s.shape[2], rows.size, columns.size)
        # One axis after the other, so that rows that are nothing but padding are not transformed.
        halves = self.platform == "cpu" and 2 * rows.padded * columns.padded <= HALF_SIZE_LIMIT
        along, back = (half_fft, half_ifft) if halves else (jnp.fft.rfft, _irfft)
        fft = lambda image: jnp.fft.fft(along(image, columns.padded), rows.padded, axis=-2)  # noqa: E731
        k = columns.wrap(rows.wrap(k, 1), 2, -1 if halves else 1)
        out = back(jnp.fft.ifft(fft(image) * fft(k), axis=-2)[..., : rows.size, :], columns.padded, columns.size)
        return jnp.swapaxes(out.reshape(s.shape[0], k.shape[0], rows.size * columns.size), 1, 2)


def _irfft(spectrum: jax.Array, n: int, out: int) -> jax.Array:
    """The first `out` positions of a real sequence of size n."""
    return jnp.fft.irfft(spectrum, n)[..., :out]


def direct_conv2d(u: Float[Array, "b x y d"], k: Float[Array, "d m n"]) -> Float[Array, "b x y d"]:
    """A convolution tap by tap, for filters of a few taps, centred.

        out_rc = sum_ij k_ij u_(r + i - m // 2, c + j - n // 2)

    The first tap multiplies the input above and to the left, as in PyTorch. Beyond the image all is zero.
    """
    (_, x, y, _), (_, m, n) = u.shape, k.shape
    padded = jnp.pad(u, ((0, 0), (m // 2, m - 1 - m // 2), (n // 2, n - 1 - n // 2), (0, 0)))
    terms = (padded[:, i : i + x, j : j + y] * k[:, i, j] for i in range(m) for j in range(n))
    return functools.reduce(jnp.add, terms)
