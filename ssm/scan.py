"""The selective scan of Mamba (S6): a linear recurrence whose decay and input depend on the position.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t . h_t + D u_t

How it is computed. A row is cut into chunks of `chunk_size` (axis q). An outer `lax.scan` carries the state from
chunk to chunk; inside a chunk the positions run

* one after the other (`"sequential"`): one fused loop over (n, e) a position, the choice in a program for a CPU, where
  the state stays in cache; the layout (b, n, e) keeps the wide axis innermost, so that the loop is vectorised. Without
  a gradient to come, the row is one chunk;
* all at once (`"associative"`): `lax.associative_scan` over the chunk, the choice for GPU, where a loop of tiny kernels
  would wait on its launches;
* one after the other in a kernel that keeps the state in VMEM (`"pallas"`, `ssm/kernels/selective_scan_tpu.py`): the
  choice for TPU, and there alone.

The gradient is written by hand: the forward pass keeps its inputs and the state entering each chunk (the kernel: the
inputs alone), the backward pass visits the chunks in reverse, rebuilds the states of one chunk at a time and runs the
adjoint recurrence

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}

through it. So nothing of size b l e n ever exists, forward or backward.

Axes: b batch, l position, c chunks, q position in a chunk, e inner width, n state size.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm.absent import blank
from ssm.checks import check_shapes, is_known_size
from ssm.forward_mode import by_hand
from ssm.platform import Kernel, by_platform
from ssm.segments import segment_runs, segment_starts
from ssm.sequence_cut import Along, cut_of, entering_states

Implementation = Literal["sequential", "associative", "pallas"]

# Measured on 2 CPU cores, forward + backward: flat from 16 to 64 at (b, l, e, n) = (1, 2048, 1536, 16), but 1.4 times
# slower at 32 and 1.6 times at 64 at (16, 256, 256, 16), where a chunk's states leave the cache. On GPU and TPU a
# longer chunk gives the scan more to do at once; the figure there is not measured.
# The kernel has its own; here is that of the loop in its place, where XLA divides a program over several TPUs.
_CHUNK_SIZE: dict[Implementation, int] = {"sequential": 16, "associative": 64, "pallas": 16}


# Positions a chunk where the state that a piece of a row adds is summed up.
SUMMED_AT_ONCE = 16


class _Form(NamedTuple):
    """How a scan runs."""

    implementation: Implementation
    chunk_size: int  # positions a chunk
    spacing: int  # positions from a state that is kept for the gradient to the next, a divisor of the chunk


class _Forms(NamedTuple):
    """How it runs in a program for each platform. All keep arrays of the same shapes for the gradient."""

    cpu: _Form
    tpu: _Form
    elsewhere: _Form


def selective_scan(
    u: Float[Array, "b l e"],
    delta: Float[Array, "b l e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, "e"] | None = None,
    z: Float[Array, "b l e"] | None = None,
    *,
    initial_state: Float[Array, "b e n"] | None = None,
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    along: Along | None = None,
) -> tuple[Float[Array, "b l e"], Float[Array, "b e n"]]:
    """Runs the selective state space over whole sequences.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = (C_t . h_t + D u_t) * silu(z_t)

    Differentiable in every array, the initial and the final state included (reverse mode). Computes in at least
    float32 whatever the inputs' dtype. Memory of the backward pass: the inputs, plus one state a chunk.

    Args:
      u: input.
      delta: step size, >= 0 (after softplus), dimensionless: one position is one step of this size.
      A: negative decay rates.
      B, C: input and output maps, one a position, shared by all channels.
      D: skip weight, or None for no skip.
      z: gate before its SiLU, or None for no gate.
      initial_state: the state before the first position, or None for zeros.
      mask: False where a position is not there, whatever lies there: the state passes it unchanged, y is 0.
      segment_ids: documents packed in a row, each a run of equal ids: the state is zero where a run begins. The run
        that the first position belongs to goes on from `initial_state`.
      chunk_size: positions a chunk; changes speed and memory, not the result. None takes the platform's.
      implementation: how positions run inside a chunk, "sequential" or "associative", or "pallas", a kernel for TPUs
        that has chunks of its own. None takes that of the platform that the program is for.
      along: inside `jax.shard_map`, where the row's other pieces are; see `ssm.sequence_cut`. States are the row's.

    Returns:
      (y, final_state): y in u's dtype, the state after the last position in at least float32.

    Raises:
      ValueError: shapes that disagree, a chunk_size below 1, or one for "pallas".
      NotImplementedError: "pallas" with float64, or (when it is lowered) in a program that is not for a TPU.

    Examples:
      >>> u = delta = jnp.ones((1, 3, 2))
      >>> A, B, C = -jnp.ones((2, 4)), jnp.ones((1, 3, 4)), jnp.ones((1, 3, 4))
      >>> y, state = ssm.selective_scan(u, delta, A, B, C)
      >>> y.shape, state.shape, round(float(y[0, 1, 0]), 4)  # 4 (1 + exp(-1))
      ((1, 3, 2), (1, 2, 4), 5.4715)

    Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2 and Algorithm 2; `selective_scan_ref` in
      mamba_ssm/ops/selective_scan_interface.py (softplus and its bias stay with the caller here).
    """
    sizes = check_shapes(
        u=(u, "b l e"),
        delta=(delta, "b l e"),
        A=(A, "e n"),
        B=(B, "b l n"),
        C=(C, "b l n"),
        D=(D, "e"),
        z=(z, "b l e"),
        initial_state=(initial_state, "b e n"),
        mask=(mask, "b l"),
        segment_ids=(segment_ids, "b l"),
    )
    if implementation not in (None, *_CHUNK_SIZE):
        raise ValueError(f"implementation={implementation!r}, expected None or one of {sorted(_CHUNK_SIZE)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}, expected at least 1")
    if chunk_size is not None and implementation == "pallas":
        raise ValueError(f"chunk_size={chunk_size}, expected None with implementation='pallas'")

    if along is None and (cut := cut_of(u)) is not None:
        positions = {"u": u, "delta": delta, "B": B, "C": C, "z": z, "mask": mask, "segment_ids": segment_ids}
        run = functools.partial(selective_scan, chunk_size=chunk_size, implementation=implementation)
        return cut.run(run, positions, {"initial_state": initial_state}, {"A": A, "D": D})
    dtype = jnp.result_type(u, delta, A, B, C, jnp.float32)
    if implementation == "pallas" and dtype != jnp.float32:
        raise NotImplementedError(f"implementation='pallas' computes in float32, not in {dtype}")
    if initial_state is None:
        initial_state = jnp.zeros((sizes["b"], sizes["e"], sizes["n"]), dtype)
    initial_state = initial_state.astype(dtype)
    if sizes["l"] == 0:
        return u, initial_state
    keep = None if segment_ids is None else 1 - segment_starts(segment_ids, along).astype(dtype)
    forms = _forms(implementation, chunk_size, u.shape, dtype)
    operands = u, delta, A.astype(dtype), B, C, D, z
    if along is None:
        return by_hand(_scan, "ssm.selective_scan")(*operands, initial_state, keep, mask, forms)
    runs = None if segment_ids is None else segment_runs(segment_ids, along)
    piece = by_hand(_scan_piece, "ssm.selective_scan")
    y, state = piece(*operands, along.at_first(initial_state), keep, mask, runs, forms, along)
    return y, along.of_last(state)


def selective_step(
    state: Float[Array, "b e n"],
    u: Float[Array, "b e"],
    delta: Float[Array, "b e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
    D: Float[Array, "e"] | None = None,
    z: Float[Array, "b e"] | None = None,
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """Advances the selective state space by one position.

        h' = exp(delta A) h + delta B u        y = (C . h' + D u) * silu(z)

    Args:
      state: h, at least float32. Zeros before the first position.
      u: input at this position.
      delta: step size, >= 0 (after softplus), dimensionless: one position is one step of this size. 0 leaves the
        state as it is, which is how a position that is not there is passed over.
      A: negative decay rates, float32.
      B, C: input and output maps at this position.
      D: skip weight, or None for no skip.
      z: gate before its SiLU, or None for no gate.

    Returns:
      (y, h'): y in u's dtype, h' in at least float32.

    Examples:
      >>> y, state = ssm.selective_step(
      ...     jnp.zeros((1, 2, 4)), jnp.ones((1, 2)), jnp.ones((1, 2)), -jnp.ones((2, 4)), *[jnp.ones((1, 4))] * 2
      ... )
      >>> y.tolist()
      [[4.0, 4.0]]

    Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2a-2b and Algorithm 2.
    """
    check_shapes(
        state=(state, "b e n"),
        u=(u, "b e"),
        delta=(delta, "b e"),
        A=(A, "e n"),
        B=(B, "b n"),
        C=(C, "b n"),
        D=(D, "e"),
        z=(z, "b e"),
    )
    dtype = jnp.result_type(state, u, delta, A, B, C, jnp.float32)
    wide = delta.astype(dtype)[..., None]  # b e 1
    state = jnp.exp(wide * A) * state + wide * u[..., None] * B[:, None, :].astype(dtype)
    y = jnp.sum(state * C[:, None, :], axis=-1)
    if D is not None:
        y = y + D.astype(dtype) * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state


# The scan with its gradient. `operands` are u, delta, A, B, C, D, z, the initial state, keep and mask, where keep is 0
# at a position that opens a document. Below, "chunked" is time first, (c, q, b, ...), and states are (b, n, e).


def _forms(implementation, chunk_size, shape, dtype):
    """How a scan runs in a program for each platform, by default or by name."""
    length, shortest = shape[1], _CHUNK_SIZE["sequential"]
    names = (implementation,) * 3
    if implementation is None:
        # For a TPU by the static schedule (experiments/aot/schedule.py) at (b, l, e, n) = (8, 2048, 1536, 16) on a v5e,
        # bfloat16, a gradient in ms: kernel 3.9, loop 5.8, all at once 75. In MiB of temporaries: 6, 124, 506.
        in_kernel = dtype == jnp.float32 and chunk_size is None and is_known_size(*shape)
        names = "sequential", "pallas" if in_kernel else "sequential", "associative"
    sizes = [chunk_size or _CHUNK_SIZE[name] for name in names]
    if not is_known_size(length):  # nothing says of a symbol that a chunk of one is whole chunks of the other
        return _Forms(*(_Form(name, sizes[-1], sizes[-1]) for name in names))
    if implementation is not None or chunk_size is not None or length <= shortest:
        sizes = [min(size, length) for size in sizes]
        return _Forms(*(_Form(name, size, size) for name, size in zip(names, sizes, strict=True)))
    return _Forms(*(_Form(name, size, shortest) for name, size in zip(names, sizes, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(10,))
def _scan(u, delta, A, B, C, D, z, initial_state, keep, mask, forms):
    def run(form):
        if form.implementation == "pallas":
            return _run_kernel
        if form.implementation == "sequential" and form is forms.cpu:
            # No state is kept, so chunks have no use.
            form = form._replace(chunk_size=u.shape[1], spacing=u.shape[1])
        return functools.partial(_run_without_states, form=form)

    return _choose(run, forms, u, delta, A, B, C, D, z, initial_state, keep, mask)


def _scan_forward(*arguments):
    *operands, forms = arguments

    def run(form):
        if form.implementation == "pallas":
            return functools.partial(_run_kernel_with_nothing, kept=kept)
        return functools.partial(_run, form=form)

    # The kernel keeps nothing, but what is kept has one shape on all platforms: the zeros are never read.
    loop = forms.elsewhere
    kept = None
    if loop.implementation != "pallas":
        kept = jax.eval_shape(functools.partial(_run, form=loop), *operands)[1]
    out, kept = _choose(run, forms, *operands)
    return out, (operands, kept)


def _scan_backward(forms, residuals, cotangents):
    operands, kept = residuals

    def run(form):
        return _run_kernel_backward if form.implementation == "pallas" else functools.partial(_run_backward, form=form)

    return *_choose(run, forms, operands, kept, cotangents), None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _choose(run, forms, *operands):
    """`run(form)` of the program's platform, called with the operands."""
    if len(set(forms)) == 1:
        return run(forms.cpu)(*operands)
    return by_platform(run(forms.cpu), run(forms.elsewhere), *operands, tpu=run(forms.tpu))


# In a kernel.


def _run_kernel(*operands):
    u, initial_state = operands[0], operands[7]
    return _KERNEL(_shapes_of((u, initial_state)), *operands)


def _run_kernel_with_nothing(*operands, kept):
    return _run_kernel(*operands), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)


