"""A recurrence with one decay a head, computed by matrix products: masked attention inside chunks, states between them.

    h_t = exp(a_t) h_{t-1} + w_t x_t B_t^T        y_t = h_t C_t        (h: n x p, a head)

A row is cut into chunks of `chunk_size` (axis q). With s_t the sum of a from the chunk's start,

    inside a chunk      y_i += sum_{j <= i} (C_i . B_j) exp(s_i - s_j) w_j x_j           masked attention
    state it adds       S   =  sum_j exp(s_last - s_j) w_j B_j x_j^T
    between chunks      h_out = exp(s_last) h_in + S                                      linear in the chunks
    from the state      y_i += exp(s_i) h_in^T C_i

Chunks are taken in groups, one group after the other, those of a group at once but for the step between chunks. On a
CPU a group is what fits the cache; elsewhere it is larger, so that products are, and bounded, so that memory is. The
program's platform decides, not the process's.

B and C keep their groups of heads through every product; a head reads its group's. Products take the inputs' dtype and
add up in at least float32; decays and states are at least float32.

The gradient is written by hand: only the inputs are kept, and on a CPU the states entering the chunks; the q x q
matrices are rebuilt. Exponents are differences of sums inside one chunk, masked before the exponential, and never
positive; the sums carry their rounding error along, so that weak decay behind strong decay is as exact as alone.

Axes: b batch, l position, c chunks, q s positions in a chunk (reading, written), h heads, g groups of heads, r heads of
a group, p head width, n state size, m = r p widths of all heads of a group.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssm.checks import is_known_size
from ssm.forward_mode import by_hand
from ssm.platform import by_platform
from ssm.precision import exact
from ssm.segments import segment_runs
from ssm.sequence_cut import Along, entering_states

# On a CPU, and elsewhere, where a register of a TPU has 128 lanes. By the compiler for a v5e alone, a gradient at 8
# rows of 2,048 positions, 24 heads of 64, n 128, bfloat16, has 2.0 ms of static schedule and 203 MiB of temporaries in
# chunks of 128, and 3.9 ms and 484 MiB in chunks of 64; for an H100 409 and 539 MiB. Nothing ran on either.
CHUNK_SIZE = 64
CHUNK_SIZE_ELSEWHERE = 128
# Of a group of chunks on a CPU, its q x q matrices, inputs and states, at most, unless it is a single chunk. Measured
# on a core with 1 MiB of its own, forward and backward: flat from 2^18 to 2^21, up to 1.3 times slower above and at
# single chunks.
GROUP_BYTES = 2**20
# Elsewhere, by the same compilers: with all chunks of 64 at once 1,191 and 995 MiB, in groups of this size 484 and 539,
# and the same schedule.
GROUP_BYTES_ELSEWHERE = 2**26


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
    along: Along | None = None,
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
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}, expected at least 1")
    b, _, h, p = x.shape
    dtype = jnp.result_type(x, weight, a, B, C, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, B.shape[3]), dtype)
    state = initial_state.astype(dtype)
    if 0 in x.shape:
        return jnp.zeros(x.shape, dtype), state
    runs = None if segment_ids is None else segment_runs(segment_ids, along)
    own = None if own is None else own.astype(dtype)
    arrays = x, weight.astype(dtype), own, a.astype(dtype), B, C, state, runs
    forms = _forms(x.shape, B.shape[3], jnp.dtype(dtype).itemsize, chunk_size, rank)
    named = "the recurrence of ssm.ssd, linear_attention and trapezoid"
    if along is None:
        return by_hand(_attend, named)(*arrays, forms, rank)
    return by_hand(_attend_piece, named)(*arrays, forms, rank, along)


class _Form(NamedTuple):
    """How it runs on a platform."""

    rows: int  # of a chunk
    size: int | None  # chunks of a group, None for all
    keeps: bool  # the states entering the chunks, for the gradient, which otherwise finds them again


def _forms(shape, n, itemsize, chunk_size, rank):
    """On a CPU and elsewhere."""
    b, length, h, p = shape

    def form(default, limit, uncounted):
        rows = rank * (max(1, default // rank) if chunk_size is None else chunk_size)
        if not is_known_size(length):
            return _Form(rows, uncounted, True)
        rows = min(rows, length)
        count = -(-length // rows)
        numbers = h * rows * (rows + p) + h * p * n  # in a chunk
        most = max(1, limit // ((b if is_known_size(b) else 1) * numbers * itemsize))
        size = max(m for m in range(1, min(most, count) + 1) if count % m == 0)
        return _Form(rows, None if size == count else size, True)

    cpu, elsewhere = form(CHUNK_SIZE, GROUP_BYTES, 1), form(CHUNK_SIZE_ELSEWHERE, GROUP_BYTES_ELSEWHERE, None)
    return cpu, elsewhere._replace(keeps=cpu.rows == elsewhere.rows)


class _Chunks(NamedTuple):
    """What all chunks read, chunks along axis 1."""

    x: Any  # b c q h p
    B: Any  # b c q (g n)
    C: Any  # b c q (g n)
    weight: Any  # b c h q
    own: Any  # b c h q, or None
    sums: Any  # b c h q: of a from the chunk's start
    error: Any  # b c h q: what rounding has taken from each sum
    runs: Any  # b c q, or None
    before: Any  # b c: the run that the chunk before ends in, or None


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _attend(x, weight, own, a, B, C, initial_state, runs, forms, rank):
    return _attend_forward(x, weight, own, a, B, C, initial_state, runs, forms, rank)[0]


def _attend_forward(*arguments):
    *arrays, forms, rank = arguments

    def run(*arrays, form):
        out, entering = _read(arrays, form, rank)
        if not form.keeps:  # what is kept has one shape on all platforms: these zeros are never read
            entering = jnp.zeros((entering.shape[0], -(-arrays[0].shape[1] // forms[0].rows), *entering.shape[2:]))
        return out, entering.astype(arrays[6].dtype)

    out, entering = _choose(run, forms, *arrays)
    return out, (arrays, entering)


def _attend_backward(forms, rank, residuals, cotangents):
    def run(arrays, entering, cotangents, form):
        if not form.keeps:
            entering = _read(arrays, form, rank, states_only=True)[1]
        return _read_backward(arrays, entering, cotangents, form, rank)

    return *_choose(run, forms, *residuals, cotangents), None


def _choose(run, forms, *operands):
    """`run(*operands, form=...)` with the form of the program's platform."""
    if forms[0] == forms[1]:
        return run(*operands, form=forms[0])
    return by_platform(*(functools.partial(run, form=form) for form in forms), *operands)


