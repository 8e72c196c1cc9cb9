"""The short causal convolution in front of a state-space mixer: depthwise, a few taps, with its state carried."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssm.segments import segment_runs
from ssm.shapes import check_shapes


def causal_conv1d(
    x: Float[Array, "b l e"],
    weight: Float[Array, "e w"],
    bias: Float[Array, "e"] | None = None,
    *,
    initial_state: Float[Array, "b t e"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
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

    Returns:
      (y, final_state): y in x's dtype; the last w - 1 inputs that are there (and of the last segment), as the next
      call's initial_state.

    Raises:
      ValueError: shapes that disagree.

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

    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    padded = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)  # b, t + l, e
    runs = None
    if segment_ids is not None:
        runs = jnp.pad(segment_runs(segment_ids), ((0, 0), (history, 0)))

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros(x.shape, dtype)
    for j in range(sizes["w"]):
        tap = padded[:, j : j + sizes["l"]]
        if runs is not None and j < history:
            same = runs[:, j : j + sizes["l"]] == runs[:, history:]
            tap = jnp.where(same[..., None], tap, 0)
        y = y + tap * weight[:, j].astype(dtype)
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.astype(x.dtype), _last_inputs(padded, history, mask, runs)


def _last_inputs(padded, history, mask, runs):
    """The last `history` rows before the end of what is there, those of earlier segments blanked."""
    length = padded.shape[1] - history
    if mask is None:
        last, last_runs = padded[:, length:], None if runs is None else runs[:, length:]
    else:
        # One past the last position that is there; 0 where none is, which leaves the initial state.
        end = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), axis=1, initial=0)
        rows = end[:, None] + jnp.arange(history)
        last = jnp.take_along_axis(padded, rows[..., None], axis=1)
        last_runs = None if runs is None else jnp.take_along_axis(runs, rows, axis=1)
    if last_runs is None or history == 0:
        return last
    return jnp.where((last_runs == runs[:, -1:])[..., None], last, 0)
