"""The short causal convolution in front of a state-space mixer: depthwise, a few taps, with its state carried."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm import init
from ssm.absent import blank, check_no_gaps
from ssm.checks import check_shapes
from ssm.segments import last_inputs, segment_runs


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

    x = blank(mask, x)
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
    return y.astype(x.dtype), last_inputs(x, initial_state, mask, segment_ids)


class DepthwiseConv(nnx.Module):
    """`causal_conv1d` with its parameters, `kernel` (e, w) and `bias` (e,)."""

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        use_bias: bool,
        kernel_bound: float | None = None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        bound = init.uniform(taps**-0.5)
        kernel_init = bound if kernel_bound is None else init.uniform(kernel_bound)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (channels, taps), param_dtype))
        self.bias = nnx.Param(bound(rngs.params(), (channels,), param_dtype), decay=False) if use_bias else None

    def __call__(self, x, state=None, *, mask=None, segment_ids=None):
        """`causal_conv1d` from a state; the state goes out in the dtype that it came in. It refuses a gap in a mask."""
        if self.kernel.shape[1] > 1:
            check_no_gaps(mask)
        bias = None if self.bias is None else self.bias[...]
        y, after = causal_conv1d(x, self.kernel[...], bias, initial_state=state, mask=mask, segment_ids=segment_ids)
        return y, after if state is None else after.astype(state.dtype)