def _read(arrays, form, rank, *, states_only=False):
    """((y, final state), states entering the chunks); with `states_only` y is None."""
    x, weight, own, a, B, C, initial_state, runs = arrays
    chunks = _make_chunks(x, weight, own, a, B, C, runs, form.rows)

    def step(state, chunks):
        state, (y, entering) = _read_group(state, chunks, g=B.shape[2], rank=rank)
        return state, (None if states_only else y, entering)

    state, (y, entering) = _over_groups(step, form.size, _grouped_state(initial_state, B.shape[2]), chunks)
    return (None if states_only else _unchunked(y, x), _ungrouped_state(state, initial_state)), entering


def _read_backward(arrays, entering, cotangents, form, rank):
    x, weight, own, a, B, C, _, runs = arrays
    dy, dfinal = cotangents
    chunks = _make_chunks(x, weight, own, a, B, C, runs, form.rows)
    arrays = chunks, entering, _chunked(dy, *chunks.x.shape[1:3])
    step = functools.partial(_read_group_backward, g=B.shape[2], rank=rank)
    dstate, gradients = _over_groups(step, form.size, _grouped_state(dfinal, B.shape[2]), arrays, reverse=True)
    dx, dweight, down, ds, dB, dC = gradients
    lower = jnp.tri(ds.shape[-1], dtype=ds.dtype)
    da = jnp.einsum("bchq,qs->bcsh", ds, lower, precision=lax.Precision.HIGHEST)  # a_s is in every sum from s on
    dx, dB, dC = (_unchunked(d, m).astype(m.dtype) for d, m in ((dx, x), (dB, B), (dC, C)))
    dweight, down = (None if d is None else _unchunked(jnp.moveaxis(d, 3, 2), weight) for d in (dweight, down))
    return dx, dweight, down, _unchunked(da, a), dB, dC, _ungrouped_state(dstate, dfinal)


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _attend_piece(x, weight, own, a, B, C, given, runs, forms, rank, along):
    return _attend_piece_forward(x, weight, own, a, B, C, given, runs, forms, rank, along)[0]


def _attend_piece_forward(x, weight, own, a, B, C, given, runs, forms, rank, along):
    later = lax.cumsum(a, axis=1, reverse=True)
    to_end, seen = jnp.exp(jnp.pad(later[:, 1:], ((0, 0), (0, 1), (0, 0)))), None
    if runs is not None:
        seen = runs == runs[:, -1:]
    added = _sum_outer(weight * to_end, x, B, seen)
    entering = entering_states(along, _passes(later[:, 0], runs), added, given)
    return _attend_forward(x, weight, own, a, B, C, entering, runs, forms, rank)