def _run_kernel_backward(operands, kept, cotangents):
    u, delta, A, B, C, D, z, initial_state, *_ = operands
    A_and_D = jax.tree.map(lambda x: jax.ShapeDtypeStruct((u.shape[0], *x.shape), jnp.float32), (A, D))
    shapes = *_shapes_of((u, delta, B, C, z, initial_state)), *A_and_D
    return _gathered(_KERNEL_BACKWARD(shapes, *operands, *cotangents), operands)


def _gathered(gradients, operands):
    """The gradients in the order of the operands. Those in A and D come as one a row."""
    du, ddelta, dB, dC, dz, dinitial, dA, dD = gradients
    dD = None if dD is None else dD.sum(0).astype(operands[5].dtype)
    return du, ddelta, dA.sum(0), dB, dC, dD, dz, dinitial


def _in_place_of_kernel(*operands):
    return _run(*operands, form=_IN_PLACE_OF_KERNEL)[0]


def _in_place_of_kernel_backward(*operands_and_cotangents):
    operands, cotangents = operands_and_cotangents[:-2], operands_and_cotangents[-2:]
    kept = _run(*operands, form=_IN_PLACE_OF_KERNEL)[1]
    return _gradients(operands, kept, cotangents, form=_IN_PLACE_OF_KERNEL)


