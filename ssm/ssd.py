"""The state-space duality of Mamba-2 (SSD): a selective scan with one decay a head, computed by matrix products.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        (h: p x n, a head)

Computed by `ssm.decayed_attention`, with a = dt A and w = dt.

Axes: b batch, l position, h heads, g groups, p head width, n state size.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank
from ssm.checks import check_shapes
from ssm.decayed_attention import decayed_attention
from ssm.sequence_cut import Along, cut_of


def ssd(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, "h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    along: Along | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Runs the state-space dual of masked attention over whole sequences of any length.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    Differentiable in every array, the initial and the final state included (reverse mode). Cost and memory grow with
    the length; decays and states are at least float32, products take x's dtype.

    Args:
      x: input, a vector of width p for each head.
      dt: step size, >= 0 (after softplus), dimensionless: one position is one step of this size.
      A: negative decay rate of each head.
      B, C: input and output maps, shared by the h / g heads of a group; head i belongs to group i // (h / g).
      D: skip weight of each head, or of each of its channels, or None for no skip.
      initial_state: the state before the first position, or None for zeros.
      mask: False where a position is not there, whatever lies there: the state passes it unchanged, y is 0.
      segment_ids: documents packed in a row, each a run of equal ids: the state is zero where a run begins. The run
        that the first position belongs to goes on from `initial_state`.
      chunk_size: positions a chunk; changes speed and memory, not the result. None takes the default.
      along: inside `jax.shard_map`, where the row's other pieces are; see `ssm.sequence_cut`. States are the row's.

    Returns:
      (y, final_state): y in x's dtype, the state after the last position in at least float32.

    Raises:
      ValueError: shapes that disagree, groups that do not divide the heads, or a chunk_size below 1.

    Examples:
      >>> x, dt = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2))  # two heads of four channels
      >>> A, B, C = -jnp.ones(2), jnp.ones((1, 3, 1, 8)), jnp.ones((1, 3, 1, 8))
      >>> y, state = ssm.ssd(x, dt, A, B, C)
      >>> y.shape, state.shape, round(float(y[0, 1, 0, 0]), 4)  # 8 (1 + exp(-1))
      ((1, 3, 2, 4), (1, 2, 4, 8), 10.943)

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6; mamba_ssm/modules/ssd_minimal.py.
    """
    sizes = check_shapes(
        x=(x, "b l h p"),
        dt=(dt, "b l h"),
        A=(A, "h"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        D=(D, "h" if D is None or D.ndim == 1 else "h p"),
        initial_state=(initial_state, "b h p n"),
        mask=(mask, "b l"),
        segment_ids=(segment_ids, "b l"),
    )
    check_groups(sizes["g"], sizes["h"])
    if along is None and (cut := cut_of(x)) is not None:
        positions = {"x": x, "dt": dt, "B": B, "C": C, "mask": mask, "segment_ids": segment_ids}
        run = functools.partial(ssd, chunk_size=chunk_size)
        return cut.run(run, positions, {"initial_state": initial_state}, {"A": A, "D": D})
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    x, dt, B, C = (blank(mask, m) for m in (x, dt.astype(dtype), B, C))
    initial_state = initial_state if along is None else along.at_first(initial_state)
    y, state = decayed_attention(
        *(x, dt, dt * A, B, C),
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        along=along,
    )
    return add_skip(y, x, D).astype(x.dtype), state if along is None else along.of_last(state)


def ssd_step(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, "h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """Advances the state-space dual by one position.

        h' = exp(dt A) h + dt x B^T        y = h' C + D x

    Args:
      state: h, at least float32. Zeros before the first position.
      x, dt, A, B, C, D: as in `ssd`, at this position. dt = 0 passes a position over.

    Returns:
      (y, h'): y in x's dtype, h' in at least float32.

    Examples:
      >>> y, state = ssm.ssd_step(
      ...     jnp.zeros((1, 2, 4, 8)), jnp.ones((1, 2, 4)), jnp.ones((1, 2)), -jnp.ones(2), *[jnp.ones((1, 1, 8))] * 2
      ... )
      >>> y.shape, float(y[0, 0, 0])
      ((1, 2, 4), 8.0)

    Source: Dao & Gu 2024, arXiv:2405.21060, eq. 1 with a scalar decay a head.
    """
    sizes = check_shapes(
        state=(state, "b h p n"),
        x=(x, "b h p"),
        dt=(dt, "b h"),
        A=(A, "h"),
        B=(B, "b g n"),
        C=(C, "b g n"),
        D=(D, "h" if D is None or D.ndim == 1 else "h p"),
    )
    check_groups(sizes["g"], sizes["h"])
    dtype = jnp.result_type(state, x, dt, A, B, C, jnp.float32)
    dt = dt.astype(dtype)
    B, C = (jnp.repeat(m.astype(dtype), sizes["h"] // sizes["g"], axis=1) for m in (B, C))  # b h n
    added = (x.astype(dtype) * dt[..., None])[..., None] * B[:, :, None]
    state = jnp.exp(dt * A)[..., None, None] * state + added
    # A dot keeps what comes before it out of the loop over the state. A head at a time, the state first: on CPU XLA
    # then neither loops over it one number at a time nor turns it around.
    y = jnp.einsum("bhpn,bhn->bhp", state, C, precision=lax.Precision.HIGHEST)
    return add_skip(y, x, D).astype(x.dtype), state


def check_groups(groups: int, heads: int) -> None:
    """Raises a ValueError unless the groups divide the heads."""
    if groups < 1 or heads % groups:
        raise ValueError(f"B has g={groups} groups, expected a number that divides the h={heads} heads")


def add_skip(
    y: Float[Array, "*b h p"], x: Float[Array, "*b h p"], D: Float[Array, "h"] | Float[Array, "h p"] | None
) -> Float[Array, "*b h p"]:
    """y + D x, with a weight for each head, or for each of its channels."""
    if D is None:
        return y
    return y + (D[:, None] if D.ndim == 1 else D).astype(y.dtype) * x