def _attend_piece_backward(forms, rank, along, residuals, cotangents):
    (_, _, _, a, _, C, _, runs), _ = residuals
    dy, dleaving = cotangents
    sums = lax.cumsum(a, axis=1)
    read = _sum_outer(jnp.exp(sums), dy, C, None if runs is None else runs == 0)
    dleaving = entering_states(along.mirror(), _passes(sums[:, -1], runs), read, dleaving)
    return _attend_backward(forms, rank, residuals, (dy, dleaving))


_attend_piece.defvjp(_attend_piece_forward, _attend_piece_backward)


def _passes(total, runs):
    """What is left, behind a piece, of a state that enters it: b h."""
    decay = jnp.exp(total)
    return decay if runs is None else jnp.where((runs[:, -1] == 0)[:, None], decay, 0)


def _sum_outer(weight, x, B, seen):
    """sum_t weight_t x_t B_t^T over the positions that are seen, all if None: b h p n."""
    if seen is not None:
        weight = jnp.where(seen[..., None], weight, 0)
    (b, length, h, p), groups = x.shape, B.shape[2]
    weighted = (x * weight[..., None]).reshape(b, length, groups, h // groups, p)
    return _product("blgrp,blgn->bgrpn", weighted, B.astype(weighted.dtype)).reshape(b, h, p, B.shape[3])


def _over_groups(step, size, carry, arrays, *, reverse=False):
    """Steps (carry, arrays) -> (carry, out) through the chunks, axis 1, `size` of them at a time."""
    return step(carry, arrays) if size is None else _loop_over_groups(jax.jit(step), size, reverse, carry, arrays)


def _loop_over_groups(step, size, reverse, carry, arrays):
    """The steps as a loop that reads and writes its arrays in place: `lax.scan` would turn axis 1 to the front.

    A turn fetches what the next one reads. XLA would otherwise fuse the fetching into each use, and a loop whose start
    is a number in memory is not vectorised: 20 times slower in the exponentials.
    """
    count = jax.tree.leaves(arrays)[0].shape[1] // size
    if not is_known_size(count):
        count = jnp.asarray(count)  # a symbol is no number to count up to
    last = count - 1

    def fetch(i):
        return jax.tree.map(lambda m: lax.dynamic_slice_in_dim(m, i * size, size, 1), arrays)

    def body(i, carried):
        carry, group, outs = carried
        i = last - i if reverse else i
        carry, out = step(carry, group)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=1)
        return carry, fetch(i - 1 if reverse else i + 1), jax.tree.map(put, outs, out)

    group = fetch(last if reverse else 0)
    _, out = jax.eval_shape(step, carry, group)
    chunks = jax.tree.leaves(arrays)[0].shape[1]
    outs = jax.tree.map(lambda m: lax.empty((m.shape[0], chunks, *m.shape[2:]), m.dtype), out)
    carry, _, outs = lax.fori_loop(0, count, body, (carry, group, outs))
    return carry, outs


def _read_group(state, chunks, *, g, rank):
    """Some chunks, from the state that enters the first: (state that leaves the last, (y, state entering each))."""
    chunks, low = _by_groups(chunks, g), chunks.x.dtype
    x, B, C = chunks.x, chunks.B, chunks.C
    inside, to_state, from_state, total = _decays(chunks, rank)
    scores = _product("bcqgn,bcsgn->bcgqs", C, B)[:, :, :, None] * (inside * _written(chunks, rank))
    y = _product("bcgrqs,bcsgrp->bcgrqp", scores.astype(low), x)
    added = _product("bcqgn,bcqgm->bcgnm", B, _flat(_scale(x, chunks.weight * to_state)))
    state, entering = _pass_on(state, added, total)
    read = _product("bcqgn,bcgnm->bcgqm", C, entering.astype(low))
    y = jnp.moveaxis(y, 4, 2) + _scale(_heads(read, x), from_state)
    return state, (_join(y), entering)


