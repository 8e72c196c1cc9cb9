"""The recurrence of Mamba-3: an exponential-trapezoidal rule, with one or several inputs and outputs a head (MIMO).

    h_t = alpha_t h_{t-1} + beta_t v_{t-1} k_{t-1}^T + gamma_t v_t k_t^T        y_t = h_t q_t + D v_t        (h: p x n)
    alpha = exp(dt A)        beta = (1 - lam) dt alpha        gamma = lam dt

`lam` weighs the two ends of a step; lam = 1 is the rule of Mamba-2. With a rank r, v, k and q are r vectors a head: the
state takes the sum of the r products, and each of the r queries reads it.

How it is computed. beta_t is alpha_t times the step's weight of its left end, s_t = (1 - lam_t) dt_t. So the state that
has already taken the *next* step's left end, g_t = h_t + s_{t+1} v_t k_t^T, obeys the plain recurrence

    g_t = alpha_t g_{t-1} + (gamma_t + s_{t+1}) v_t k_t^T

which is `ssm.ssd.decayed_attention`. Position t itself reads h_t, its own v_t k_t^T by gamma_t alone:
y_t = (alpha_t g_{t-1} + gamma_t v_t k_t^T) q_t + D v_t. Nothing is divided by, and no exponent is positive. The last
position has no next step: its s is 0, and v and k are carried for the step to come.

Axes: b batch, l position, r rank, h heads, p head width, n state size.

Source: "Mamba-3" (ICLR 2026), arXiv:2603.15569, sections 3.1 and 3.3; mamba_ssm/ops/triton/mamba3.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank
from ssm.checks import check_shapes
from ssm.decayed_attention import decayed_attention
from ssm.segments import inputs_before, last_inputs, pass_on, segment_runs
from ssm.sequence_cut import Along, cut_of
from ssm.serialization import serializable


@serializable("ssm.TrapezoidState")
class TrapezoidState(NamedTuple):
    """What the recurrence carries: its state, and the last input, whose right end is still to be weighed.

    Examples:
      >>> v = k = q = jnp.ones((1, 3, 1, 2, 4))
      >>> dt = lam = jnp.ones((1, 3, 2))
      >>> _, state = ssm.trapezoid(v, k, q, dt, -dt, lam)
      >>> jax.tree.map(jnp.shape, state)
      TrapezoidState(h=(1, 2, 4, 4), k=(1, 1, 2, 4), v=(1, 1, 2, 4))
    """

    h: Float[Array, "b h p n"]
    """The state, at least float32."""
    k: Float[Array, "b r h n"]
    """Key of the last position."""
    v: Float[Array, "b r h p"]
    """Value of the last position."""


def trapezoid(
    v: Float[Array, "b l r h p"],
    k: Float[Array, "b l r h n"],
    q: Float[Array, "b l r h n"],
    dt: Float[Array, "b l h"],
    A: Float[Array, "b l h"],
    lam: Float[Array, "b l h"],
    D: Float[Array, "h"] | None = None,
    *,
    initial_state: TrapezoidState | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    along: Along | None = None,
) -> tuple[Float[Array, "b l r h p"], TrapezoidState]:
    """Runs the exponential-trapezoidal recurrence over whole sequences of any length.

    Differentiable in every array, the initial and the final state included (reverse mode). Cost and memory grow with
    the length; decays and states are at least float32, products take v's dtype.

    Args:
      v: values, r vectors of width p for each head; r = 1 is the single-input form.
      k, q: keys and queries (B and C, biased and rotated).
      dt: step size, >= 0, dimensionless: one position is one step of this size.
      A: negative decay rate of each head at each position.
      lam: share of the step's right end, in [0, 1].
      D: skip weight of each head, or None for no skip.
      initial_state: before the first position, or None for zeros.
      mask: False where a position is not there, whatever lies there: the state passes it unchanged, y is 0.
      segment_ids: documents packed in a row, each a run of equal ids: the state is zero where a run begins. The run
        that the first position belongs to goes on from `initial_state`.
      chunk_size: positions a chunk; changes speed and memory, not the result. None takes the default.
      along: inside `jax.shard_map`, where the row's other pieces are; see `ssm.sequence_cut`. States are the row's.

    Returns:
      (y, final_state): y in v's dtype.

    Raises:
      ValueError: shapes that disagree, or a chunk_size below 1.

    Examples:
      >>> v = k = q = jnp.ones((1, 3, 1, 2, 4))  # one input a head, two heads of four channels
      >>> dt = lam = jnp.ones((1, 3, 2))
      >>> y, state = ssm.trapezoid(v, k, q, dt, -dt, lam)
      >>> y.shape
      (1, 3, 1, 2, 4)
    """
    sizes = check_shapes(
        v=(v, "b l r h p"),
        k=(k, "b l r h n"),
        q=(q, "b l r h n"),
        dt=(dt, "b l h"),
        A=(A, "b l h"),
        lam=(lam, "b l h"),
        D=(D, "h"),
        mask=(mask, "b l"),
        segment_ids=(segment_ids, "b l"),
    )
    if initial_state is not None:
        h, k_in, v_in = initial_state
        check_shapes(v=(v, "b l r h p"), k=(k, "b l r h n"), h=(h, "b h p n"), k_in=(k_in, "b r h n"))
        check_shapes(v=(v, "b l r h p"), v_in=(v_in, "b r h p"))
    else:
        b, r, heads, p, n = (sizes[axis] for axis in "brhpn")
        h = jnp.zeros((b, heads, p, n), jnp.float32)
        k_in, v_in = jnp.zeros((b, r, heads, n), k.dtype), jnp.zeros((b, r, heads, p), v.dtype)
    if along is None and (cut := cut_of(v)) is not None:
        arrays = {"v": v, "k": k, "q": q, "dt": dt, "A": A, "lam": lam, "mask": mask, "segment_ids": segment_ids}
        run, state = functools.partial(trapezoid, chunk_size=chunk_size), TrapezoidState(h, k_in, v_in)
        return cut.run(run, arrays, {"initial_state": state}, {"D": D})
    dtype = jnp.result_type(v, k, q, dt, A, lam, h, jnp.float32)
    h, dt = h.astype(dtype), dt.astype(dtype)
    v, k, q, dt, A, lam = (blank(mask, m) for m in (v, k, q, dt, A, lam))
    last_k, last_v = (before[:, None] for before in (k_in, v_in))
    if along is not None:
        h, first = along.at_first(h), along.at_first((last_k.astype(k.dtype), last_v.astype(v.dtype)))
        before = (inputs_before(x, start, segment_ids, along) for x, start in zip((k, v), first, strict=True))
        ends = (last_inputs(x, left, mask, segment_ids, along) for x, left in zip((k, v), before, strict=True))
        passed = (pass_on(end, start, mask, segment_ids, along) for end, start in zip(ends, first, strict=True))
        (last_k, end_k), (last_v, end_v) = passed
        k_in, v_in = last_k[:, 0], last_v[:, 0]
    b, length, rank = v.shape[:3]
    if length == 0:
        return v, TrapezoidState(h, k_in, v_in)

    # 1. Weights of both ends of each step; `following` is the left end's at the next position that is there.
    here = jnp.ones((b, length), bool) if mask is None else mask
    runs = jnp.zeros((b, length), int) if segment_ids is None else segment_runs(segment_ids, along)
    left, right = (1 - lam) * dt, lam * dt
    at = jnp.where(here, jnp.arange(length), length)
    at_or_after = lax.cummin(at, axis=1, reverse=True)  # the position itself where it is there
    first, after = at_or_after[:, :1], jnp.pad(at_or_after[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    padded = jnp.pad(left, ((0, 0), (0, 1), (0, 0)))
    next_run = jnp.take_along_axis(jnp.pad(runs, ((0, 0), (0, 1)), constant_values=-1), after, axis=1)
    following = jnp.take_along_axis(padded, after[..., None], axis=1)
    following = jnp.where((here & (next_run == runs))[..., None], following, 0)
    entering = jnp.take_along_axis(padded, first[..., None], axis=1)[:, 0]  # b h
    outer = jnp.einsum("brhp,brhn->bhpn", v_in.astype(dtype), k_in.astype(dtype), precision=lax.Precision.HIGHEST)
    h = h + entering[..., None, None] * outer

    # 2. The plain recurrence, the ranks of a position as rows of their own.
    rows = [rearrange(x, "b l r h w -> b (l r) h w") for x in (v, k, q)]
    weight, own = (jnp.repeat(w, rank, axis=1) for w in (right + following, right))
    a = jnp.pad((dt * A)[:, :, None], ((0, 0), (0, 0), (0, rank - 1), (0, 0))).reshape(b, length * rank, dt.shape[2])
    positions = None if segment_ids is None else jnp.repeat(segment_ids, rank, axis=1)
    y, h = decayed_attention(
        *(rows[0], weight, a, *rows[1:]),
        own=own,
        initial_state=h,
        segment_ids=positions,
        chunk_size=chunk_size,
        rank=rank,
        along=along,
    )
    y = rearrange(y, "b (l r) h p -> b l r h p", r=rank)
    if D is not None:
        y = y + D.astype(dtype)[:, None] * v

    if along is None:
        end_k, end_v = (last_inputs(x, before, mask, segment_ids) for x, before in ((k, last_k), (v, last_v)))
    else:
        h, end_k, end_v = along.of_last((h, end_k, end_v))
    return y.astype(v.dtype), TrapezoidState(h, end_k[:, 0], end_v[:, 0])


def trapezoid_step(
    state: TrapezoidState,
    v: Float[Array, "b r h p"],
    k: Float[Array, "b r h n"],
    q: Float[Array, "b r h n"],
    dt: Float[Array, "b h"],
    A: Float[Array, "b h"],
    lam: Float[Array, "b h"],
    D: Float[Array, "h"] | None = None,
    *,
    mask: Bool[Array, "b"] | None = None,
) -> tuple[Float[Array, "b r h p"], TrapezoidState]:
    """Advances the exponential-trapezoidal recurrence by one position.

    Args:
      state: zeros before the first position.
      v, k, q, dt, A, lam, D: as in `trapezoid`, at this position.
      mask: False in rows where the position is not there: their state stays as it is.

    Returns:
      (y, state): y in v's dtype.

    Examples:
      >>> v = k = q = jnp.ones((1, 3, 1, 2, 4))
      >>> dt = lam = jnp.ones((1, 3, 2))
      >>> whole, _ = ssm.trapezoid(v, k, q, dt, -dt, lam)
      >>> _, state = ssm.trapezoid(v[:, :2], k[:, :2], q[:, :2], dt[:, :2], -dt[:, :2], lam[:, :2])
      >>> y, _ = ssm.trapezoid_step(state, v[:, 2], k[:, 2], q[:, 2], dt[:, 2], -dt[:, 2], lam[:, 2])
      >>> bool(jnp.allclose(y, whole[:, 2]))
      True
    """
    check_shapes(
        v=(v, "b r h p"),
        k=(k, "b r h n"),
        q=(q, "b r h n"),
        h=(state.h, "b h p n"),
        dt=(dt, "b h"),
        A=(A, "b h"),
        lam=(lam, "b h"),
        D=(D, "h"),
    )
    dtype = jnp.result_type(v, k, q, dt, A, lam, state.h, jnp.float32)
    v, k, q, dt, A, lam = (blank(mask, m) for m in (v, k, q, dt, A, lam))
    dt = dt.astype(dtype)
    alpha = jnp.exp(dt * A)
    ends = ((1 - lam) * dt * alpha, state.v, state.k), (lam * dt, v, k)
    h = alpha[..., None, None] * state.h
    for weight, value, key in ends:
        for r in range(v.shape[1]):
            h = h + (weight[..., None] * value[:, r])[..., None] * key[:, r, :, None, :]
    # A dot keeps what made q, sines and all, out of the loop over the state, which p before r lets it read as it is.
    y = jnp.einsum("bhpn,brhn->bhpr", h, q.astype(dtype), precision=lax.Precision.HIGHEST)
    y = rearrange(y, "b h p r -> b r h p")
    if D is not None:
        y = y + D.astype(dtype)[:, None] * v
    after = TrapezoidState(h, k, v)
    if mask is not None:
        after = TrapezoidState(
            *(jnp.where(mask[:, None, None, None], new, old) for new, old in zip(after, state, strict=True))
        )
    return y.astype(v.dtype), after