def _shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


_KERNEL = Kernel("ssm.kernels.selective_scan_tpu", "forward", _in_place_of_kernel, whole=(2, 5))
_KERNEL_BACKWARD = Kernel("ssm.kernels.selective_scan_tpu", "backward", _in_place_of_kernel_backward, whole=(2, 5))
_IN_PLACE_OF_KERNEL = _Form("sequential", _CHUNK_SIZE["sequential"], _CHUNK_SIZE["sequential"])


# Where the row is cut over devices, a piece's `given` state is added to the one that enters it from the left. What a
# piece adds to a state is found first, which is the forward pass without its outputs; the same in the other direction
# for the adjoint of the state.


@functools.partial(jax.custom_vjp, nondiff_argnums=(11, 12))
def _scan_piece(u, delta, A, B, C, D, z, given, keep, mask, runs, forms, along):
    entering = _entering(u, delta, A, B, given, mask, runs, along)
    return _scan.__wrapped__(u, delta, A, B, C, D, z, entering, keep, mask, forms)


def _scan_piece_forward(u, delta, A, B, C, D, z, given, keep, mask, runs, forms, along):
    entering = _entering(u, delta, A, B, given, mask, runs, along)
    out, residuals = _scan_forward(u, delta, A, B, C, D, z, entering, keep, mask, forms)
    return out, (residuals, runs)