def _read_group_backward(dstate, arrays, *, g, rank):
    """The adjoint of `_read_group`: from that of the leaving state, (that of the entering state, gradients)."""
    chunks, entering, dy = arrays
    chunks, low = _by_groups(chunks, g), chunks.x.dtype
    x, B, C, weight = chunks.x, chunks.B, chunks.C, chunks.weight
    dy = dy.reshape(x.shape)
    inside, to_state, from_state, total = _decays(chunks, rank)

    # 1. The adjoint of the state between chunks, backwards; `leaving` is that of the state that leaves each chunk.
    dy_state = _scale(dy, from_state)  # at least float32
    dy_low, dy_state_low, entering_low = dy.astype(low), _flat(dy_state).astype(low), entering.astype(low)
    direct = _product("bcqgn,bcqgm->bcgnm", C, dy_state_low)
    dstate, leaving = _pass_on(dstate, direct, total, reverse=True)
    leaving_low = leaving.astype(low)

    # 2. Inside the chunks. `dwritten` is the gradient in the weights, `dinside` that in the exponents s_i - s_j.
    written = _written(chunks, rank)
    decayed = _product("bcqgn,bcsgn->bcgqs", C, B)[:, :, :, None] * inside
    dscores = _product("bcqgrp,bcsgrp->bcgrqs", dy_low, x)
    dwritten = dscores * decayed
    dinside = dwritten * written
    dproducts = jnp.sum(dscores * (inside * written), axis=3).astype(low)  # b c g q s

    # 3. Inputs. What a position gave to the leaving state: read back by B, then by x.
    back = _scale(_heads(_product("bcqgn,bcgnm->bcgqm", B, leaving_low), x), to_state)
    dx = _product("bcqgrp,bcgrqs->bcgrps", dy_low, (decayed * written).astype(low))
    dx = jnp.moveaxis(dx, 5, 2) + _scale(back, weight)
    dC = _product("bcgqs,bcsgn->bcgqn", dproducts, B) + _product("bcqgm,bcgnm->bcgqn", dy_state_low, entering_low)
    given = _flat(_scale(x, weight * to_state)).astype(low)
    dB = _product("bcgqs,bcqgn->bcsgn", dproducts, C)
    dB = dB + jnp.moveaxis(_product("bcqgm,bcgnm->bcgqn", given, leaving_low), 3, 2)

    # 4. Weights.
    given = jnp.moveaxis(_sum_last(back * x), 2, -1)  # b c g r q
    down = None
    if chunks.own is not None:
        itself = _itself(dwritten.shape[-1], rank)
        down = _join(jnp.sum(jnp.where(itself, dwritten, 0), axis=4), 2)
        dwritten = jnp.where(itself, 0, dwritten)
    dweight = given + dwritten.sum(4)

    # 5. Exponents: s_i enters the rows, -s_j the columns; s_last the state's decay and what is added to it.
    given = given * weight
    read = _heads(_product("bcqgn,bcgnm->bcgqm", C, entering_low), x)
    ds = _sum_last(dinside) - dinside.sum(4) + jnp.moveaxis(_sum_last(dy_state * read), 2, -1) - given
    kept = jnp.sum(jnp.sum(leaving * entering, axis=3).reshape(total.shape + x.shape[-1:]), axis=-1)
    ds = ds.at[..., -1].add(total * kept + given.sum(-1))

    dC = jnp.moveaxis(dC, 3, 2)
    return dstate, (_join(dx), _join(dweight, 2), down, _join(ds, 2), _flat(dB), _flat(dC))


