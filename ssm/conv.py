"""The short causal convolution in front of a state-space mixer: depthwise, a few taps, with its state carried."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.absent import blank, check_no_gaps
from ssm.checks import check_shapes, is_known_size
from ssm.forward_mode import by_hand
from ssm.platform import by_platform
from ssm.segments import inputs_before, last_inputs, pass_on, segment_runs
from ssm.sequence_cut import Along, cut_of

# Of the loop that sums the weights' gradient on a CPU: positions a turn, those of all rows together, and the shortest
# row that is worth a loop. Measured at rows of 256 to 2,048: 8 and 16 positions are alike.
SUMMED_AT_ONCE, SUMMED_IN_TURNS_FROM = 16, 128


def causal_conv1d(
    x: Float[Array, "b l e"],
    weight: Float[Array, "e w"],
    bias: Float[Array, "e"] | None = None,
    *,
    initial_state: Float[Array, "b t e"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    along: Along | None = None,
) -> tuple[Float[Array, "b l e"], Float[Array, "b t e"]]:
    """Depthwise causal convolution over positions.

        y_t = bias + sum_j weight[:, j] x_{t - (w-1) + j}        the last tap multiplies the current position

    Args:
      x: input.
      weight: w taps a channel, the published `conv1d.weight` without its middle axis of size 1.
      bias: added to every position, or None.
      initial_state: the t = w - 1 inputs before the first position, oldest first, or None for zeros.
      mask: False where a position is not there: its input counts as zero, and it does not enter the final state.
        Positions behind a gap still see the gap, so padding belongs at the ends.
      segment_ids: documents packed in a row, each a run of equal ids: no tap reaches into another run. The run that
        the first position belongs to goes on from `initial_state`.
      along: inside `jax.shard_map`, where the row's other pieces are; see `ssm.sequence_cut`. States are the row's.

    Returns:
      (y, final_state): y in x's dtype; the last w - 1 inputs that are there (and of the last segment), as the next
      call's initial_state.

    Raises:
      ValueError: shapes that disagree.

    Examples:
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> y, state = ssm.causal_conv1d(x, jnp.array([[0.5, 0.5]]))  # the mean of an input and the one before it
      >>> y[0, :, 0].tolist(), state.tolist()
      ([0.0, 0.5, 1.5, 2.5], [[[3.0]]])

    Source: mamba_ssm/modules/mamba_simple.py, `conv1d`; segments as `seq_idx` in the causal-conv1d package.
    """
    sizes = check_shapes(x=(x, "b l e"), weight=(weight, "e w"), bias=(bias, "e"))
    history = sizes["w"] - 1
    if initial_state is None:
        initial_state = jnp.zeros((sizes["b"], history, sizes["e"]), x.dtype)
    if initial_state.shape != (sizes["b"], history, sizes["e"]):
        expected = f"(b, w - 1, e) = ({sizes['b']}, {history}, {sizes['e']})"
        raise ValueError(f"initial_state has shape {initial_state.shape}, expected {expected}")
    check_shapes(x=(x, "b l e"), mask=(mask, "b l"), segment_ids=(segment_ids, "b l"))
    if along is None and (cut := cut_of(x)) is not None:
        positions = {"x": x, "mask": mask, "segment_ids": segment_ids}
        return cut.run(causal_conv1d, positions, {"initial_state": initial_state}, {"weight": weight, "bias": bias})

    x = blank(mask, x)
    before = initial_state.astype(x.dtype)
    if along is not None:
        before = inputs_before(x, before, segment_ids, along)
    padded = jnp.concatenate([before, x], axis=1)  # b, t + l, e
    runs = None
    if segment_ids is not None:
        runs = jnp.pad(segment_runs(segment_ids, along), ((0, 0), (history, 0)))

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = by_hand(_convolve, "ssm.causal_conv1d")(
        padded, weight.astype(dtype), None if bias is None else bias.astype(dtype), runs
    )
    last = last_inputs(x, before, mask, segment_ids, along)
    if along is not None:
        last = along.of_last(pass_on(last, along.at_first(initial_state.astype(x.dtype)), mask, segment_ids, along)[1])
    return y.astype(x.dtype), last


# The convolution with its gradient. `padded` are the inputs with t = w - 1 before them, (b, t + l, e).


def _sum_taps(padded, weight, runs):
    return sum(tap * weight[:, j] for j, tap in enumerate(_taps(padded, weight.shape[1], runs)))


def _with_bias(padded, weight, bias, runs):
    y = _sum_taps(padded, weight, runs)
    return y if bias is None else y + bias


_convolve = jax.custom_vjp(_with_bias)


def _convolve_forward(padded, weight, bias, runs):
    return _with_bias(padded, weight, bias, runs), (padded, weight, bias, runs)


def _convolve_backward(residuals, dy):
    padded, weight, bias, runs = residuals
    (dpadded,) = jax.vjp(functools.partial(_sum_taps, weight=weight, runs=runs), padded)[1](dy)
    length, taps = dy.shape[1], weight.shape[1]
    at_once = on_cpu = functools.partial(_weight_gradients, taps=taps)
    if is_known_size(dy.shape[0], length) and length >= SUMMED_IN_TURNS_FROM:
        on_cpu = functools.partial(_weight_gradients_in_turns, taps=taps)
    dweight, dbias = by_platform(on_cpu, at_once, padded, dy, runs)
    return dpadded, dweight, None if bias is None else dbias, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _taps(padded, taps, runs):
    """What each tap reads, b l e: zero where that is of another run."""
    history = taps - 1
    for j in range(taps):
        tap = padded[:, j : padded.shape[1] - history + j]
        if runs is not None and j < history:
            same = runs[:, j : runs.shape[1] - history + j] == runs[:, history:]
            tap = jnp.where(same[..., None], tap, 0)
        yield tap


def _weight_gradients(padded, dy, runs, *, taps):
    """(sum of dy_t x_{t - (w-1) + j}: e w, sum of dy_t: e)"""
    dweight = [jnp.sum(tap * dy, axis=(0, 1)) for tap in _taps(padded, taps, runs)]
    return jnp.stack(dweight, axis=1), jnp.sum(dy, axis=(0, 1))


def _weight_gradients_in_turns(padded, dy, runs, *, taps):
    """The same as a loop that adds a few positions to sums, one for each of them, that stay in cache.

    XLA's sum over positions walks through memory one channel at a time.
    """
    b, length, e = dy.shape
    positions = max(1, SUMMED_AT_ONCE // b)
    turns = length // positions

    def add(turn, sums):
        def read(x, more=0):
            return None if x is None else lax.dynamic_slice_in_dim(x, turn * positions, positions + more, axis=1)

        factors = *_taps(read(padded, taps - 1), taps, read(runs, taps - 1)), 1
        return tuple(total + factor * read(dy) for total, factor in zip(sums, factors, strict=True))

    start = (jnp.zeros((b, positions, e), dy.dtype),) * (taps + 1)
    *dweight, dbias = (total.sum((0, 1)) for total in lax.fori_loop(0, turns, add, start))
    rest = (None if x is None else x[:, turns * positions :] for x in (padded, dy, runs))
    last_dweight, last_dbias = _weight_gradients(*rest, taps=taps)
    return jnp.stack(dweight, axis=1) + last_dweight, dbias + last_dbias


class DepthwiseConv(nnx.Module):
    """`causal_conv1d` with its parameters, `kernel` (e, w) and `bias` (e,); `axis` is what the channels are along."""

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        use_bias: bool,
        axis: Any = "inner",
        kernel_bound: float | None = None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        bound = init.uniform(taps**-0.5)
        kernel_init = bound if kernel_bound is None else init.uniform(kernel_bound)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (channels, taps), param_dtype), axes=(axis, None))
        bias = bound(rngs.params(), (channels,), param_dtype) if use_bias else None
        self.bias = None if bias is None else nnx.Param(bias, decay=False, axes=(axis,))

    def __call__(self, x, state=None, *, mask=None, segment_ids=None, weights=None):
        """`causal_conv1d` from a state; the state goes out in the dtype that it came in. It refuses a gap in a mask.

        `weights` are the kernel and the bias of those channels that x has, where it has not all; see `ssm.tensor_cut`.
        """
        if self.kernel.shape[1] > 1:
            check_no_gaps(mask)
        kernel, bias = weights or (self.kernel[...], None if self.bias is None else self.bias[...])
        y, after = causal_conv1d(x, kernel, bias, initial_state=state, mask=mask, segment_ids=segment_ids)
        return y, after if state is None else after.astype(state.dtype)
