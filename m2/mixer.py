"""The Monarch Mixer's sequence mixer: short convolution, gate, long convolution, gate.

Source: Fu et al. 2023, arXiv:2310.12109, section 5; m2's bert/src/mm/monarch_mixer_sequence_mixer.py.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from m2.absent import blank, check_no_gaps
from m2.channel_groups import POSITIONS, by_groups, groups_of, is_plain
from m2.conv import Implementation, direct_conv, fft_conv, segment_runs
from m2.conv2d import conv_places, direct_conv2d
from m2.filters import HyenaFilter, HyenaFilter2D, HyenaFilterConfig, side_by_side
from m2.linear import PRODUCT, rows_dot_general
from m2.sequence_cut import by_channels, cut_of, inputs_before, lay_channels, segment_starts
from m2.serialization import serializable
from m2.streaming import ConvState, extend_conv, init_conv_state, trailing_absent
from m2.tensor_cut import convolve, project


@dataclasses.dataclass(frozen=True)
class M2Config:
    """Options of the Monarch Mixer. The defaults are those of M2-BERT, but for its residual convolution.

    Examples:
      >>> m2.M2Config(l_max=64).d_conv
      3
    """

    l_max: int = 1024
    """The longest sequence: the filters have parameters for each position up to it. conv="2d" takes images of any size;
    its filters are told distances, and decay, in sides of a square image of l_max places."""
    conv: Literal["flat", "2d"] = "flat"
    """What convolutions go along. flat: positions in a row, those of an image row by row. 2d: the rows and columns of
    an image, to every side at once; the short convolution is then centred."""
    d_conv: int = 3
    """Taps of the short convolution, which is causal in every model; with conv="2d", taps to a side."""
    n_filters: int | None = None
    """Different filters of a long convolution, each shared by d_model / n_filters neighbouring channels, as heads share
    theirs in H3. None: one for each channel."""
    residual_long_conv: bool = False
    """Whether a second long convolution, of the mixer's input, is added behind the gates, as in M2-BERT."""
    training_additions: bool = False
    """Whether the input is normalised inside the mixer, as in the released M2-BERT of 80M."""
    filter: HyenaFilterConfig = HyenaFilterConfig()
    """The long convolutions' filters."""
    implementation: Implementation | None = None
    """How long convolutions are computed: "xla", "monarch", "pallas" (not over images), or None for what suits the
    platform; as in `m2.fft_conv`."""

    def __post_init__(self):
        for name in ("l_max", "d_conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.n_filters is not None and self.n_filters < 1:
            raise ValueError(f"n_filters={self.n_filters}, expected None or at least 1")
        if self.conv not in ("flat", "2d"):
            raise ValueError(f"conv={self.conv!r}, expected 'flat' or '2d'")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the mixer is called with besides mask and segments: the rows and columns of an image, or nothing."""
        return ("grid",) if self.conv == "2d" else ()


@serializable("m2.M2State")
class M2State(NamedTuple):
    """What one causal Monarch Mixer carries from one call to the next, for at most s positions.

    Examples:
      >>> config = m2.M2Config(l_max=16, filter=m2.HyenaFilterConfig(order=8))
      >>> mixer = m2.M2Mixer(8, config, causal=True, rngs=nnx.Rngs(0))
      >>> mixer.init_state(1).residual is None
      True
    """

    short: Float[Array, "b t c"]
    """The last d_conv - 1 inputs of the short convolution, oldest first; c is 3 d_model."""
    long: ConvState
    """The long convolution's past."""
    residual: ConvState | None
    """That of the residual one."""


class M2Mixer(nnx.Module):
    """Gated long convolution: sequence in, sequence out, in O(l log l).

        x1, x2, v = split(short(W_in u))        y = W_out (x2 * long(x1 * v) + residual(u))

    Each long convolution has a skip D besides its filter. The short one is causal even where the long ones look both
    ways, as in the published models. With conv="2d" all are convolutions over the l places of an image, and look to
    every side.

    Args:
      d_model: width of input and output.
      config: options; see `M2Config`.
      causal: whether positions see only themselves and earlier ones. False with conv="2d".
      residual_scale: multiplies the initial output projection, 1 / sqrt(layers) in a residual stack.
      dtype: dtype of the projections. None: that of the parameters and the input. Filters and long convolutions are
        at least float32.
      param_dtype: dtype that parameters are kept in; those of filters are at least float32.
      rngs: source of keys, stream "params".

    Raises:
      ValueError: n_filters that do not divide d_model, or causal=True with conv="2d".

    Examples:
      >>> mixer = m2.M2Mixer(8, m2.M2Config(l_max=16, filter=m2.HyenaFilterConfig(order=8)), rngs=nnx.Rngs(0))
      >>> mixer(jnp.ones((2, 10, 8))).shape
      (2, 10, 8)

    Source: Fu et al. 2023, arXiv:2310.12109; m2's bert/src/mm/monarch_mixer_sequence_mixer.py (order of the parts, the
      residual convolution behind the gates, initial weights).
    """

    runs_cut = True

    def __init__(
        self,
        d_model: int,
        config: M2Config = M2Config(),
        *,
        causal: bool = True,
        residual_scale: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if causal and config.conv == "2d":
            raise ValueError("causal=True with conv='2d', which reads an image from every side, expected causal=False")
        self.config = config
        self.needs = config.needs
        self.causal = causal
        self.dtype = dtype
        n_filters = config.n_filters or d_model
        if d_model % n_filters:
            raise ValueError(f"n_filters={n_filters} must divide d_model={d_model}")
        self.sharing = d_model // n_filters
        no_decay = {"decay": False, "axes": (None,)}

        def linear(d_in, d_out, axes, **options):
            return nnx.Linear(
                d_in,
                d_out,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_metadata={"axes": axes},
                bias_metadata={"decay": False, "axes": axes[1:]},
                dot_general=rows_dot_general,
                rngs=rngs,
                **options,
            )

        make_filter = functools.partial(
            HyenaFilter2D if config.conv == "2d" else functools.partial(HyenaFilter, bidirectional=not causal),
            n_filters,
            config.filter,
            l_max=config.l_max,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        make_norm = functools.partial(
            nnx.LayerNorm,
            d_model,
            epsilon=1e-5,
            param_dtype=jnp.promote_types(param_dtype, jnp.float32),
            use_fast_variance=False,
            scale_metadata=no_decay,
            bias_metadata=no_decay,
            rngs=rngs,
        )
        self.layernorm = make_norm() if config.training_additions else None
        self.in_linear = linear(
            d_model, 3 * d_model, ("embed", "side by side"), kernel_init=jax.nn.initializers.normal(0.02)
        )
        make_short = ShortConv2D if config.conv == "2d" else ShortConv
        self.short_filter = make_short(3 * d_model, config.d_conv, param_dtype=param_dtype, rngs=rngs)
        self.filter_fn = make_filter()
        self.filter_fn2 = make_filter() if config.residual_long_conv else None
        self.out_linear = linear(
            d_model, d_model, ("inner", "embed"), kernel_init=jax.nn.initializers.normal(0.02 * residual_scale)
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, "b l d"]:
        """Mixes whole sequences.

        Args:
          x: input, at most l_max positions; with conv="2d", the places of an image of any size, row by row.
          mask: False where a position is not there (padding, at either end). None with conv="2d".
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other. None with
            conv="2d".
          grid: rows and columns, with conv="2d"; flat mixers do not look at them.

        Raises:
          ValueError: more positions than l_max; with conv="2d", a mask or segments, or a grid of another number of
            places than x has, or none.
        """
        if self.config.conv == "2d":
            if mask is not None or segment_ids is not None:
                raise ValueError("conv='2d' reads whole images, expected neither mask nor segment_ids")
            return self._mix_image(x, grid)

        if 0 in x.shape:
            return self.out_linear(x)

        def convolve(filter_fn, taps, u, **gates):
            y = fft_conv(
                u,
                taps,
                bias=self._bias(filter_fn),
                causal=self.causal,
                mask=mask,
                segment_ids=segment_ids,
                implementation=self.config.implementation,
                **gates,
            )
            return checkpoint_name(y, PRODUCT)

        x, x1, x2, v, _ = self._enter(x, None, mask, segment_ids)
        taps = self._all_taps(x.shape[1])
        y = convolve(self.filter_fn, taps[0], v, input_gate=x1, output_gate=x2)
        if self.filter_fn2 is not None:
            y = y + convolve(self.filter_fn2, taps[1], x)
        return self.out_linear(y)

    def in_groups(
        self,
        x: Float[Array, "b l d"],
        width: int,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """`__call__` on about `width` channels at a time, at least 8: the same numbers in less memory, in more time.

        All at once over images, with adapters, and where channels or positions are cut over devices.
        """
        groups = groups_of(self.out_linear.in_features, width)
        plain = is_plain(self.in_linear, self.out_linear) and self.config.conv == "flat" and cut_of(x) is None
        if groups == 1 or 0 in x.shape or not plain:
            return self(x, mask=mask, segment_ids=segment_ids)
        check_no_gaps(mask)
        x = blank(mask, x)
        if self.layernorm is not None:
            x = self.layernorm(x)
        positions = {"mask": mask, "segment_ids": segment_ids}
        options = {"causal": self.causal, "implementation": self.config.implementation, **positions}

        def long(filter_fn):
            return filter_fn and (self._taps(filter_fn, x.shape[1], POSITIONS), self._bias(filter_fn))

        def run(p, channels, i):
            short, (taps, bias), residual = channels
            p, _ = self.short_filter(p, weights=short, **positions)
            x1, x2, v = jnp.split(p, 3, axis=-1)
            y = fft_conv(v, taps, bias=bias, input_gate=x1, output_gate=x2, **options)
            if residual:
                taps, bias = residual
                own = jax.lax.dynamic_slice_in_dim(x, i * v.shape[2], v.shape[2], axis=2)
                y = y + fft_conv(own.astype(v.dtype), taps, bias=bias, **options)
            return y

        short = self.short_filter.kernel[...], self.short_filter.bias[...]
        channels = short, long(self.filter_fn), long(self.filter_fn2)
        return by_groups(x, groups, self.in_linear, self.out_linear, run, channels)

    def _mix_image(self, x, grid):
        """`__call__` over rows and columns."""
        length = x.shape[1]
        if grid is None or grid[0] * grid[1] != length:
            raise ValueError(f"grid={grid}, expected rows and columns of {length} places, the length of x")

        def convolve(filter_fn, taps, u, **gates):
            options = {"bias": self._bias(filter_fn), "implementation": self.config.implementation, **gates}
            return checkpoint_name(conv_places(u, taps, grid, **options), PRODUCT)

        if 0 in x.shape:
            return self.out_linear(x)
        if self.layernorm is not None:
            x = self.layernorm(x)
        p = self.short_filter(self.in_linear(x), grid)
        x1, x2, v = jnp.split(p, 3, axis=-1)
        taps = self._all_taps(grid)
        y = convolve(self.filter_fn, taps[0], v, input_gate=x1, output_gate=x2)
        if self.filter_fn2 is not None:
            y = y + convolve(self.filter_fn2, taps[1], x.astype(p.dtype))
        return self.out_linear(y)

    def init_state(self, batch_size: int, max_len: int | None = None) -> M2State:
        """The state before the first position, with the filters computed.

        Args:
          batch_size: rows.
          max_len: the most positions a row will ever hold. None: l_max.

        Raises:
          ValueError: max_len beyond l_max, or the mixer is not causal.
        """
        if not self.causal:
            raise ValueError("causal=False: a bidirectional mixer has no state to go on from")
        slots = self.config.l_max if max_len is None else max_len
        if slots > self.config.l_max:
            raise ValueError(f"max_len={slots}, expected at most l_max={self.config.l_max}, the longest filter")
        dtype = self.dtype or self.in_linear.kernel.dtype
        width = self.in_linear.out_features
        short = jnp.zeros((batch_size, self.config.d_conv - 1, width), dtype)
        start = lambda filter_fn: init_conv_state(self._taps(filter_fn, slots), batch_size, dtype)  # noqa: E731
        return M2State(short, start(self.filter_fn), None if self.filter_fn2 is None else start(self.filter_fn2))

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: M2State,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b l d"], M2State]:
        """Goes on from `state` by l positions, a whole prompt or one token; any split gives the same as the whole.

        All positions together must not be more than the state was made for.

        Raises:
          ValueError: more, where shapes or values say so.
        """
        if 0 in x.shape:
            return self.out_linear(x), state
        positions = {"mask": mask, "segment_ids": segment_ids}
        x, x1, x2, v, short = self._enter(x, state.short, mask, segment_ids)
        bias = self._bias(self.filter_fn)
        y, long = extend_conv(v, state.long, bias, input_gate=x1, output_gate=x2, **positions)
        residual = None
        if self.filter_fn2 is not None and state.residual is not None:
            more, residual = extend_conv(x, state.residual, self._bias(self.filter_fn2), **positions)
            y = y + more
        return self.out_linear(y), M2State(short, long, residual)

    def _all_taps(self, size):
        """The filters of the long convolution, and of the residual one if there is one."""
        filters = [self.filter_fn] if self.filter_fn2 is None else [self.filter_fn, self.filter_fn2]
        return [self._per_channel(taps) for taps in side_by_side(lambda filter_fn: filter_fn(size), filters)]

    def _taps(self, filter_fn, size, at_once=None):
        """The filters, one a channel, of a length or of a grid."""
        return self._per_channel(filter_fn(size) if at_once is None else filter_fn(size, at_once))

    def _per_channel(self, taps):
        return lay_channels(jnp.repeat(taps, self.sharing, axis=0))

    def _bias(self, filter_fn):
        return jnp.repeat(filter_fn.bias[...], self.sharing)

    def _enter(self, x, short_state, mask, segment_ids):
        """The mixer's input and its three projections behind the short convolution, and that one's state."""
        check_no_gaps(mask)
        x = blank(mask, x)
        if self.layernorm is not None:
            x = self.layernorm(x)
        parts = ((self.out_linear.in_features,) * 2,) * 3
        (p,) = project(self.in_linear, x, [parts])
        p, short_state = convolve(self.short_filter, p, short_state, parts, mask=mask, segment_ids=segment_ids)
        return x.astype(p[0].dtype), *p, short_state


class ShortConv(nnx.Module):
    """Depthwise causal convolution of a few taps, with its past carried.

    Args:
      channels: width of input and output.
      taps: w; the last one multiplies the current position, as in PyTorch.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params". Weights and bias start uniform within 1 / sqrt(w), as PyTorch's.
    """

    def __init__(self, channels: int, taps: int, *, param_dtype: Dtype, rngs: nnx.Rngs):
        def uniform(*shape):
            return jax.random.uniform(rngs.params(), shape, param_dtype, -1, 1) * taps**-0.5

        self.kernel = nnx.Param(uniform(channels, taps), axes=("side by side", None))
        self.bias = nnx.Param(uniform(channels), decay=False, axes=("side by side",))

    def __call__(self, x, state=None, *, mask=None, segment_ids=None, weights=None):
        """Convolves x (b, l, channels) and returns (y, state), the last w - 1 inputs that are there.

        `weights` are the kernel and the bias of those channels that x has, where it has not all; see `m2.tensor_cut`.
        """
        kernel, bias = weights or (self.kernel[...], self.bias[...])
        (b, length, channels), cut = x.shape, cut_of(x)
        history = self.kernel.shape[1] - 1
        x = blank(mask, x)
        before = jnp.zeros((b, history, channels), x.dtype) if state is None else state.astype(x.dtype)
        inputs = jnp.concatenate([before, x], axis=1)
        runs = None
        if segment_ids is not None:
            runs = jnp.pad(segment_runs(segment_ids), ((0, 0), (history, 0)))

        wide = jnp.promote_types(x.dtype, jnp.float32)

        @jax.checkpoint  # for the gradient it keeps the inputs, and no wide one for each tap
        def convolve(inputs, kernel, bias):
            y = direct_conv(inputs.astype(wide), jnp.flip(kernel, axis=1).astype(wide), runs)[:, history:]
            return (y + bias.astype(wide)).astype(inputs.dtype)

        if cut is None:
            y = convolve(inputs, kernel, bias)
        else:
            taps = jnp.flip(kernel, axis=1).astype(wide)
            y = _convolve_pieces(cut, x.astype(wide), before.astype(wide), taps, segment_ids)
            y = (y + bias.astype(wide)).astype(x.dtype)

        if runs is not None:
            inputs = jnp.where((runs == runs[:, -1:])[..., None], inputs, 0)
        if mask is None:
            after = inputs[:, length:]
        else:
            # Padding behind the end of a row leaves no gap before what follows.
            slot = length - trailing_absent(mask)[:, None] + jnp.arange(history)
            after = jnp.take_along_axis(inputs, slot[..., None], axis=1)
        return y, after if state is None else after.astype(state.dtype)


def _convolve_pieces(cut, x, before, taps, segment_ids):
    """`direct_conv` of x behind `before`, the positions of x cut over devices."""
    history = taps.shape[1] - 1

    def local(x, segment_ids, before, taps):
        before, runs = inputs_before(x, before, segment_ids, cut.axis), None
        if segment_ids is not None:
            runs = jnp.cumsum(segment_starts(segment_ids, cut.axis), axis=1)
            runs = jnp.pad(runs, ((0, 0), (history, 0)))
        return direct_conv(jnp.concatenate([before, x], axis=1), taps, runs)[:, history:]

    specs = cut.piece, cut.piece, cut.row, jax.sharding.PartitionSpec()
    ids = cut.fill(segment_ids, mode="edge")
    return cut.shard_map(local, specs, cut.piece)(cut.fill(x), ids, before, taps)[:, : x.shape[1]]


class ShortConv2D(nnx.Module):
    """Depthwise convolution of a few taps to a side over an image, centred.

    Args:
      channels: width of input and output.
      taps: to a side; the first one multiplies the place above and to the left, as in PyTorch.
      param_dtype: dtype that parameters are kept in.
      rngs: source of keys, stream "params". Weights and bias start uniform within 1 / taps, as PyTorch's.
    """

    def __init__(self, channels: int, taps: int, *, param_dtype: Dtype, rngs: nnx.Rngs):
        def uniform(*shape):
            return jax.random.uniform(rngs.params(), shape, param_dtype, -1, 1) / taps

        self.kernel = nnx.Param(uniform(channels, taps, taps), axes=("side by side", None, None))
        self.bias = nnx.Param(uniform(channels), decay=False, axes=("side by side",))

    def __call__(self, x: Float[Array, "b l c"], grid: tuple[int, int]) -> Float[Array, "b l c"]:
        """Convolves images, row by row, in at least float32."""

        @jax.checkpoint  # as in a row
        def convolve(x, parameters, *_):
            kernel, bias = (value.astype(wide) for value in parameters)
            image = x.reshape(x.shape[0], *grid, x.shape[2])
            return (direct_conv2d(image.astype(wide), kernel) + bias).astype(x.dtype).reshape(x.shape)

        wide, parameters = jnp.promote_types(x.dtype, jnp.float32), (self.kernel[...], self.bias[...])
        cut = cut_of(x)
        return convolve(x, parameters) if cut is None else by_channels(convolve, cut, x, parameters)