def _scan_piece_backward(forms, along, kept, cotangents):
    residuals, runs = kept
    (_, delta, A, _, C, _, z, _, _, mask), _ = residuals
    dy, dleaving = cotangents
    delta, C, seen = (blank(mask, x) for x in (delta, C, dy))
    if z is not None:
        seen = seen.astype(A.dtype) * jax.nn.silu(blank(mask, z).astype(A.dtype))
    if runs is not None:
        seen = jnp.where((runs == 0)[..., None], seen, 0)
    read = _sum_up(seen, delta, A, C, backwards=True)
    dleaving = entering_states(along.mirror(), _passes(delta, A, runs), read, dleaving)
    return *_scan_backward(forms, residuals, (dy, dleaving)), None


_scan_piece.defvjp(_scan_piece_forward, _scan_piece_backward)


def _entering(u, delta, A, B, given, mask, runs, along):
    """The state that enters this piece: b e n."""
    u, delta, B = (blank(mask, x) for x in (u, delta, B))
    step = delta.astype(A.dtype) * u
    if runs is not None:
        step = jnp.where((runs == runs[:, -1:])[..., None], step, 0)
    return entering_states(along, _passes(delta, A, runs), _sum_up(step, delta, A, B), given)


def _passes(delta, A, runs):
    """What is left, behind a piece, of a state that enters it: b e n."""
    decay = jnp.exp(jnp.sum(delta.astype(A.dtype), axis=1)[..., None] * A)
    return decay if runs is None else jnp.where((runs[:, -1] == 0)[:, None, None], decay, 0)


def _sum_up(x, delta, A, M, *, backwards=False):
    """sum_t x_t M_t, decayed from behind each position to the end; `backwards`, from its start to before it: b e n.

    A chunk at a time. Inside one all positions are independent, so this takes fewer operations than a scan.
    """
    dtype, size = A.dtype, min(SUMMED_AT_ONCE, x.shape[1])
    At = A.T

    def body(state, inputs):
        x, delta, M = (m.astype(dtype) for m in inputs)  # q b e, q b e, q b n
        sums = lax.cumsum(delta, axis=0, reverse=not backwards)
        upto = sums if backwards else jnp.concatenate([sums[1:], jnp.zeros_like(sums[:1])])
        total = sums[-1 if backwards else 0]
        weighted = jnp.exp(upto[..., None, :] * At) * x[..., None, :] * M[..., :, None]  # q b n e
        return jnp.exp(total[..., None, :] * At) * state + jnp.sum(weighted, axis=0), None

    start = jnp.zeros((x.shape[0], *At.shape), dtype)
    state, _ = lax.scan(body, start, tuple(_chunked(m, size) for m in (x, delta, M)), reverse=backwards)
    return jnp.swapaxes(state, 1, 2)


