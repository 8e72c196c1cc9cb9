"""Filters as large as their input whose taps are a function of the position: the Hyena filter, in one and two axes.

Letters besides those of the style guide: o width of the filter's network · z features of a position.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from m2.sequence_cut import lay, lay_channels


@dataclasses.dataclass(frozen=True)
class HyenaFilterConfig:
    """Options of the Hyena filter. The defaults are those of the published M2-BERT models.

    Examples:
      >>> m2.HyenaFilterConfig(order=16).order  # width of the network that computes the taps
      16
    """

    emb_dim: int = 5
    """Features of a position: the position itself, and cosines and sines of (emb_dim - 1) / 2 frequencies. Odd. Over an
    image, those of the row and as many of the column."""
    order: int = 128
    """Width of the network that turns features into taps."""
    n_inner: int = 2
    """Hidden layers of the network besides the first."""
    linear: bool = False
    """Whether the network is one linear map instead."""
    w: float = 10.0
    """Initial frequency of the sines between the layers."""
    w_mod: float = 1.0
    """Factor on that frequency which is not trained."""
    train_freq: bool = True
    """Whether the frequencies are trained."""
    modulate: bool = True
    """Whether taps decay exponentially with the position, each channel at its own rate."""
    fast_decay: float = 0.3
    """Share of l_max at which the fastest channel has decayed to `decay_target`."""
    slow_decay: float = 1.5
    """The same of the slowest channel."""
    decay_target: float = 0.01
    """Size, relative to lag 0, that fast_decay and slow_decay speak of."""
    shift: float = 0.0
    """Added to the decay, so that no tap ever vanishes. Hyena's own models: 0.05 in some."""
    normalized: bool = False
    """Whether the taps of a position are divided by the sum of their magnitudes over the channels."""
    lr_scale: float = 1.0
    """Learning rate of the network, relative to the model's."""
    features_lr_scale: float = 1.0
    """Learning rate of the features, relative to the model's. M2's configs say 1e-5 / 8e-4; its code ignores it."""
    init: Literal["normal", "uniform"] = "normal"
    """Initial weights of the network: normal(0.02), or PyTorch's uniform within 1 / sqrt(fan_in)."""

    def __post_init__(self):
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise ValueError(f"emb_dim={self.emb_dim}, expected an odd number, at least 3")
        for name, least in (("order", 1), ("n_inner", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        for name in ("fast_decay", "slow_decay"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected more than 0")
        if not 0 < self.decay_target < 1:
            raise ValueError(f"decay_target={self.decay_target}, expected 0 < decay_target < 1")
        if self.init not in ("normal", "uniform"):
            raise ValueError(f"init={self.init!r}, expected 'normal' or 'uniform'")


class ImplicitFilter(nnx.Module):
    """What filters in one and two axes share: a network from the features of a position to a tap for each channel.

    Args:
      channels: filters, one a channel.
      config: options; see `HyenaFilterConfig`.
      features: features of a position.
      n_networks: networks, one for each direction that has its own.
      param_dtype: dtype that parameters are kept in, at least float32.
      rngs: source of keys, stream "params".
    """

    def __init__(
        self,
        channels: int,
        config: HyenaFilterConfig,
        *,
        features: int,
        n_networks: int,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.channels = channels
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        variable = nnx.Param if config.train_freq else nnx.Variable
        frequency = jnp.full((config.order,), config.w, dtype)
        self.freq = None if config.linear else variable(frequency, lr_scale=config.lr_scale, axes=(None,))
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (channels,), dtype), decay=False, axes=("inner",))
        self.implicit_filter = self._network(features, dtype, rngs)
        self.implicit_filter_rev = self._network(features, dtype, rngs) if n_networks == 2 else None

    def _network(self, features, dtype, rngs):
        c = self.config
        widths = [features, self.channels] if c.linear else [features, *[c.order] * (c.n_inner + 1), self.channels]

        def linear(d_in, d_out, last):
            uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) * d_in**-0.5  # noqa: E731
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=not last,
                kernel_init=jax.nn.initializers.normal(0.02) if c.init == "normal" else uniform,
                bias_init=jax.nn.initializers.zeros if c.init == "normal" else uniform,
                param_dtype=dtype,
                kernel_metadata={"lr_scale": c.lr_scale, "axes": ("stored", "inner" if last else None)},
                bias_metadata={"lr_scale": c.lr_scale, "decay": False, "axes": (None,)},
                precision=jax.lax.Precision.HIGHEST,
                rngs=rngs,
            )

        ends = enumerate(itertools.pairwise(widths), 1)
        return nnx.List([linear(*pair, last=i == len(widths) - 1) for i, pair in ends])

    def _taps(self, network, z, *times):
        """Taps (d, m) at positions of features z (m, features); of two arrays of times, m is all pairs."""
        h = z
        for i, layer in enumerate(network):
            h = layer(h)
            if i < len(network) - 1:
                h = jnp.sin(self.config.w_mod * self.freq[...] * h)
        if self.config.modulate:
            delta = jnp.asarray(np.abs(decay_rates(self.channels, self.config)), h.dtype)
            window = jnp.ones((1, self.channels), h.dtype)
            for t in times:  # made here: as a constant of the program it would be as large as the filters
                decay = jnp.exp(-jnp.abs(jnp.asarray(t, h.dtype))[:, None] * delta)
                window = (window[:, None] * decay).reshape(-1, self.channels)
            h = h * (window + self.config.shift)
        if self.config.normalized:
            h = h / jnp.sum(jnp.abs(h), axis=-1, keepdims=True)
        return h.T


