"""The state-space duality of Mamba-2 (SSD): a selective scan with one decay a head, computed by matrix products.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        (h: p x n, a head)

How it is computed (`decayed_attention`, with a = dt A and w = dt). A row is cut into chunks of `chunk_size` (axis q).
With s_t the sum of a from the chunk's start,

    inside a chunk      y_i += sum_{j <= i} (C_i . B_j) exp(s_i - s_j) w_j x_j           masked attention
    state it adds       S   =  sum_j exp(s_last - s_j) w_j x_j B_j^T
    between chunks      h_out = exp(s_last) h_in + S                                      a scan, linear in the chunks
    from the state      y_i += exp(s_i) h_in C_i

Everything but the scan runs for all chunks at once. B and C keep their groups through every product; a head reads its
group's. Products take the inputs' dtype and add up in at least float32; decays and states are at least float32.

The gradient is written by hand: only the inputs and the states entering the chunks are kept, the q x q matrices are
rebuilt. Exponents are differences of sums inside one chunk, masked before the exponential, and never positive; the sums
carry their rounding error along, so that weak decay behind strong decay is as exact as alone.

Axes: b batch, l position, c chunks, q s positions in a chunk (reading, written), h heads, g groups, r heads of a group,
p head width, n state size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank
from ssm.checks import check_shapes
from ssm.segments import segment_runs

# Not yet measured on GPU and TPU.
CHUNK_SIZE = 64


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
      mask: False where a position is not there, whatever lies there: the state passes it unchanged, y is 0.
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
    check_groups(sizes["g"], sizes["h"])
    dtype = jnp.result_type(x, dt, A, B, C, jnp.float32)
    x, dt, B, C = (blank(mask, m) for m in (x, dt.astype(dtype), B, C))
    y, state = decayed_attention(
        x, dt, dt * A, B, C, initial_state=initial_state, segment_ids=segment_ids, chunk_size=chunk_size
    )
    return add_skip(y, x, D).astype(x.dtype), state


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


def decayed_attention(
    x: Float[Array, "b l h p"],
    weight: Float[Array, "b l h"],
    a: Float[Array, "b l h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    *,
    own: Float[Array, "b l h"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    rank: int = 1,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """The recurrence under the state-space dual, for any decay and any weight of the inputs.

        h_t = exp(a_t) h_{t-1} + w_t x_t B_t^T        y_t = (exp(a_t) h_{t-1} + o_t x_t B_t^T) C_t

    Args:
      x, B, C: as in `ssd`.
      weight: w, of any sign. 0 where a position is not there.
      a: logarithm of the decay, <= 0. 0 where a position is not there.
      own: o, what weighs a position's input where it reads itself, or None for w: y_t = h_t C_t.
      initial_state, segment_ids: as in `ssd`.
      chunk_size: positions a chunk, None for the default, divided by `rank`.
      rank: rows of a position. With rank r the rows t r to t r + r - 1 belong to position t: each of them reads what
        all of them write. `a` is then 0 but in the first.

    Returns:
      (y, final_state), both in at least float32.

    Raises:
      ValueError: a chunk_size below 1.
    """
    chunk_size = max(1, CHUNK_SIZE // rank) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}, expected at least 1")
    b, length, h, p = x.shape
    dtype = jnp.result_type(x, weight, a, B, C, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, B.shape[3]), dtype)
    state = initial_state.astype(dtype)
    if length == 0:
        return jnp.zeros(x.shape, dtype), state
    runs = None if segment_ids is None else segment_runs(segment_ids)
    rows = min(chunk_size * rank, length)
    own = None if own is None else own.astype(dtype)
    return _attend(x, weight.astype(dtype), own, a.astype(dtype), B, C, state, runs, rows, rank)


# The recurrence with its gradient. Below, arrays are chunked and grouped: (b, c, q, g, r, ...).


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _attend(x, weight, own, a, B, C, initial_state, runs, chunk_size, rank):
    return _attend_forward(x, weight, own, a, B, C, initial_state, runs, chunk_size, rank)[0]


def _attend_forward(x, weight, own, a, B, C, initial_state, runs, chunk_size, rank):
    x_, B_, C_, weight_, decay = _prepare(x, weight, a, B, C, runs, chunk_size, rank)
    inside, to_state, from_state, total = decay
    added = _product("bcqgn,bcqgrp->bcgrpn", B_, _scale(x_, weight_ * to_state))
    group = initial_state.reshape(len(x), B.shape[2], x.shape[2] // B.shape[2], *initial_state.shape[2:])  # b g r p n

    def pass_on(h, chunk):
        added, total = chunk
        return total[..., None, None] * h + added, h

    final, entering = lax.scan(pass_on, group, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(total, 1, 0)))
    entering = jnp.moveaxis(entering, 0, 1)  # b c g r p n
    weighed = inside * _written(weight_, own, chunk_size, rank)
    scores = _product("bcqgn,bcsgn->bcgqs", C_, B_)[:, :, :, None] * weighed
    y = _product("bcgrqs,bcsgrp->bcqgrp", scores.astype(x.dtype), x_)
    y = y + _scale(_product("bcqgn,bcgrpn->bcqgrp", C_, entering.astype(x.dtype)), from_state)
    out = _unchunked(y, x), final.reshape(initial_state.shape)
    return out, (x, weight, own, a, B, C, runs, entering)


def _attend_backward(chunk_size, rank, residuals, cotangents):
    x, weight, own, a, B, C, runs, entering = residuals
    dy, dfinal = cotangents
    low = x.dtype
    x_, B_, C_, weight_, decay = _prepare(x, weight, a, B, C, runs, chunk_size, rank)
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

    # 2. Inside the chunks. `dwritten` is the gradient in the weights, `dinside` that in the exponents s_i - s_j.
    written = _written(weight_, own, chunk_size, rank)
    decayed = _product("bcqgn,bcsgn->bcgqs", C_, B_)[:, :, :, None] * inside
    dscores = _product("bcqgrp,bcsgrp->bcgrqs", dy.astype(low), x_)
    dwritten = dscores * decayed
    dinside = dwritten * written
    dproducts = jnp.sum(dscores * (inside * written), axis=3).astype(low)  # b c g q s

    # 3. Inputs. What a position gave to the leaving state: read back by B, then by x.
    entering_low, leaving_low = entering.astype(low), leaving.astype(low)
    back = _scale(_product("bcqgn,bcgrpn->bcqgrp", B_, leaving_low), to_state)
    dx = _product("bcgrqs,bcqgrp->bcsgrp", (decayed * written).astype(low), dy.astype(low)) + _scale(back, weight_)
    dC = _product("bcgqs,bcsgn->bcqgn", dproducts, B_)
    dC = dC + _product("bcqgrp,bcgrpn->bcqgn", dy_state.astype(low), entering_low)
    dB = _product("bcgqs,bcqgn->bcsgn", dproducts, C_)
    dB = dB + _product("bcqgrp,bcgrpn->bcqgn", _scale(x_, weight_ * to_state).astype(low), leaving_low)

    # 4. Weights.
    given = jnp.sum(back * x_, axis=-1)  # b c q g r
    down = None
    if own is not None:
        itself = _itself(chunk_size, rank)
        down = jnp.moveaxis(jnp.sum(jnp.where(itself, dwritten, 0), axis=4), 4, 2)
        dwritten = jnp.where(itself, 0, dwritten)
        down = _unchunked(down, own)
    dweight = given + jnp.moveaxis(dwritten.sum(4), 4, 2)

    # 5. Exponents: s_i enters the rows, -s_j the columns; s_last the state's decay and what is added to it.
    given = given * weight_
    read = _product("bcqgn,bcgrpn->bcqgrp", C_, entering_low)
    ds = jnp.moveaxis(dinside.sum(5) - dinside.sum(4), 4, 2) + jnp.sum(dy_state * read, axis=-1) - given
    dlast = total * jnp.sum(leaving * entering, axis=(-2, -1)) + given.sum(2)
    da = lax.cumsum(ds.at[:, :, -1].add(dlast), axis=2, reverse=True)

    dx, dB, dC = (_unchunked(d, m).astype(m.dtype) for d, m in ((dx, x), (dB, B), (dC, C)))
    dinitial = dinitial.reshape(dfinal.shape)
    return dx, _unchunked(dweight, weight), down, _unchunked(da, a), dB, dC, dinitial, None


_attend.defvjp(_attend_forward, _attend_backward)


def _prepare(x, weight, a, B, C, runs, chunk_size, rank):
    """Chunked operands, and the decays: (inside, to the leaving state, from the entering state, over the chunk)."""
    g = B.shape[2]
    x, weight = _chunked(x, chunk_size, g), _chunked(weight, chunk_size, g)
    s, error = _exact_sums(_chunked(a, chunk_size, g))  # b c q g r
    B, C = (_chunked(m.astype(x.dtype), chunk_size) for m in (B, C))
    position = jnp.arange(chunk_size) // rank
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

    def difference(one, other):
        return one[0] - other[0] + (one[1] - other[1])

    last, along = (s[:, :, -1:], error[:, :, -1:]), [jnp.moveaxis(m, 2, -1) for m in (s, error)]  # b c g r q
    inside = difference([m[..., :, None] for m in along], [m[..., None, :] for m in along])
    inside = decay(see_inside[:, :, None, None], inside)
    to_state = decay(see_leaving[..., None, None], difference(last, (s, error)))
    from_state = decay(see_entering[..., None, None], s)
    return x, B, C, weight, (inside, to_state, from_state, decay(passes[..., None, None], s[:, :, -1]))


def _itself(chunk_size, rank):
    """Whether the row that reads (q) and the row that has written (s) are of one position."""
    position = jnp.arange(chunk_size) // rank
    return position[:, None] == position


def _written(weight, own, chunk_size, rank):
    """Weight of what row s has written, where row q of its chunk reads it: b c g r q s, or 1 for q."""
    along = jnp.moveaxis(weight, 2, -1)[..., None, :]
    if own is None:
        return along
    own = jnp.moveaxis(_chunked(own, chunk_size, weight.shape[3]), 2, -1)[..., None, :]
    return jnp.where(_itself(chunk_size, rank), own, along)


def _exact_sums(a):
    """Sums of a along axis 2 as (sum, rounding error of the sum): their difference is as exact as the terms between.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B (the error of an addition).
    """

    def add(one, other):
        total = one[0] + other[0]
        added = total - one[0]
        rounding = (one[0] - (total - added)) + (other[0] - added)
        return total, one[1] + other[1] + rounding

    return lax.associative_scan(add, (a, jnp.zeros_like(a)), axis=2)


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
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *like.shape[2:])[:, : like.shape[1]]