# In loops.


@functools.partial(jax.jit, static_argnames="form")
def _run(u, delta, A, B, C, D, z, initial_state, keep, mask, *, form):
    """((y, final state), what the gradient takes: states c b n e, y before its gate)"""
    run_chunk, out_dtype = _CHUNK_FORWARD[form.implementation], u.dtype
    u, delta, B, C = (blank(mask, x) for x in (u, delta, B, C))

    def body(state, inputs):
        state, y, states = run_chunk(state, A.T, *inputs, form.spacing)
        return state, (y, states)

    size = form.chunk_size
    inputs = tuple(_chunked(x, size) for x in (u, delta, B, C)) + (_chunked(keep, size, fill=1),)
    start = jnp.swapaxes(initial_state, 1, 2)
    if size == u.shape[1]:
        state, (y, states) = body(start, jax.tree.map(lambda x: x[0], inputs))
        y = jnp.moveaxis(y, 0, 1)
    else:
        state, (y, states) = lax.scan(body, start, inputs)
        states = states.reshape(states.shape[0] * states.shape[1], *states.shape[2:])[: -(-u.shape[1] // form.spacing)]
        y = _unchunked(y, u.shape[1])
    if D is not None:
        y = y + D.astype(y.dtype) * u
    ungated = None if z is None else y
    if z is not None:
        y = y * jax.nn.silu(blank(mask, z).astype(y.dtype))
    return (y.astype(out_dtype), jnp.swapaxes(state, 1, 2)), (states, ungated)


def _run_without_states(*operands, form):
    return _run(*operands, form=form)[0]


@functools.partial(jax.jit, static_argnames="form")
def _run_backward(operands, kept, cotangents, *, form):
    """Gradients in u, delta, A, B, C, D, z and the initial state."""
    return _gathered(_gradients(operands, kept, cotangents, form=form), operands)


def _gradients(operands, kept, cotangents, *, form):
    """Gradients in u, delta, B, C, z and the initial state, and in A and D of each row."""
    u, delta, A, B, C, D, z, _, keep, mask = operands
    (entering, ungated), (dy, dstate) = kept, cotangents
    dtype = entering.dtype
    u, delta, B, C = (blank(mask, x) for x in (u, delta, B, C))
    dy = dy.astype(dtype)
    dz = dD = None
    if z is not None:
        gate = blank(mask, z).astype(dtype)
        s = jax.nn.sigmoid(gate)
        dz = blank(mask, (dy * ungated * s * (1 + gate * (1 - s))).astype(z.dtype))
        dy = dy * (gate * s)

    run_chunk, size = _CHUNK_BACKWARD[form.implementation], form.chunk_size

    def body(carry, inputs):
        carry, (du, *others) = run_chunk(carry, A.T, *inputs)
        if D is not None:
            du = du + D.astype(dtype) * inputs[1]
        # Rounded here, or what the loop gives is twice as large as what it took.
        return carry, tuple(d.astype(x.dtype) for d, x in zip((du, *others), (u, delta, B, C), strict=True))

    inputs = *(_chunked(x, size) for x in (dy, u, delta, B, C)), _chunked(keep, size, fill=1)
    start = jnp.swapaxes(dstate, 1, 2), jnp.zeros_like(entering[0])
    entering = entering[:: size // form.spacing]
    (g, dA), gradients = lax.scan(body, start, (entering, *inputs), reverse=True)
    du, ddelta, dB, dC = (blank(mask, _unchunked(d, u.shape[1])) for d in gradients)
    if D is not None:
        dD = jnp.sum(dy * u, axis=1)
    return du, ddelta, dB, dC, dz, jnp.swapaxes(g, 1, 2), jnp.swapaxes(dA, 1, 2), dD


def _chunked(x, chunk_size, *, fill=0):
    """b l * -> c q b *, the end filled up: a step of size 0 that keeps the state changes nothing."""
    if x is None:
        return None
    time_first = jnp.moveaxis(x, 1, 0)
    count = -(-x.shape[1] // chunk_size)
    missing = count * chunk_size - x.shape[1]
    padded = jnp.pad(time_first, ((0, missing),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
    return padded.reshape(count, chunk_size, *padded.shape[1:])


def _unchunked(x, length):
    """c q b * -> b l *"""
    return jnp.moveaxis(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:length], 0, 1)


def _discretise(step, delta, At, B, keep):
    """The recurrence h = a h + x at some positions, with step = delta u: a and x, each (..., b, n, e)."""
    a = jnp.exp(delta.astype(step.dtype)[..., None, :] * At)
    if keep is not None:
        a = a * keep[..., None, None]
    return a, step[..., None, :] * B.astype(step.dtype)[..., :, None]


def _read(h, C):
    return jnp.sum(h * C.astype(h.dtype)[..., :, None], axis=-2)


def _input_gradients(g, decayed, dy, u, delta, At, B):
    """Gradients at positions whose adjoint g and decayed state a h_{t-1} are known, both (..., b, n, e).

    Returns:
      ((du, ddelta, dB, dC), dA): each at its own position, so dA is still (..., b, n, e).
    """
    dtype = g.dtype
    u, delta, B = u.astype(dtype), delta.astype(dtype), B.astype(dtype)
    step = delta * u
    h = decayed + step[..., None, :] * B[..., :, None]
    through_decay = g * decayed
    gB = _read(g, B)
    contract = functools.partial(jnp.einsum, "...ne,...e->...n", precision=lax.Precision.HIGHEST)
    ddelta = jnp.sum(through_decay * At, axis=-2) + u * gB
    return (delta * gB, ddelta, contract(g, step), contract(h, dy)), through_decay * delta[..., None, :]


def _forward_sequential(state, At, u, delta, B, C, keep, spacing):
    def step(h, inputs):
        step, delta, B, C, keep = inputs
        a, x = _discretise(step, delta, At, B, keep)
        h = a * h + x
        return h, _read(h, C)

    # In one pass over all positions: inside the loop, XLA would multiply again for each of the n states.
    steps = delta.astype(state.dtype) * u
    final, y = lax.scan(step, state, (steps, delta, B, C, keep))
    return final, y, state[None]


def _backward_sequential(carry, At, entering, dy, u, delta, B, C, keep):
    def rebuild(h, inputs):
        u, delta, B, keep = inputs
        a, x = _discretise(delta.astype(h.dtype) * u, delta, At, B, keep)
        decayed = a * h
        return decayed + x, (a, decayed)

    def adjoint(carry, inputs):
        g, dA = carry
        a, decayed, dy, u, delta, B, C = inputs
        g = g + dy[..., None, :] * C.astype(g.dtype)[..., :, None]
        gradients, dA_here = _input_gradients(g, decayed, dy, u, delta, At, B)
        return (a * g, dA + dA_here), gradients

    _, (a, decayed) = lax.scan(rebuild, entering, (u, delta, B, keep))
    return lax.scan(adjoint, carry, (a, decayed, dy, u, delta, B, C), reverse=True)


def _linear_scan(a, x, *, reverse=False):
    """h_t = a_t h_{t-1} + x_t from zero along the first axis, all positions at once."""

    def combine(before, after):
        return after[0] * before[0], after[0] * before[1] + after[1]

    return lax.associative_scan(combine, (a, x), reverse=reverse)[1]


def _forward_associative(state, At, u, delta, B, C, keep, spacing):
    a, x = _discretise(delta.astype(state.dtype) * u, delta, At, B, keep)
    h = _linear_scan(a, x.at[0].add(a[0] * state))
    return h[-1], _read(h, C), jnp.concatenate([state[None], h[spacing - 1 : -1 : spacing]])


def _backward_associative(carry, At, entering, dy, u, delta, B, C, keep):
    g_after, dA = carry
    a, x = _discretise(delta.astype(entering.dtype) * u, delta, At, B, keep)
    h = _linear_scan(a, x.at[0].add(a[0] * entering))
    decayed = a * jnp.concatenate([entering[None], h[:-1]])
    # The adjoint runs backwards and decays by the *next* position's a; the last one's is already in g_after.
    seeds = (dy[..., None, :] * C.astype(h.dtype)[..., :, None]).at[-1].add(g_after)
    g = _linear_scan(jnp.concatenate([a[1:], jnp.ones_like(a[:1])]), seeds, reverse=True)
    gradients, dA_here = _input_gradients(g, decayed, dy, u, delta, At, B)
    return (a[0] * g[0], dA + dA_here.sum(0)), gradients


_CHUNK_FORWARD = {"sequential": _forward_sequential, "associative": _forward_associative}
_CHUNK_BACKWARD = {"sequential": _backward_sequential, "associative": _backward_associative}
