"""The long convolution: filters as long as the sequence, in O(l log l), causal or looking both ways.

Three ways to the same numbers. "xla" multiplies FFTs: real ones of size n, or on a CPU complex ones of size n / 2,
which XLA has faster there. Those give a convolution in which what wraps round changes its sign, and no one looks at
that: with w = exp(i pi / n), w^(n / 2) = i, the cyclic convolution of two sequences

    z_t = w^t (x_t + i x_(t + n/2))        t < n / 2

is the sequence of the same form that belongs to their product as polynomials modulo X^n + 1.

"monarch" writes the FFT as a product of small matrices (`m2.monarch_dft`), for units that multiply matrices. A TPU's
default: XLA's FFT takes a minute to compile for one, and longer to run. "pallas" is the same with gates and filter in
one kernel for TPUs (`m2/kernels/gated_conv_tpu.py`).

Letters besides those of the style guide: m taps of a filter · n size of the FFT.

Source: Fu et al. 2023, arXiv:2310.12109, section 4 and arXiv:2311.05908 (FlashFFTConv: orders, gating, partial and
frequency-sparse convolutions). The transforms of half the size: the right-angle convolution of Crandall & Fagin 1994,
Discrete weighted transforms and large-integer arithmetic.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from m2.absent import blank
from m2.apart import apart
from m2.cut_conv import cut_conv
from m2.forward_mode import by_hand, in_forward_mode
from m2.monarch_dft import ORDER_2_LIMIT, MonarchDFT, monarch_size, spectral_product
from m2.sequence_cut import cut_of

Implementation = Literal["xla", "monarch", "pallas"]

# Positions that a packed row is cut into before its halves are joined by FFTs: inside, taps are added one by one.
DIRECT_POSITIONS = 16
# On a CPU, channels are taken in blocks whose padded input has at most so many bytes, so that spectra stay in the
# cache, but of at least so many channels, which lie side by side in memory: a cache line. (A compiler that counts FLOPs
# counts a loop once: to count them, make one block of all.)
BLOCK_BYTES, LEAST_BLOCK = 1 << 16, 16
# Elsewhere so many bytes, so that temporaries do not fill the memory, and a TPU's 128 lanes at least.
DEVICE_BLOCK_BYTES, DEVICE_LEAST_BLOCK = 1 << 27, 128
# On a CPU, real FFTs instead of half as long complex ones above this size. XLA runs several complex ones side by side,
# which leave the cache from there on.
HALF_SIZE_LIMIT = 1 << 16
# What the kernel takes as `interpret` on any platform, or None: it runs on TPUs alone. For tests.
INTERPRET: Any = None


def fft_conv(
    u: Float[Array, "b l d"],
    k: Float[Array, "d m"],
    *,
    bias: Float[Array, "d"] | None = None,
    causal: bool = True,
    input_gate: Float[Array, "b l d"] | None = None,
    output_gate: Float[Array, "b l d"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    bandwidth: float = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, "b l d"]:
    """Convolves every channel with its own filter, of any length.

        causal:         y_t = sum_(0 <= j <= t) k_j s_(t-j) + bias s_t        with s = input_gate * u
        bidirectional:  y_t = sum_j K_j s_(t-j) + bias s_t                    j from -m/2 to m/2 - 1
        and, where there is an output gate, y_t * output_gate_t

    A filter shorter than the sequence (a partial convolution) costs O(l log m); taps that reach beyond either end do
    nothing. Gates, masks and the sum with `bias` are fused with the convolution, whose backward pass keeps nothing but
    the inputs and computes the rest again. All is computed in at least float32: half precision only enters and leaves.

    Args:
      u: input, any length; also one that is not known yet (`jax.export`): the row is then cut into blocks of about m
        positions, so that a program with filters as long as the longest row serves every shorter one at its cost.
      k: filters. Causal: tap j, k[:, j], multiplies the input j positions earlier. Bidirectional: m is even; the first
        m / 2 taps are the same, and the others, read from the end, multiply the inputs 1, 2, ... positions later:
        k[:, -1] the next one. So a circular convolution of size 2 l with k of m = 2 l is this, on padded input.
      bias: weight of the input itself, the D of state spaces.
      causal: which of the two.
      input_gate: multiplies the input before the convolution.
      output_gate: multiplies the output, the bias's part included.
      mask: False where a position is not there, whatever lies there: it and its gates count as zero. Exact where
        padding is at the ends; positions behind a gap still see it as a gap.
      segment_ids: documents packed in a row, each a run of equal ids: no tap reaches into another run. Costs a factor
        of about log2(l / 16) / 2 more.
      bandwidth: share of the frequencies that the filter keeps, the lowest: below 1 the response above
        `bandwidth` times the Nyquist frequency is zero, in the FFT of the size that is used, and "monarch" skips the
        rows that this empties. A filter cut so is no longer exactly causal, nor exactly as long as it was.
      implementation: "xla", "monarch", or None for what suits the platform that the program is compiled for: "monarch"
        on a TPU, "xla" elsewhere. "pallas": a kernel in a program for a TPU, and what suits other platforms on those.

    Returns:
      y, in u's dtype.

    Raises:
      ValueError: shapes that disagree, a bidirectional filter with an odd number of taps, a bandwidth outside (0, 1],
        or one below 1 with segment_ids or with a filter shorter than the sequence.
      NotImplementedError: "pallas" with segment_ids, a bandwidth below 1, float64, or more positions than a row's
        transform has in VMEM: 16,384 with those that the filter looks ahead. On a v5p, which has half of a v5e's VMEM,
        the compiler refuses the gradient above 4,096 positions (RESOURCE_EXHAUSTED).

    Examples:
      >>> u = jnp.arange(4.0).reshape(1, 4, 1)
      >>> y = m2.fft_conv(u, jnp.array([[1.0, 1.0]]))  # each with the one before
      >>> jnp.round(y)[0, :, 0].astype(int).tolist()
      [0, 1, 3, 5]

    Source: m2's `fftconv_ref` (two-sided kernels, D) and FlashFFTConv (gates, partial, frequency-sparse).
    """
    b, l, d = u.shape
    if k.ndim != 2 or k.shape[0] != d:
        raise ValueError(f"k has shape {k.shape}, expected (d, m) with d={d}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias has shape {bias.shape}, expected (d,) with d={d}")
    for name, gate in (("input_gate", input_gate), ("output_gate", output_gate)):
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"{name} has shape {gate.shape}, expected that of u, {u.shape}")
    for name, positions in (("mask", mask), ("segment_ids", segment_ids)):
        if positions is not None and positions.shape != (b, l):
            raise ValueError(f"{name} has shape {positions.shape}, expected (b, l) = ({b}, {l})")
    if not causal and k.shape[1] % 2:
        raise ValueError(f"k has {k.shape[1]} taps, expected an even number: half of them on each side")
    if not 0 < bandwidth <= 1:
        raise ValueError(f"bandwidth={bandwidth}, expected 0 < bandwidth <= 1")
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"implementation={implementation!r}, expected 'xla', 'monarch', 'pallas' or None")

    # Taps that reach beyond an end are left out, lag 0 is always there.
    taps = k.shape[1] if causal else k.shape[1] // 2
    known = isinstance(l, int)
    earlier, later = taps, 0 if causal else taps
    if known:
        earlier, later = min(earlier, l), min(later, max(l - 1, 0))
    if not known and segment_ids is not None:
        raise ValueError(f"u has l={l} positions and segment_ids, expected a known number of them with segment_ids")
    if bandwidth < 1 and (segment_ids is not None or not known or taps < l):
        what = "segment_ids" if segment_ids is not None else f"a filter of {taps} taps a side for {l} positions"
        raise ValueError(f"bandwidth={bandwidth} and {what}: a band is cut from one FFT over the whole sequence alone")
    if k.shape[1] == 0:
        raise ValueError(f"k has shape {k.shape}, expected at least one tap")
    if 0 in u.shape:
        return u
    if (cut := cut_of(u)) is not None:
        run = functools.partial(fft_conv, causal=causal, bandwidth=bandwidth, implementation=implementation)
        wide, reach = jnp.promote_types(u.dtype, jnp.float32), (earlier - 1, later) if bandwidth == 1 else None
        s = blank(mask, u).astype(wide)
        s = s if input_gate is None else s * blank(mask, input_gate).astype(wide)
        y = cut_conv(run, cut, s, k, bias, segment_ids, reach)
        return (y if output_gate is None else y * blank(mask, output_gate).astype(wide)).astype(u.dtype)
    if implementation == "pallas":
        for reason, limit in (
            ("segment_ids", segment_ids is not None),
            (f"bandwidth={bandwidth}", bandwidth < 1),
            (f"{jnp.dtype(u.dtype)}", jnp.dtype(u.dtype).itemsize > 4),
            (f"l={l} positions that are not known", not known),
            (
                f"{l} positions and a filter of {taps} taps a side",
                known and l + max(later, earlier - 1) > ORDER_2_LIMIT,
            ),
        ):
            if limit:
                raise NotImplementedError(f"implementation='pallas' with {reason}, which the kernel does not have")
    size = fft_size(l + max(later, earlier - 1)) if known else 2 * _block_positions(earlier + later - 1)
    runs = None
    if segment_ids is not None:
        runs = segment_runs(segment_ids)
    u = blank(mask, u)
    input_gate, output_gate = (None if gate is None else blank(mask, gate) for gate in (input_gate, output_gate))
    axes = ("b l d", "d m", "d", "b l d", "b l d", "b l")
    inputs = u, k, bias, input_gate, output_gate, runs

    def convolve(u, *more):  # of a device's own rows and channels
        blocks = Blocks.of(u.shape[2], u.shape[0], size, u.dtype, BLOCK_BYTES)
        plan = _Plan(earlier, later, bandwidth, implementation, jnp.dtype(u.dtype), blocks)
        return by_hand(gated_conv, "m2.fft_conv")(plan, u, *more)

    return apart(convolve, inputs, axes, "b l d", channels="d")


class _Plan(NamedTuple):
    """What is known before any number is."""

    earlier: int
    """Taps at lags 0, 1, ..."""
    later: int
    """Taps at lags -1, -2, ..."""
    bandwidth: float
    implementation: Implementation | None
    dtype: jnp.dtype
    """That of the inputs."""
    blocks: "Blocks"
    platform: str = ""
    """What the program is compiled for. Set where that is known, in `gated_conv`, as `implementation` is."""

    def convolve(self, s: jax.Array, k: jax.Array, runs: jax.Array | None) -> jax.Array:
        """The convolution itself, s (b, l, d) with k (d, m), in the dtype of both."""
        return _convolve(self, s, k, runs)


class Blocks(NamedTuple):
    """How many channels are taken at a time, on each platform."""

    cpu: int
    device: int

    @classmethod
    def of(cls, d: int, rows: Any, positions: int, dtype, cpu_bytes: int) -> "Blocks":
        """Of d channels of a dtype, where each has so many positions in each row, padding included.

        `rows` of the batch may be a symbol (`jax.export`) that becomes any number, and counts as one then.
        """
        rows = rows if isinstance(rows, int) else 1
        channel = rows * positions * jnp.promote_types(dtype, jnp.float32).itemsize
        even = lambda most: -(-d // -(-d // most))  # noqa: E731  blocks of about the same size
        device = even(max(DEVICE_LEAST_BLOCK, DEVICE_BLOCK_BYTES // channel))
        full = -(-device // DEVICE_LEAST_BLOCK) * DEVICE_LEAST_BLOCK
        return cls(even(max(LEAST_BLOCK, cpu_bytes // channel)), min(d, full))


def dft_precision(dtype, platform: str) -> lax.Precision:
    """What the products of a DFT are multiplied in, where the convolution's inputs have a dtype.

    Float32 stays float32. Where inputs have 8 bits or 11, three bfloat16 products a product on a TPU lose 2^-16.
    """
    return lax.Precision.HIGH if platform == "tpu" and jnp.dtype(dtype).itemsize == 2 else lax.Precision.HIGHEST


def _gated_conv(plan, u, k, bias, input_gate, output_gate, runs):
    """output_gate * (plan.convolve(input_gate * u, k, runs) + bias input_gate * u).

    `plan.blocks` channels at a time, with `plan.platform` and `plan.implementation` set.
    """

    def run(plan, *inputs):
        return _gated_block(plan, *inputs, runs)

    return _by_channels(plan, run, (u, k, bias, input_gate, output_gate), u, _run_kernel)


gated_conv = jax.custom_vjp(_gated_conv, nondiff_argnums=(0,))


def _gated_forward(plan, *inputs):
    return _gated_conv(plan, *inputs), inputs


def _gated_backward(plan, inputs, dy):
    # The convolution is linear in the input and in the filter, so its derivative is itself, run again on what is kept:
    # spectra and products live no longer than this function. The barrier keeps the compiler from sharing the forward
    # pass's after all.
    *inputs, runs = lax.optimization_barrier(inputs)

    def pull(plan, dy, *inputs):
        return jax.vjp(lambda *inputs: _gated_block(plan, *inputs, runs), *inputs)[1](dy)

    gradients = _by_channels(plan, pull, (dy, *inputs), tuple(inputs), _pull_kernel)
    return *gradients, None if runs is None else np.zeros(runs.shape, jax.dtypes.float0)


gated_conv.defvjp(_gated_forward, _gated_backward)


def _by_channels(plan, run, inputs, like, kernel):
    """run(plan, *inputs), in the way of the platform that the program is compiled for; results are shaped as `like`.

    `kernel(plan, *inputs)` does the same for "pallas".
    """
    d = inputs[0].shape[2]

    def on(platform, default, block):
        chosen = default if plan.implementation in (None, "pallas") else plan.implementation
        here = plan._replace(platform=platform, implementation=chosen)
        in_kernel = plan.implementation == "pallas" and (platform == "tpu" or INTERPRET is not None)
        if in_kernel and not in_forward_mode():
            return kernel(here, *inputs)
        if block == d:
            return run(here, *inputs)

        # The last block starts where it still fits: some channels may be computed twice.
        def step(i, results):
            place = lambda x: (i * block, 2 if x.ndim == 3 else 0)  # noqa: E731  b l d; d m and d
            take = lambda x: lax.dynamic_slice_in_dim(x, place(x)[0], block, place(x)[1])  # noqa: E731
            put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, *place(x))  # noqa: E731
            return jax.tree.map(put, results, run(here, *jax.tree.map(take, inputs)))

        return lax.fori_loop(0, -(-d // block), step, jax.tree.map(jnp.zeros_like, like))

    return lax.platform_dependent(
        cpu=lambda: on("cpu", "xla", plan.blocks.cpu),
        tpu=lambda: on("tpu", "monarch", plan.blocks.device),
        default=lambda: on("gpu", "xla", plan.blocks.device),
    )


def _run_kernel(plan, u, k, bias, *gates):
    from m2.kernels import gated_conv_tpu  # here: importing m2 does not import Pallas

    dft = _kernel_dft(plan, u.shape[1])
    filters = _filters_around(plan, k, dft.n)
    return gated_conv_tpu.forward(dft, u, filters, bias, *gates, interpret=INTERPRET or False)


def _pull_kernel(plan, dy, u, k, bias, *gates):
    from m2.kernels import gated_conv_tpu

    dft = _kernel_dft(plan, u.shape[1])
    filters, pull = jax.vjp(lambda k: _filters_around(plan, k, dft.n), k)
    du, dfilters, *others = gated_conv_tpu.backward(dft, dy, u, filters, bias, *gates, interpret=INTERPRET or False)
    return du, *pull(dfilters), *others


def _kernel_dft(plan, l):
    return MonarchDFT(monarch_size(_least_size(plan, l)), None, dft_precision(plan.dtype, plan.platform))


def _filters_around(plan, k, n):
    """Filters as they stand in a circular convolution in which what wraps round has the other sign, float32."""
    return _around(plan, _taps(plan, k.astype(jnp.float32)), n, -1)


def _gated_block(plan, u, k, bias, input_gate, output_gate, runs):
    wide = jnp.promote_types(u.dtype, jnp.float32)
    s = u.astype(wide) if input_gate is None else u.astype(wide) * input_gate.astype(wide)
    y = plan.convolve(s, k.astype(wide), runs)
    if bias is not None:
        y = y + bias.astype(wide) * s
    if output_gate is not None:
        y = y * output_gate.astype(wide)
    return y.astype(u.dtype)


def _convolve(plan: _Plan, s: jax.Array, k: jax.Array, runs: jax.Array | None) -> jax.Array:
    l, reach = s.shape[1], plan.earlier + plan.later - 1
    taps = _taps(plan, k)
    if runs is not None:
        return _convolve_runs(plan, s, taps, runs)
    q = _block_positions(reach)
    if isinstance(l, int) and 4 * q > l:
        return _circular(plan, s, taps, _least_size(plan, l), l)
    # A short filter, or a length that is not known: blocks of q outputs, each with the `reach` inputs before its own.
    b, d, c = s.shape[0], s.shape[2], -(-(l + plan.later) // q)
    blocks = jnp.pad(s, ((0, 0), (0, c * q - l), (0, 0))).reshape(b, c, q, d)
    before = jnp.pad(blocks[:, :-1, q - reach :], ((0, 0), (1, 0), (0, 0), (0, 0)))
    windows = jnp.concatenate([before, blocks], axis=2).reshape(b * c, reach + q, d)
    # What wraps round falls on the first `reach` outputs, which are another block's.
    y = _circular(plan._replace(later=0), windows, taps, reach + q, reach + q)[:, reach:]
    return y.reshape(b, c * q, d)[:, plan.later : plan.later + l]


def _block_positions(reach: int) -> int:
    """Outputs of a block, where a filter that reaches over so many positions goes through a row block by block."""
    return 1 << (max(reach, 1) - 1).bit_length()


def _taps(plan: _Plan, k: jax.Array) -> jax.Array:
    """Those of filters (d, m) that reach a position: lags from -later to earlier - 1."""
    return jnp.concatenate([k[:, k.shape[1] - plan.later :], k[:, : plan.earlier]], axis=1)


def _least_size(plan: _Plan, l: int) -> int:
    """The smallest circular convolution in which nothing of l positions wraps round onto them."""
    return l + max(plan.later, plan.earlier - 1)


def _around(plan: _Plan, taps: jax.Array, n: int, sign: int) -> jax.Array:
    """Taps of lags from -later on in a circle of size n: lag -j at n - j, with a sign."""
    gap = jnp.zeros((len(taps), n - taps.shape[1]), taps.dtype)
    return jnp.concatenate([taps[:, plan.later :], gap, sign * taps[:, : plan.later]], axis=1)


def _circular(plan: _Plan, s: jax.Array, taps: jax.Array, least: int, out: int) -> jax.Array:
    """The first `out` positions of the circular convolution of s (b, l, d) with taps (d, m), of size `least` or more.

    The first `plan.later` taps are at lags below 0. What wraps round may come with the other sign.
    """
    monarch, whole = plan.implementation == "monarch", plan.bandwidth == 1
    n = monarch_size(least) if monarch and whole else fft_size(least)
    halves = plan.platform == "cpu" and n <= HALF_SIZE_LIMIT
    sign = -1 if whole and (monarch or halves) else 1
    k = _around(plan, taps, n, sign)
    kept = int(plan.bandwidth * (n // 2))
    if monarch:
        transform = MonarchDFT(n, None if whole else kept, dft_precision(plan.dtype, plan.platform))
        return transform.inverse(spectral_product(transform(s), transform(k.T[None])), out)
    if whole and halves:
        spectrum = half_fft(jnp.swapaxes(s, 1, 2), n) * half_fft(k, n)
        return jnp.swapaxes(half_ifft(spectrum, n, out), 1, 2)
    spectrum = jnp.fft.rfft(jnp.swapaxes(s, 1, 2), n)[..., : kept + 1] * jnp.fft.rfft(k)[:, : kept + 1]
    return jnp.swapaxes(jnp.fft.irfft(spectrum, n)[..., :out], 1, 2)


def half_fft(x: jax.Array, n: int) -> jax.Array:
    """The spectrum (..., n / 2) of real x (..., l), l <= n, products of which are convolutions modulo X^n + 1."""
    half = n // 2
    cos, sin = _turns(n, x.dtype)
    pad = lambda part: jnp.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, half - part.shape[-1])])  # noqa: E731
    re, im = pad(x[..., :half]), pad(x[..., half:])
    if x.shape[-1] <= half:
        return jnp.fft.fft(lax.complex(re * cos, re * sin))
    return jnp.fft.fft(lax.complex(re * cos - im * sin, re * sin + im * cos))


def half_ifft(spectrum: jax.Array, n: int, out: int) -> jax.Array:
    """The first `out` positions of the real sequence that a spectrum of `half_fft` belongs to."""
    z = jnp.fft.ifft(spectrum)
    cos, sin = _turns(n, z.real.dtype)
    x = z.real * cos + z.imag * sin
    if out > n // 2:
        x = jnp.concatenate([x, z.imag * cos - z.real * sin], axis=-1)
    return x[..., :out]


def _turns(n: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary parts of exp(i pi / n t), t < n / 2."""
    angle = np.pi / n * np.arange(n // 2)
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def fft_size(least: int) -> int:
    """The smallest even number from `least` on without prime factors beyond 5: what FFTs are fast at."""
    candidates = (
        2 * 3**i * 5**j << max(0, (-(-least // (2 * 3**i * 5**j)) - 1).bit_length()) for i in range(5) for j in range(4)
    )
    return min(candidates)


def _convolve_runs(plan: _Plan, s: jax.Array, taps: jax.Array, runs: jax.Array) -> jax.Array:
    """A convolution whose taps stay inside runs (b, l) of positions.

    Halves of a block see each other across its middle, where exactly one run can cross: with the rest of both set to
    zero, one FFT a block does. Twice as large blocks follow, until one is the whole row. O(l log^2 l) together.
    """
    earlier = taps[:, plan.later :]
    y = _causal_runs(plan, s, earlier, runs)
    if plan.later:
        zero = jnp.zeros_like(taps[:, :1])
        later = jnp.concatenate([zero, jnp.flip(taps[:, : plan.later], axis=1)], axis=1)
        y = y + jnp.flip(_causal_runs(plan, jnp.flip(s, 1), later, jnp.flip(runs, 1)), 1)
    return y


def _causal_runs(plan: _Plan, s: jax.Array, k: jax.Array, runs: jax.Array) -> jax.Array:
    _, l, d = s.shape
    q = min(DIRECT_POSITIONS, l)
    whole = q << (-(-l // q) - 1).bit_length()
    k = jnp.pad(k, ((0, 0), (0, max(0, whole - k.shape[1]))))
    s, runs = jnp.pad(s, ((0, 0), (0, whole - l), (0, 0))), jnp.pad(runs, ((0, 0), (0, whole - l)), mode="edge")
    y = direct_conv(s.reshape(-1, q, d), k[:, :q], runs.reshape(-1, q)).reshape(s.shape)
    while q < whole:
        halves, half_runs = s.reshape(-1, 2, q, d), runs.reshape(-1, 2, q)
        middle = half_runs[:, 0, -1:]
        left = jnp.where((half_runs[:, 0] == middle)[..., None], halves[:, 0], 0)
        # What wraps round falls on the left half, which is not looked at.
        right = _circular(plan._replace(later=0), left, k[:, : 2 * q], 2 * q, 2 * q)[:, q:]
        right = jnp.where((half_runs[:, 1] == middle)[..., None], right, 0)
        y = y + jnp.pad(right[:, None], ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(y.shape)
        q *= 2
    return y[:, :l]


def segment_runs(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Numbers the runs of equal ids in each row: 0, 1, ... An id that comes again later is another run."""
    return jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)


def direct_conv(
    u: Float[Array, "b l d"], k: Float[Array, "d m"], runs: Int[Array, "b l"] | None = None
) -> Float[Array, "b l d"]:
    """A causal convolution tap by tap, for filters of a few taps: y_t = sum_j k_j u_(t-j), inside runs of equal ids."""
    y = u * k[:, 0]
    for j in range(1, min(k.shape[1], u.shape[1])):
        earlier = u[:, :-j]
        if runs is not None:
            earlier = jnp.where((runs[:, :-j] == runs[:, j:])[..., None], earlier, 0)
        y = y.at[:, j:].add(earlier * k[:, j])
    return y
