"""The gated long convolution as one kernel for TPUs: what lies between its inputs and its output never leaves VMEM.

    y = output_gate * (k * s + bias s)        s = input_gate * u

The DFT is that of `m2.monarch_dft`, one or two small matrices from the left. A program has all positions of one row in
128 channels, the lanes. Their digits (t1 t2) are rows, so that a product over t1 takes every n2-th row, and one over t2
the rows of one frequency f1: strided reads of 32-bit rows, which cost what others do. Nothing is transposed.

Between the two products the frequencies stand where the filter's spectrum is multiplied in. The backward pass has two
transforms instead of one, of s and of output_gate * dy, and adds the gradient of the filter's spectrum up over the rows
of the batch, which are the grid's inner axis.

Where inputs are of half precision, a product is three of bfloat16 (`m2.conv.dft_precision`). The three are one along
the axis that is summed over, (high high low) x (high low high): small matrices fill the units so.

Letters besides those of the style guide: n1, n2 sizes of the digits t1, t2 and f, g of position and frequency · P real
and imaginary part · r rows t1 that are there.

Source: Fu et al. 2023, arXiv:2311.05908 (FlashFFTConv: the same fusion for tensor cores).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Rows of a tile in 16 bits: what a product sums over is a multiple of it.
ROWS = 16
# Of a v5e's VMEM of 128 MiB.
VMEM_BYTES = 100 << 20


# Positions of a program, of several rows where rows are short; products that are written out one behind the other.
POSITIONS, UNROLL = 2048, 8


class _Sizes(NamedTuple):
    """What is known before any number is."""

    n: int
    n2: int
    """Values of t2; 1 where the DFT is one matrix."""
    f: int
    r: int
    half: bool
    rows: int
    """Rows of the batch in a program."""

    @property
    def length(self) -> int:
        """Positions, padding included."""
        return self.r * self.n2

    @property
    def chunk(self) -> int:
        """Positions that numbers are read and written for at a time."""
        return max(c for c in range(ROWS, 513, ROWS) if self.length % c == 0)


def forward(dft, u, k, bias, input_gate, output_gate, *, interpret: Any = False) -> jax.Array:
    """The gated convolution, as `m2.fft_conv` has it.

    Args:
      dft: an `m2.monarch_dft.MonarchDFT` of one or two factors, without a band.
      u: input (b, l, d), in 16 or 32 bits.
      k: filters (d, n), float32, as they stand in a circle in which what wraps round has the other sign.
      bias: (d,) or None.
      input_gate, output_gate: (b, l, d) or None.
      interpret: what `pallas_call` takes.

    Returns:
      y, in u's dtype.
    """
    planes = {"u": u, "input_gate": input_gate, "output_gate": output_gate}
    sizes, inputs = _prepare(dft, planes, bias, _spectrum(dft, k))
    (y,) = _call(_forward_kernel, sizes, inputs, {"y": inputs["u"]}, interpret)
    return y[: u.shape[0], : u.shape[1], : u.shape[2]]


def backward(dft, dy, u, k, bias, input_gate, output_gate, *, interpret: Any = False) -> tuple:
    """The gradients in u, k, bias, input_gate and output_gate, None where there is none; dy as y."""
    d = u.shape[2]
    spectrum, pull = jax.vjp(functools.partial(_spectrum, dft), k)
    planes = {"u": u, "input_gate": input_gate, "output_gate": output_gate, "dy": dy}
    sizes, inputs = _prepare(dft, planes, bias, spectrum)
    outputs = {f"d{name}": inputs[name] for name in ("u", "input_gate", "output_gate", "bias", "spectrum")}
    outputs = {name: x for name, x in outputs.items() if x is not None}
    grads = dict(zip(outputs, _call(_backward_kernel, sizes, inputs, outputs, interpret), strict=True))
    (dk,) = pull(grads["dspectrum"][..., :d] * (2 / dft.n))
    gates = [None if x is None else x[: u.shape[0], : u.shape[1], :d] for x in map(grads.get, _PLANE_GRADIENTS)]
    dbias = None if bias is None else grads["dbias"][0, :d].astype(bias.dtype)
    return gates[0], dk, dbias, *gates[1:]


_PLANE_GRADIENTS = "du", "dinput_gate", "doutput_gate"


def _spectrum(dft, k):
    """(f, P, g, d) of filters (d, n)."""
    return dft(k.T[None])[0]


def _prepare(dft, planes, bias, spectrum):
    """Sizes, and all inputs of a kernel by name, padded."""
    u = planes["u"]
    (b, l, d), (_, n2) = u.shape, (*dft.sizes, 1)[:2]
    r = -(-l // (n2 * ROWS)) * ROWS
    rows = max(rows for rows in range(1, b + 1) if b % rows == 0 and (rows == 1 or rows * r * n2 <= POSITIONS))
    sizes = _Sizes(dft.n, n2, len(dft.first), r, u.dtype.itemsize == 2, rows)
    lanes = (0, -d % LANES)
    pad = lambda x: None if x is None else jnp.pad(x, ((0, 0), (0, sizes.length - l), lanes))  # noqa: E731
    enter, leave = (dft.first_matrix(r, over).reshape(-1, r) for over in (None, dft.n))
    inputs = {name: pad(x) for name, x in planes.items()}
    inputs["bias"] = None if bias is None else jnp.pad(bias.astype(jnp.float32), lanes)[None]
    inputs["spectrum"] = jnp.pad(spectrum, ((0, 0), (0, 0), (0, 0), lanes))
    inputs |= {"enter": _wide(jnp.asarray(enter, jnp.float32), sizes.half)}
    inputs |= {"leave": _wide(jnp.asarray(leave.T, jnp.float32), sizes.half)}
    for step in dft.steps:
        across = step.matrix(jnp.float32).reshape(sizes.f, 2 * n2, 2 * n2)
        inputs |= {"across": _wide(across, sizes.half), "back": _wide(jnp.swapaxes(across, 1, 2), sizes.half)}
    return sizes, inputs


def _call(kernel, sizes, inputs, outputs, interpret):
    """The kernel's outputs, each of the shape and dtype of the array that it is given by."""
    inputs = {name: x for name, x in inputs.items() if x is not None}
    b, length, d = inputs["u"].shape

    def spec(name, x, out=False):
        if x.ndim == 3 and x.shape == (b, length, d) and name not in ("enter", "leave", "across", "back"):
            return pl.BlockSpec((sizes.rows, length, LANES), lambda i, j: (j, 0, i))
        if name in ("bias", "dbias"):
            return pl.BlockSpec((1, LANES), lambda i, j: (0, i))
        if name in ("spectrum", "dspectrum"):
            return pl.BlockSpec((*x.shape[:3], LANES), lambda i, j: (0, 0, 0, i))
        return pl.BlockSpec(x.shape, lambda i, j: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

    transformed = pltpu.VMEM((2 * sizes.f * sizes.n2, LANES), jnp.float32)
    positions = pltpu.VMEM((length, LANES), jnp.float32)
    pairs = 1 if kernel is _forward_kernel else 2
    scratch = {f"{name}{i}": kind for i in range(pairs) for name, kind in (("x", transformed), ("s", positions))}
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        kernel(sizes, dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        body,
        grid=(d // LANES, b // sizes.rows),
        in_specs=[spec(name, x) for name, x in inputs.items()],
        out_specs=[spec(name, x) for name, x in outputs.items()],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(*inputs.values())


def _forward_kernel(sizes, refs):
    x, s = refs["x0"], refs["s0"]

    def row(i, _):
        def gate(at):
            s[at] = _gated(refs, "u", "input_gate", i, at)

        _chunks(sizes, gate)
        _enter(sizes, refs, s, x)

        def multiply(f, re, im):
            k_re, k_im = refs["spectrum"][f, 0], refs["spectrum"][f, 1]
            return re * k_re - im * k_im, re * k_im + im * k_re

        _filter(sizes, refs, [x], lambda f, spectra: [multiply(f, *spectra[0])])
        _leave(sizes, refs, x, s)

        def finish(at):
            y = s[at]
            if "bias" in refs:
                y = y + refs["bias"][...] * _gated(refs, "u", "input_gate", i, at)
            if "output_gate" in refs:
                y = y * refs["output_gate"][i, at].astype(jnp.float32)
            refs["y"][i, at] = y.astype(refs["y"].dtype)

        _chunks(sizes, finish)

    _loop(sizes.rows, row)


def _backward_kernel(sizes, refs):
    """s, and t = output_gate * dy, each go through a transform; with the filter's K, S and T their spectra.

    conv(s) from K S        its transpose of t from conj(K) T        the gradient of K: conj(S) T
    """
    xs, xt, s, t = refs["x0"], refs["x1"], refs["s0"], refs["s1"]

    @pl.when(pl.program_id(1) == 0)
    def _():
        refs["dspectrum"][...] = jnp.zeros_like(refs["dspectrum"])
        if "bias" in refs:
            refs["dbias"][...] = jnp.zeros_like(refs["dbias"])

    def row(i, _):
        def gate(at):
            s[at] = _gated(refs, "u", "input_gate", i, at)
            t[at] = _gated(refs, "dy", "output_gate", i, at)

        _chunks(sizes, gate)
        _enter(sizes, refs, s, xs)
        _enter(sizes, refs, t, xt)

        def multiply(f, spectra):
            (s_re, s_im), (t_re, t_im) = spectra
            k_re, k_im = refs["spectrum"][f, 0], refs["spectrum"][f, 1]
            refs["dspectrum"][f, 0] += s_re * t_re + s_im * t_im
            refs["dspectrum"][f, 1] += s_re * t_im - s_im * t_re
            convolved = s_re * k_re - s_im * k_im, s_re * k_im + s_im * k_re
            return [convolved, (t_re * k_re + t_im * k_im, t_im * k_re - t_re * k_im)]

        _filter(sizes, refs, [xs, xt], multiply)
        if "output_gate" in refs:
            _leave(sizes, refs, xs, s)
        _leave(sizes, refs, xt, t)

        def finish(at):
            gated, weighted = _gated(refs, "u", "input_gate", i, at), _gated(refs, "dy", "output_gate", i, at)
            ds, y = t[at], s[at]
            if "bias" in refs:
                ds, y = ds + refs["bias"][...] * weighted, y + refs["bias"][...] * gated
                refs["dbias"][...] += jnp.sum(gated * weighted, axis=0, keepdims=True)
            if "output_gate" in refs:
                dy = refs["dy"][i, at].astype(jnp.float32)
                refs["doutput_gate"][i, at] = (dy * y).astype(refs["doutput_gate"].dtype)
            if "input_gate" in refs:
                u = refs["u"][i, at].astype(jnp.float32)
                refs["dinput_gate"][i, at] = (ds * u).astype(refs["dinput_gate"].dtype)
                ds = ds * refs["input_gate"][i, at].astype(jnp.float32)
            refs["du"][i, at] = ds.astype(refs["du"].dtype)

        _chunks(sizes, finish)

    _loop(sizes.rows, row)


def _gated(refs, name, gate, i, at):
    x = refs[name][i, at].astype(jnp.float32)
    return x * refs[gate][i, at].astype(jnp.float32) if gate in refs else x


def _enter(sizes, refs, s, x):
    """x (t2 P f) from positions s (t1 t2)."""

    def digit(t, _):
        x[pl.ds(t * 2 * sizes.f, 2 * sizes.f)] = _times(refs["enter"][...], s[pl.ds(t, sizes.r, stride=sizes.n2)])

    _loop(sizes.n2, digit)


def _leave(sizes, refs, x, s):
    """The way back."""

    def digit(t, _):
        s[pl.ds(t, sizes.r, stride=sizes.n2)] = _times(refs["leave"][...], x[pl.ds(t * 2 * sizes.f, 2 * sizes.f)])

    _loop(sizes.n2, digit)


def _filter(sizes, refs, signals, multiply):
    """`multiply(f, spectra)` of real and imaginary parts, (g, 128) each, of all signals (t2 P f), which it replaces."""
    if sizes.n2 == 1:
        parts = pl.ds(0, sizes.f), pl.ds(sizes.f, sizes.f)
        for x, (re, im) in zip(signals, multiply(0, [(x[parts[0]], x[parts[1]]) for x in signals]), strict=True):
            x[parts[0]], x[parts[1]] = re, im
        return

    def frequency(f, _):
        re, im = (pl.ds(part * sizes.f + f, sizes.n2, stride=2 * sizes.f) for part in range(2))
        spectra = [_times(refs["across"][f], jnp.concatenate([x[re], x[im]])) for x in signals]
        spectra = multiply(f, [(z[: sizes.n2], z[sizes.n2 :]) for z in spectra])
        for x, parts in zip(signals, spectra, strict=True):
            z = _times(refs["back"][f], jnp.concatenate(parts))
            x[re], x[im] = z[: sizes.n2], z[sizes.n2 :]

    _loop(sizes.f, frequency)


def _times(matrix, x):
    """matrix (o, i) times x (i, 128): float32, or of half precision a `_wide` matrix."""
    if matrix.dtype == jnp.float32:
        return jnp.dot(matrix, x, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    high, low = _split(x)
    return jnp.dot(matrix, jnp.concatenate([high, low, high]), preferred_element_type=jnp.float32)


def _wide(matrix, half):
    """A matrix (..., o, i), or its parts side by side, high, high and low, (..., o, 3 i)."""
    if not half:
        return matrix
    high, low = _split(matrix)
    return jnp.concatenate([high, high, low], axis=-1)


def _split(x):
    """Float32 as the sum of two bfloat16, to 16 bits of the mantissa."""
    # By bits: a cast there and back is optimised away.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type((bits + (1 << 15)) & ~0xFFFF, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _chunks(sizes, run):
    """run(at) for all positions, `sizes.chunk` of them at a time."""

    def step(i, _):
        run(pl.ds(pl.multiple_of(i * sizes.chunk, ROWS), sizes.chunk))

    lax.fori_loop(0, sizes.length // sizes.chunk, step, None)


def _loop(n, run):
    """run(i, None) for i < n, some of them written out one behind the other."""
    unroll = max(u for u in range(1, UNROLL + 1) if n % u == 0)

    def step(i, _):
        for j in range(unroll):
            run(i * unroll + j, None)

    if n == unroll:
        step(0, None)
    else:
        lax.fori_loop(0, n // unroll, step, None)
