"""The state-space duality of Mamba-2 (SSD): a selective scan with one decay a head, computed by matrix products.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        (h: p x n, a head)

How it is computed. A row is cut into chunks of `chunk_size` (axis q). With s_t the sum of dt A from the chunk's start,

    inside a chunk      y_i += sum_{j <= i} (C_i . B_j) exp(s_i - s_j) dt_j x_j          masked attention
    state it adds       S   =  sum_j exp(s_last - s_j) dt_j x_j B_j^T
    between chunks      h_out = exp(s_last) h_in + S                                      a scan, linear in the chunks
    from the state      y_i += exp(s_i) h_in C_i

Everything but the scan runs for all chunks at once. B and C keep their groups through every product; a head reads its
group's. Products take the inputs' dtype and add up in at least float32; decays and states are at least float32.

The gradient is written by hand: only the inputs and the states entering the chunks are kept, the q x q matrices are
rebuilt. Exponents are differences of sums inside one chunk, masked before the exponential, and never positive.

Axes: b batch, l position, c chunks, q s positions in a chunk (reading, written), h heads, g groups, r heads of a group,
p head width, n state size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.segments import segment_runs
from ssm.shapes import check_shapes

# Not yet measured on GPU and TPU; 64 keeps the error of the sums' differences below 1e-5 in float32.
_CHUNK_SIZE = 64


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
      mask: False where a position is not there: the state passes it unchanged. Its own output has no meaning.
      segment_ids: documents packed in a row, each a run of equal ids: the state is zero where a run begins. The run
        that the first position belongs to goes on from `initial_state`.
      chunk_size: positions a chunk; changes speed and memory, not the result. None takes the default.

    Returns:
      (y, final_state): y in x's dtype, the state after the last position in at least float32.

    Raises:
      ValueError: shapes that disagree, groups that do not divide the heads, or a chunk_size below 1.

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
    b, length, h, p, g, n = (sizes[axis] for axis in "blhpgn")
    if h % g:
        raise ValueError(f"B has g={g} groups, expected a number that divides the h={h} heads")
    chunk_size = _CHUNK_SIZE if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}, expected at least 1")

    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), dtype)
    state = initial_state.astype(dtype)
    dt = dt.astype(dtype)
    if mask is not None:
        dt = jnp.where(mask[..., None], dt, 0)
    y = jnp.zeros(x.shape, dtype)
    if length > 0:
        runs = None if segment_ids is None else segment_runs(segment_ids)
        y, state = _ssd(x, dt, A.astype(dtype), B, C, state, runs, min(chunk_size, length))
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).astype(dtype) * x
    return y.astype(x.dtype), state


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
    g, n = sizes["g"], sizes["n"]
    dtype = jnp.result_type(state, x, dt, A, B, C, jnp.float32)
    dt = dt.astype(dtype)
    grouped = (x.astype(dtype) * dt[..., None]).reshape(x.shape[0], g, -1, x.shape[2], 1)  # b g r p 1
    added = (grouped * B.astype(dtype)[:, :, None, None, :]).reshape(state.shape)
    state = jnp.exp(dt * A)[..., None, None] * state + added
    read = state.reshape(state.shape[0], g, -1, state.shape[2], n) * C.astype(dtype)[:, :, None, None, :]
    y = jnp.sum(read, axis=-1).reshape(x.shape)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).astype(dtype) * x
    return y.astype(x.dtype), state


# The operation without its skip, with its gradient. Below, arrays are chunked and grouped: (b, c, q, g, r, ...).


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _ssd(x, dt, A, B, C, initial_state, runs, chunk_size):
    return _ssd_forward(x, dt, A, B, C, initial_state, runs, chunk_size)[0]


def _ssd_forward(x, dt, A, B, C, initial_state, runs, chunk_size):
    xdt, B_, C_, decay = _prepare(x, dt, A, B, C, runs, chunk_size)
    inside, to_state, from_state, total = decay
    added = _product("bcqgn,bcqgrp->bcgrpn", B_, _scale(xdt, to_state))
    group = initial_state.reshape(len(x), B.shape[2], -1, *initial_state.shape[2:])  # b g r p n

    def pass_on(h, chunk):
        added, total = chunk
        return total[..., None, None] * h + added, h

    final, entering = lax.scan(pass_on, group, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(total, 1, 0)))
    entering = jnp.moveaxis(entering, 0, 1)  # b c g r p n
    scores = _product("bcqgn,bcsgn->bcgqs", C_, B_)[:, :, :, None] * inside
    y = _product("bcgrqs,bcsgrp->bcqgrp", scores.astype(x.dtype), xdt)
    y = y + _scale(_product("bcqgn,bcgrpn->bcqgrp", C_, entering.astype(x.dtype)), from_state)
    out = _unchunked(y, x), final.reshape(initial_state.shape)
    return out, (x, dt, A, B, C, runs, entering)


def _ssd_backward(chunk_size, residuals, cotangents):
    x, dt, A, B, C, runs, entering = residuals
    dy, dfinal = cotangents
    low = x.dtype
    xdt, B_, C_, decay = _prepare(x, dt, A, B, C, runs, chunk_size)
    inside, to_state, from_state, total = decay
    g = B.shape[2]
    dy = _chunked(dy, chunk_size, g)
    dy_state = _scale(dy, from_state)  # b c q g r p, float32

    # 1. The adjoint of the state between chunks, backwards.
    direct = _product("bcqgrp,bcqgn->bcgrpn", dy_state.astype(low), C_)

    def pass_back(dh, chunk):
        direct, total = chunk
        return total[..., None, None] * dh + direct, dh

    dgroup = dfinal.reshape(entering.shape[:1] + entering.shape[2:])
    dinitial, leaving = lax.scan(
        pass_back, dgroup, (jnp.moveaxis(direct, 1, 0), jnp.moveaxis(total, 1, 0)), reverse=True
    )
    leaving = jnp.moveaxis(leaving, 0, 1)  # b c g r p n: adjoint of the state that leaves each chunk

    # 2. Inside the chunks. `dinside` is the gradient in the exponents s_i - s_j.
    scores = _product("bcqgn,bcsgn->bcgqs", C_, B_)[:, :, :, None] * inside
    dscores = _product("bcqgrp,bcsgrp->bcgrqs", dy.astype(low), xdt)
    dinside = dscores * scores
    dproducts = jnp.sum(dscores * inside, axis=3).astype(low)  # b c g q s

    # 3. Inputs. What a position gave to the leaving state: read back by B, then by x.
    entering_low, leaving_low = entering.astype(low), leaving.astype(low)
    back = _scale(_product("bcqgn,bcgrpn->bcqgrp", B_, leaving_low), to_state)
    dxdt = _product("bcgrqs,bcqgrp->bcsgrp", scores.astype(low), dy.astype(low)) + back
    dC = _product("bcgqs,bcsgn->bcqgn", dproducts, B_)
    dC = dC + _product("bcqgrp,bcgrpn->bcqgn", dy_state.astype(low), entering_low)
    dB = _product("bcgqs,bcqgn->bcsgn", dproducts, C_)
    dB = dB + _product("bcqgrp,bcgrpn->bcqgn", _scale(xdt, to_state).astype(low), leaving_low)

    # 4. Exponents: s_i enters the rows, -s_j the columns; s_last the state's decay and what is added to it.
    given = jnp.sum(back * xdt, axis=-1)  # b c q g r
    read = _product("bcqgn,bcgrpn->bcqgrp", C_, entering_low)
    ds = jnp.moveaxis(dinside.sum(5) - dinside.sum(4), 4, 2) + jnp.sum(dy_state * read, axis=-1) - given
    dlast = total * jnp.sum(leaving * entering, axis=(-2, -1)) + given.sum(2)
    da = lax.cumsum(ds.at[:, :, -1].add(dlast), axis=2, reverse=True)

    # 5. Through a = dt A and x dt.
    da, dxdt = _unchunked(da, dt), _unchunked(dxdt, x)
    ddt = da * A + jnp.sum(dxdt * x, axis=-1)
    dx = (dxdt * dt[..., None]).astype(x.dtype)
    dB, dC = _unchunked(dB, B).astype(B.dtype), _unchunked(dC, C).astype(C.dtype)
    return dx, ddt, jnp.sum(da * dt, axis=(0, 1)), dB, dC, dinitial.reshape(dfinal.shape), None


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _prepare(x, dt, A, B, C, runs, chunk_size):
    """Chunked operands, and the decays: (inside, to the leaving state, from the entering state, over the chunk)."""
    g = B.shape[2]
    xdt = _chunked((x * dt[..., None]).astype(x.dtype), chunk_size, g)
    s = jnp.cumsum(_chunked(dt * A, chunk_size, g), axis=2)  # b c q g r
    B, C = (_chunked(m.astype(x.dtype), chunk_size) for m in (B, C))
    position = jnp.arange(chunk_size)
    see_inside = (position[:, None] >= position)[None, None]  # b c q s
    see_leaving = see_entering = jnp.ones((1, 1, chunk_size), bool)  # b c q
    passes = jnp.ones((1, 1), bool)  # b c
    if runs is not None:
        runs = _chunked(runs, chunk_size, mode="edge")
        before = jnp.pad(runs[:, :-1, -1], ((0, 0), (1, 0)))  # run 0 goes on from the initial state
        see_inside = see_inside & (runs[..., :, None] == runs[..., None, :])
        see_leaving, see_entering = runs == runs[..., -1:], runs == before[..., None]
        passes = runs[..., -1] == before

    def decay(see, exponent):
        return jnp.exp(jnp.where(see, exponent, -jnp.inf))

    along = jnp.moveaxis(s, 2, -1)  # b c g r q
    inside = decay(see_inside[:, :, None, None], along[..., :, None] - along[..., None, :])
    to_state = decay(see_leaving[..., None, None], s[:, :, -1:] - s)
    from_state = decay(see_entering[..., None, None], s)
    return xdt, B, C, (inside, to_state, from_state, decay(passes[..., None, None], s[:, :, -1]))


def _scale(x, weight):
    """x b c q g r p times a weight for each head and position."""
    return x * weight[..., None]


def _product(equation, one, other):
    """A matrix product that adds up in at least float32."""
    return jnp.einsum(equation, one, other, preferred_element_type=jnp.promote_types(one.dtype, jnp.float32))


def _chunked(x, chunk_size, groups=None, *, mode="constant"):
    """b l * -> b c q *, and with `groups` the heads h -> g r. The end is filled up: steps of size 0 change nothing."""
    missing = -x.shape[1] % chunk_size
    x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    heads = x.shape[2:] if groups is None else (groups, x.shape[2] // groups, *x.shape[3:])
    return x.reshape(x.shape[0], x.shape[1] // chunk_size, chunk_size, *heads)


def _unchunked(x, like):
    """Back to b l h *, without the filling."""
    return x.reshape(x.shape[0], -1, *like.shape[2:])[:, : like.shape[1]]