class HyenaFilter(ImplicitFilter):
    """Taps of a long convolution, computed from their positions.

        k_j = (W_p sin(f W_(p-1) ... sin(f W_0 z_j))) (exp(-t_j |delta|) + shift)        t_j = j / (l_max - 1)

    z starts as (t, cos w t', -sin w t') and is trained; f is one vector for all sines, of both directions. The decays
    delta are spread evenly over the channels. All of it is computed in at least float32.

    Args:
      channels: filters, one a channel.
      config: options; see `HyenaFilterConfig`.
      l_max: the longest filter. A shorter one is its beginning: time is not rescaled.
      bidirectional: whether taps look both ways; the two directions have a network each.
      param_dtype: dtype that parameters are kept in, at least float32.
      rngs: source of keys, stream "params".

    Examples:
      >>> m2.HyenaFilter(4, m2.HyenaFilterConfig(order=8), l_max=16, rngs=nnx.Rngs(0))(10).shape
      (4, 10)

    Source: Poli et al. 2023, arXiv:2302.10866, section 3.3; `HyenaFilter` in m2's bert/src/mm/hyena_utils.py.
    """

    def __init__(
        self,
        channels: int,
        config: HyenaFilterConfig = HyenaFilterConfig(),
        *,
        l_max: int,
        bidirectional: bool = False,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if l_max < 1:
            raise ValueError(f"l_max={l_max}, expected at least 1")
        directions = 2 if bidirectional else 1
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(channels, config, features=config.emb_dim, n_networks=directions, **options)
        self.l_max = l_max
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.z = nnx.Param(
            jnp.asarray(position_features(l_max, config.emb_dim), dtype),
            decay=False,
            lr_scale=config.features_lr_scale,
            axes=("stored", None),
        )

    def __call__(self, length: int, at_once: int | None = None) -> Float[Array, "d m"]:
        """The filters of a sequence of `length` positions, as `m2.fft_conv` takes them.

        Args:
          length: positions.
          at_once: of how many taps the network's insides are there at a time, now and on the way back. None: of all.

        Returns:
          (d, length) taps at lags 0, 1, ...; or, looking both ways, (d, 2 length), where the second half, read from its
          end, holds the taps at lags -1, -2, ... For a length that is not known yet (`jax.export`), those of l_max.

        Raises:
          ValueError: more positions than l_max.
        """
        if not fits(length, self.l_max) or length == 0:
            raise ValueError(f"length={length}, expected 1 to l_max={self.l_max}, the longest filter that there is")
        if not isinstance(length, int):
            length = self.l_max
        z, t = lay(self.z[...][:length], 0), times(self.l_max)[:length]
        both = [self.implicit_filter, self.implicit_filter_rev]
        networks = [network for network in both if network is not None]
        if at_once is not None and at_once < length:
            k, *later = (self._in_pieces(network, z, t, at_once) for network in networks)
        else:
            # Where rows are cut over devices, each finds the taps of its positions, and is left with those of its
            # channels.
            k, *later = side_by_side(lambda network: lay_channels(lay(self._taps(network, z, t), 1)), networks)
        return jnp.concatenate([k, *(jnp.flip(taps, axis=1) for taps in later)], axis=1)

    def _in_pieces(self, network, z, t, at_once):
        """`_taps`, so many positions at a time."""
        length, dtype = len(z), z.dtype
        cut = lambda x: jnp.pad(x, [(0, -length % at_once)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
        z, t = (cut(x).reshape(-1, at_once, *x.shape[1:]) for x in (z, jnp.asarray(t, dtype)))
        k = jax.lax.map(jax.checkpoint(lambda piece: self._taps(network, *piece)), (z, t))
        return jnp.moveaxis(k, 1, 0).reshape(self.channels, -1)[:, :length]


class HyenaFilter2D(ImplicitFilter):
    """Taps of a long convolution over an image, computed from their lags in rows and columns.

        k_ij = (W_p sin(f W_(p-1) ... sin(f W_0 z_ij))) (exp(-(|t_i| + |t_j|) |delta|) + shift)        t = lag / (s - 1)

    z_ij is the features of the row lag i and of the column lag j, end to end, each (t, cos w t', -sin w t'). Lags have
    a sign, so one network tells all directions apart; taps decay with the distance along either axis. The unit of
    distance is s = sqrt(l_max), the side of a square image of l_max places. Features are not trained, unlike
    `HyenaFilter`'s: there is a tap at any lag, and the filter of a larger image has that of a smaller one in its
    middle. All of it is computed in at least float32.

    Args:
      channels: filters, one a channel.
      config: options; see `HyenaFilterConfig`.
      l_max: places of the image that distances are measured by. Filters of larger ones are the same, and longer.
      param_dtype: dtype that parameters are kept in, at least float32.
      rngs: source of keys, stream "params".

    Examples:
      >>> m2.HyenaFilter2D(4, m2.HyenaFilterConfig(order=8), l_max=16, rngs=nnx.Rngs(0))((3, 4)).shape
      (4, 6, 8)

    Source: Poli et al. 2023, arXiv:2302.10866, section 3.3, with a second axis.
    """

    def __init__(
        self,
        channels: int,
        config: HyenaFilterConfig = HyenaFilterConfig(),
        *,
        l_max: int,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if l_max < 1:
            raise ValueError(f"l_max={l_max}, expected at least 1")
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(channels, config, features=2 * config.emb_dim, n_networks=1, **options)
        self.side = max(2.0, math.sqrt(l_max))

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "d m n"]:
        """The filters of an image of that many rows and columns, as `m2.fft_conv2d` takes them.

        Returns:
          (d, 2 rows, 2 columns): along each axis the taps at lags 0, 1, ..., and from the end those at lags -1, -2, ...

        Raises:
          ValueError: no row, or no column.
        """
        if min(grid) < 1:
            raise ValueError(f"grid={grid}, expected at least one row and one column")
        lags = [np.concatenate([np.arange(size), np.arange(-size, 0)]) for size in grid]
        times = [lag / (self.side - 1) for lag in lags]
        rows, columns = (_features(t, lag / self.side, self.config.emb_dim) for t, lag in zip(times, lags, strict=True))
        pairs = np.broadcast_arrays(rows[:, None], columns[None])
        z = jnp.asarray(np.concatenate(pairs, axis=-1).reshape(-1, 2 * self.config.emb_dim), self.bias.dtype)
        return self._taps(self.implicit_filter, z, *times).reshape(self.channels, *(len(lag) for lag in lags))


def side_by_side(call: Callable[[nnx.Module], jax.Array], modules: Sequence[nnx.Module]) -> list[jax.Array]:
    """`call(module)` of each of several modules; of one structure, they are computed as one with an axis more.

    A compiler then has every product once, not once a module.
    """
    (graphdef, *others), parameters = zip(*map(nnx.split, modules), strict=True)
    if not others or any(other != graphdef for other in others):
        return [call(module) for module in modules]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parameters)
    return list(jax.vmap(lambda parameters: call(nnx.merge(graphdef, parameters)))(stacked))


def fits(length: Any, most: int, named: str = "l_max") -> bool:
    """Whether there are at most so many positions, a bound that errors call `named`.

    Raises:
      ValueError: a length that is not known yet (`jax.export`), and for which nothing says that it is in bounds.
    """
    try:
        return bool(length <= most)
    except jax.errors.InconclusiveDimensionOperation as error:
        expected = f"at most {named}={most}: jax.export.symbolic_shape(..., constraints=['{length} <= {most}'])"
        raise ValueError(f"length={length}, a symbol without a bound, expected {expected}") from error


def times(l_max: int) -> np.ndarray:
    """The position of every tap, from 0 to 1."""
    return np.linspace(0, 1, l_max)


def decay_rates(channels: int, config: HyenaFilterConfig) -> np.ndarray:
    """How fast each channel's taps decay, over l_max positions: negative, the slowest first."""
    target = math.log(config.decay_target)
    return np.linspace(target / config.slow_decay, target / config.fast_decay, channels)


def position_features(l_max: int, emb_dim: int) -> np.ndarray:
    """What a filter's network is told of each position: its time, cosines and sines; (l_max, emb_dim)."""
    return _features(times(l_max), np.arange(l_max) / l_max, emb_dim)


def _features(t: np.ndarray, turns: np.ndarray, emb_dim: int) -> np.ndarray:
    """Times, and cosines and sines of (emb_dim - 1) / 2 multiples of so many turns."""
    bands = (emb_dim - 1) // 2
    # The first frequency is nearly 0 and stands for none: with one band, cosine and sine are 1 and 0.
    frequency = np.linspace(1e-4, bands - 1, bands) if bands > 1 else np.array([1e-4])
    angle = 2 * np.pi * turns[:, None] * frequency
    return np.concatenate([t[:, None], np.cos(angle), -np.sin(angle)], axis=1)
