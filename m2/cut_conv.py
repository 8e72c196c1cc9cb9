"""The long convolution of rows whose positions are cut over devices (`m2.sequence_cut`).

By channels: each device convolves whole rows of d / P channels, with the filters of those alone. Where no tap reaches
farther than a device's piece, the positions within reach come from its neighbours instead.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m2.sequence_cut import Cut, by_channels, from_left, from_right

Convolve = Callable[..., Float[Array, "b l d"]]


def cut_conv(
    convolve: Convolve,
    cut: Cut,
    s: Float[Array, "b l d"],
    k: Float[Array, "d m"],
    bias: Float[Array, "d"] | None,
    segment_ids: Int[Array, "b l"] | None,
    reach: tuple[int, int] | None,
) -> Float[Array, "b l d"]:
    """convolve(s, k, bias=bias, segment_ids=segment_ids) with the positions of s cut over devices.

    Args:
      convolve: `m2.fft_conv` with its options, without gates.
      cut: how rows are cut.
      s, k, bias, segment_ids: as there.
      reach: how many positions the filter looks back and ahead. None: it needs whole rows.
    """
    if reach is not None and max(reach) <= -(-s.shape[1] // cut.size):
        return _by_halo(convolve, cut, s, k, bias, segment_ids, reach)

    def run(s, filters, rows, whole):
        return convolve(s, filters[0], bias=filters[1], segment_ids=rows)

    return by_channels(run, cut, s, (k, bias), segment_ids)


def _by_halo(convolve, cut, s, k, bias, segment_ids, reach):
    (back, ahead), length = reach, s.shape[1]

    def widen(x):
        """x with the positions in reach; zeros beyond the ends of the row, whatever their segment."""
        left = [from_left(x[:, x.shape[1] - back :], cut.axis)] if back else []
        right = [from_right(x[:, :ahead], cut.axis)] if ahead else []
        return jnp.concatenate([*left, x, *right], axis=1)

    def local(s, segment_ids, k, bias):
        ids = None if segment_ids is None else widen(segment_ids)
        return convolve(widen(s), k, bias=bias, segment_ids=ids)[:, back : back + s.shape[1]]

    specs = cut.piece, cut.piece, PartitionSpec(), PartitionSpec()
    ids = cut.fill(segment_ids, mode="edge")
    return cut.shard_map(local, specs, cut.piece)(cut.fill(s), ids, k, bias)[:, :length]
