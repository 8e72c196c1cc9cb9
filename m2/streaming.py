"""The causal long convolution with its past carried: whole prompts, or one position at a time.

A token costs a sum over the positions since the past was last summed up, and every so often, an epoch of about
sqrt(s log s) positions, one FFT sums it up: what all inputs so far will contribute to every position to come. Together
O(s^1.5) for s positions and channels apart, where attention's cache costs O(s^2).

Source: Agarwal et al. 2024, arXiv:2410.03766 (FutureFill, epoched); the same idea for polynomial products, van der
Hoeven 1997 (relaxed multiplication).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from m2.absent import blank, is_known
from m2.conv import fft_conv, segment_runs
from m2.serialization import serializable


@serializable("m2.ConvState")
class ConvState(NamedTuple):
    """What a causal long convolution carries from one call to the next, for at most s positions.

    Examples:
      >>> m2.init_conv_state(jnp.ones((1, 8)), 2, jnp.float32).kernel.shape  # the filter, lag by lag
      (8, 1)
    """

    kernel: Float[Array, "s d"]
    """The filters, lag by lag: computed once, at least float32."""
    inputs: Float[Array, "b s d"]
    """Inputs so far, zeros where none have come; in rows that end in padding, moved up to the end."""
    future: Float[Array, "b s d"]
    """What the first `summed` inputs contribute to each position."""
    summed: Int[Array, ""]
    """How many inputs `future` contains."""
    position: Int[Array, ""]
    """How many positions there were."""


def init_conv_state(kernel: Float[Array, "d s"], batch_size: int, dtype) -> ConvState:
    """The state before the first position; `dtype` is that of the inputs.

    Examples:
      >>> state = m2.init_conv_state(jnp.ones((1, 8)), 2, jnp.float32)  # one channel, 8 positions at most, two rows
      >>> isinstance(state, m2.ConvState)
      True
    """
    empty = jnp.zeros((batch_size, kernel.shape[1], kernel.shape[0]), dtype)
    zero = jnp.zeros((), jnp.int32)
    return ConvState(kernel.T, empty, empty.astype(kernel.dtype), zero, zero)


def epoch(slots: int) -> int:
    """Positions between two FFTs: a power of two near sqrt(s log2 s)."""
    return min(slots, 1 << round(math.log2(math.sqrt(slots * max(1.0, math.log2(slots))))))


def extend_conv(
    u: Float[Array, "b l d"],
    state: ConvState,
    bias: Float[Array, "d"] | None = None,
    *,
    input_gate: Float[Array, "b l d"] | None = None,
    output_gate: Float[Array, "b l d"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], ConvState]:
    """`fft_conv`, causal, going on from `state` by l positions; any split gives the same as the whole.

    Args:
      u: the next inputs. The state's s slots must hold what came before and these, absent positions too.
      state: from `init_conv_state` or the last call.
      bias, input_gate, output_gate: as in `fft_conv`.
      mask: False where a position is not there. Padding behind the end of a row leaves no gap before what follows.
      segment_ids: as in `fft_conv`; the first position belongs to the segment that the state ended in.

    Raises:
      ValueError: more positions than the state has slots, where shapes or values say so.

    Examples:
      >>> u, state = jnp.ones((1, 8, 1)), m2.init_conv_state(jnp.ones((1, 8)), 1, jnp.float32)
      >>> first, state = m2.extend_conv(u[:, :5], state)
      >>> second, state = m2.extend_conv(u[:, 5:], state)
      >>> jnp.round(jnp.concatenate([first, second], 1))[0, :, 0].astype(int).tolist()
      [1, 2, 3, 4, 5, 6, 7, 8]
    """
    slots = len(state.kernel)
    if (most := u.shape[1] + (int(state.position) if is_known(state.position) else 0)) > slots:
        raise ValueError(f"{most} positions, expected at most max_len={slots}, which the state was made for")
    wide = state.kernel.dtype
    u = blank(mask, u)
    input_gate, output_gate = (None if gate is None else blank(mask, gate) for gate in (input_gate, output_gate))
    s = u.astype(wide) if input_gate is None else u.astype(wide) * input_gate.astype(wide)
    s = s.astype(state.inputs.dtype)
    if u.shape[1] == 1:
        y, state = _step(s, state, mask)
    else:
        y, state = _advance(s, state, mask, segment_ids)
    if bias is not None:
        y = y + bias.astype(wide) * s.astype(wide)
    if output_gate is not None:
        y = y * output_gate.astype(wide)
    return y.astype(u.dtype), state


def _advance(s, state, mask, segment_ids):
    """Many positions: the sum of all inputs anew."""
    length = s.shape[1]
    if segment_ids is None:
        inputs = lax.dynamic_update_slice_in_dim(state.inputs, s, state.position, axis=1)
        future = _sum_up(inputs, state.kernel)
        y = lax.dynamic_slice_in_dim(future, state.position, length, axis=1)
    else:
        runs = segment_runs(segment_ids)
        before = lax.dynamic_slice_in_dim(_sum_up(state.inputs, state.kernel), state.position, length, axis=1)
        y = fft_conv(s.astype(before.dtype), state.kernel.T, segment_ids=segment_ids)
        y = y + jnp.where((runs == 0)[..., None], before, 0)
        last = runs == runs[:, -1:]
        inputs = jnp.where((runs[:, -1] == 0)[:, None, None], state.inputs, 0)
        inputs = lax.dynamic_update_slice_in_dim(inputs, jnp.where(last[..., None], s, 0), state.position, axis=1)
        future = _sum_up(inputs, state.kernel)
    if mask is not None:
        # Rows that end in padding move up, as a convolution knows distances alone: what follows sees no gap.
        inputs, future = (_roll_rows(x, trailing_absent(mask)) for x in (inputs, future))
    index = state.position + length
    return y, ConvState(state.kernel, inputs, future, index, index)


def _step(s, state, mask):
    """One position: what is summed up, and the inputs since."""
    slots = state.inputs.shape[1]
    window = epoch(slots)
    inputs = lax.dynamic_update_slice_in_dim(state.inputs, s, state.position, axis=1)
    first = jnp.clip(state.position + 1 - window, 0, slots - window)
    slot = first + jnp.arange(window)
    recent = lax.dynamic_slice_in_dim(inputs, first, window, axis=1)  # b w d
    since = (slot >= state.summed) & (slot <= state.position)
    taps = jnp.where(since[:, None], state.kernel[jnp.where(since, state.position - slot, 0)], 0)  # w d
    y = jnp.sum(recent.astype(taps.dtype) * taps, axis=1, keepdims=True)
    y = y + lax.dynamic_slice_in_dim(state.future, state.position, 1, axis=1)

    index = state.position + 1
    full = index - state.summed >= window
    if mask is not None:
        inputs, full = _roll_rows(inputs, trailing_absent(mask)), jnp.bool_(True)
    future, summed = lax.cond(
        full,
        lambda: (_sum_up(inputs, state.kernel), index),
        lambda: (state.future, state.summed),
    )
    return y, ConvState(state.kernel, inputs, future, summed, index)


def _sum_up(inputs, kernel):
    """What inputs contribute to every slot."""
    return fft_conv(inputs.astype(kernel.dtype), kernel.T)


def trailing_absent(mask: Bool[Array, "b l"]) -> Int[Array, "b"]:
    """How many positions at the end of each row are not there."""
    return jnp.where(jnp.any(mask, axis=1), jnp.argmax(jnp.flip(mask, 1), axis=1), mask.shape[1])


def _roll_rows(x, shift):
    """Moves row b of x (b, s, d) up by shift[b] positions.

    What leaves at the end comes in at the start: of inputs padding's zeros, of sums what no position to come reads.
    """
    slots = x.shape[1]
    source = (jnp.arange(slots) - shift[:, None]) % slots
    return jnp.take_along_axis(x, source[..., None], axis=1)