def _pass_on(state, added, total, *, reverse=False):
    """The states h_out = total h_in + added through the chunks: (the last h_out, h_in of each)."""
    total = jnp.repeat(total, added.shape[-1] // total.shape[-1], axis=-1)[:, :, :, None]  # b c g 1 m
    if added.shape[1] == 1:
        return total[:, 0] * state + added[:, 0], state[:, None]

    def step(state, chunk):
        added, total = chunk
        return total * state + added, state

    state, entering = lax.scan(step, state, (jnp.moveaxis(added, 1, 0), jnp.moveaxis(total, 1, 0)), reverse=reverse)
    return state, jnp.moveaxis(entering, 0, 1)


def _decays(chunks, rank):
    """Decays inside (b c g r q s), to the leaving, from the entering state (b c g r q), over the chunk (b c g r)."""
    s, error, runs, before = chunks.sums, chunks.error, chunks.runs, chunks.before
    position = jnp.arange(s.shape[-1]) // rank
    see_inside = position[:, None] >= position
    see_leaving = see_entering = passes = True
    if runs is not None:
        see_inside = see_inside & (runs[..., :, None] == runs[..., None, :])[:, :, None, None]
        see_leaving, see_entering = (m[:, :, None, None] for m in (runs == runs[..., -1:], runs == before[..., None]))
        passes = (runs[..., -1] == before)[:, :, None, None]

    def decay(see, exponent):
        return jnp.exp(exponent if see is True else jnp.where(see, exponent, -jnp.inf))

    def between(one, other):
        return s[one] - s[other] + (error[one] - error[other])

    reading, writing, last = (..., slice(None), None), (..., None, slice(None)), (..., slice(-1, None))
    inside, to_state = decay(see_inside, between(reading, writing)), decay(see_leaving, between(last, ...))
    return inside, to_state, decay(see_entering, s), decay(passes, s[..., -1])


def _itself(chunk_size, rank):
    """Whether the row that reads (q) and the row that has written (s) are of one position."""
    position = jnp.arange(chunk_size) // rank
    return position[:, None] == position


def _written(chunks, rank):
    """Weight of what row s has written, where row q of its chunk reads it: b c g r q s, or 1 for q."""
    weight = chunks.weight[..., None, :]
    if chunks.own is None:
        return weight
    return jnp.where(_itself(weight.shape[-1], rank), chunks.own[..., None, :], weight)


def _exact_sums(a):
    """Sums of a (b c q h) along q as (sum, what rounding took from it), b c h q: differences are as exact as the terms.

    Two products with a triangle. The first gives sums with some error each; what two neighbours and the a between them
    disagree in, the second adds up. A product leaves q innermost in memory, as the exponentials need it.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B (the error of an addition).
    """
    upper = jnp.tri(a.shape[2], dtype=a.dtype).T
    add_up = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    sums = add_up("bcqh,qs->bchs", a, upper)
    before = jnp.pad(sums[..., :-1], ((0, 0),) * 3 + ((1, 0),))
    grown = sums - before
    back = grown - sums
    rounding = (sums - (grown - back)) - (before + back)
    missing = (jnp.moveaxis(a, 2, 3) - grown) - rounding
    return sums, add_up("bchq,qs->bchs", missing, upper)


def _make_chunks(x, weight, own, a, B, C, runs, chunk_size):
    """The end is filled up: steps of size 0 change nothing."""
    count = -(-x.shape[1] // chunk_size)
    chunked = functools.partial(_chunked, count=count, chunk_size=chunk_size)
    sums, error = _exact_sums(chunked(a))
    weight, own = (None if w is None else jnp.moveaxis(chunked(w), 2, 3) for w in (weight, own))
    B, C = (_flat(chunked(m.astype(x.dtype))) for m in (B, C))
    before = None
    if runs is not None:
        runs = chunked(runs, mode="edge")
        before = jnp.pad(runs[:, :-1, -1], ((0, 0), (1, 0)))  # run 0 goes on from the initial state
    return _Chunks(chunked(x), B, C, weight, own, sums, error, runs, before)


def _chunked(x, count, chunk_size, *, mode="constant"):
    """b l * -> b c q *"""
    missing = count * chunk_size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    return x.reshape(x.shape[0], count, chunk_size, *x.shape[2:])


def _unchunked(x, like):
    """Back to b l h *, without the filling."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *like.shape[2:])[:, : like.shape[1]]


def _grouped_state(state, groups):
    """b h p n -> b g n m"""
    b, _, _, n = state.shape
    return jnp.swapaxes(state.reshape(b, groups, -1, n), 2, 3)


def _ungrouped_state(state, like):
    return jnp.swapaxes(state, 2, 3).reshape(like.shape)


def _by_groups(chunks, g):
    """The chunks with their heads, and B's and C's numbers, split by groups: h -> g r, (g n) -> g n."""

    def split(m, axis):
        return None if m is None else m.reshape(*m.shape[:axis], g, -1, *m.shape[axis + 1 :])

    heads_last = {name: split(getattr(chunks, name), 3) for name in ("x", "B", "C")}
    heads_first = {name: split(getattr(chunks, name), 2) for name in ("weight", "own", "sums", "error")}
    return chunks._replace(**heads_last, **heads_first)


def _join(x, axis=3):
    """g r -> h, g at `axis`"""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _flat(x):
    """Joins the last two axes: r p -> m, g n -> (g n)."""
    return x.reshape(*x.shape[:-2], -1)


def _heads(x, like):
    """b c g q m -> b c q g r p"""
    return jnp.moveaxis(x, 3, 2).reshape(like.shape)


def _scale(x, weight):
    """x b c q g r p times a weight b c g r q for each head and position."""
    return x * jnp.moveaxis(weight, -1, 2)[..., None]


def _sum_last(x):
    """Sums along the last axis, as a product with ones: XLA's own sum on a CPU adds one number at a time."""
    return jnp.einsum("...s,s->...", x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST)


def _product(equation, one, other):
    """A matrix product that adds up in at least float32, and is one of float32 where an operand is."""
    dtype = jnp.promote_types(one.dtype, jnp.float32)
    return jnp.einsum(equation, one, other, precision=exact(one, other), preferred_element_type=dtype)
