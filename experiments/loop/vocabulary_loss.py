"""Cross-entropy over a vocabulary, some positions at a time: logits of a whole batch are never there at once.

16 rows of 2,048 tokens have 6 GiB of float32 logits in a vocabulary of 50,000, more than all else that a small model's
step keeps. Here a loop makes the logits of as many positions as have `LOGITS` of them, takes their loss and, where it
is differentiated, its gradient in what the head reads and in the head's parameters: when the loop ends all of it is
known, no logits are kept, and none are made twice.

A part has positions from everywhere in the batch, so that devices that have rows, or positions, of their own each have
their share of every part. The head reads a part's positions as one row: a TPU's tiles have 8 positions, and 19 to a
row leave holes in every array, to be written around at each turn from two axes to one, in time and in the program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.loop.cross_entropy import check_targets, counted, cross_entropy

LOGITS = 2**26  # on a device, in a part: 256 MiB in float32, of 1,300 positions with a vocabulary of 50,000
ROWS, POSITIONS = ("data", "fsdp", "expert"), ("sequence",)
"""The axes of a mesh that cut a batch."""


class GuessSums(NamedTuple):
    """Sums over positions, each times its weight."""

    total: jax.Array
    """Cross-entropy, in nats."""
    correct: jax.Array
    """1 where the target has the highest logit."""


def vocabulary_loss(
    head: Callable[[Float[Array, "b l d"]], Float[Array, "b l v"]],
    hidden: Float[Array, "b l d"],
    targets: Int[Any, "b l"],
    weights: Float[Any, "b l"],
    n_targets: int,
) -> GuessSums:
    """What a head's guesses cost, as `cross_entropy(head(hidden), ...)` has it, summed.

    Its gradient is exact, in the head's parameters, hidden and weights; there is no forward-mode differentiation where
    the batch is taken in parts.

    Args:
      head: gives logits of each position by itself. It may read parameters that the loss is differentiated in.
      hidden: what it reads.
      targets, weights, n_targets: as in `cross_entropy`. Where a weight is 0, hidden may be anything.

    Raises:
      ValueError: as `cross_entropy`.
    """
    check_targets(targets, weights, n_targets)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    n_rows, n_positions = targets.shape
    rows, positions = parts(n_rows, n_positions, n_targets)
    pieces = tuple(_cut(x, rows, positions) for x in (hidden, targets, weights))
    if rows == positions == 1:
        return _sums(head, n_targets, *(x[0] for x in pieces))
    # What the head reads besides becomes an argument, that a gradient can be given for.
    read, parameters = jax.closure_convert(head, pieces[0][0])
    return _looped(read, n_targets, pieces[0], tuple(parameters), *pieces[1:])


def parts(rows: int, positions: int, n_targets: int) -> tuple[int, int]:
    """Into how many parts rows and positions are cut, on the mesh that is set; 1 and 1: there is room for all."""
    across, along = _devices(ROWS), _devices(POSITIONS)
    wanted = rows * positions * n_targets / (across * along * LOGITS)
    if wanted <= 1:
        return 1, 1
    most = max(1, positions // along)
    cut_positions = _nearest_divisor(most, wanted)
    if not wanted / 2 < cut_positions < wanted * 2:
        cut_positions = min(math.ceil(wanted), most)  # the last ones are filled up
    return _nearest_divisor(max(1, rows // across), wanted / cut_positions), cut_positions


def _devices(axes: tuple[str, ...]) -> int:
    """Devices along axes of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _nearest_divisor(n: int, wanted: float) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def _cut(x, rows, positions):
    """(parts, 1, b l, ...): row r goes to part r % rows, and positions likewise.

    (parts, b, l, ...) where devices have positions of their own: those of all rows as one have no single cut.
    """
    x = jnp.pad(x, [(0, -x.shape[0] % rows), (0, -x.shape[1] % positions), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(-1, rows, x.shape[1] // positions, positions, *x.shape[2:])
    x = jnp.moveaxis(x, (1, 3), (0, 1)).reshape(rows * positions, x.shape[0], x.shape[2], *x.shape[4:])
    return x if _devices(POSITIONS) > 1 else x.reshape(x.shape[0], 1, -1, *x.shape[3:])


def _sums(head, n_targets, hidden, targets, weights) -> GuessSums:
    logits = head(counted(hidden, weights))
    hits = jnp.argmax(logits[..., :n_targets], axis=-1) == targets
    return GuessSums(jnp.sum(cross_entropy(logits, targets, weights, n_targets)), jnp.sum(hits * weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _looped(read, n_targets, hidden, parameters, targets, weights):
    def step(sums, piece):
        hidden, targets, weights = piece
        more = _sums(lambda x: read(x, *parameters), n_targets, hidden, targets, weights)
        return jax.tree.map(jnp.add, sums, more), None

    sums, _ = jax.lax.scan(
        step, _zeros(read, n_targets, hidden, parameters, targets, weights), (hidden, targets, weights)
    )
    return sums


def _zeros(read, n_targets, hidden, parameters, targets, weights):
    """The sums of no part."""
    one = (x[0] for x in (hidden, targets, weights))
    shapes = jax.eval_shape(lambda *one: _sums(lambda x: read(x, *parameters), n_targets, *one), *one)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _forward(read, n_targets, hidden, parameters, targets, weights):
    def cost(hidden, parameters, weights, targets):
        sums = _sums(lambda x: read(x, *parameters), n_targets, hidden, targets, weights)
        return sums.total, sums

    def step(carry, piece):
        sums, summed = carry
        hidden, targets, weights = piece
        gradients, more = jax.grad(cost, argnums=(0, 1, 2), has_aux=True)(hidden, parameters, weights, targets)
        d_hidden, d_parameters, d_weights = gradients
        summed = jax.tree.map(lambda sum, more: sum + more.astype(sum.dtype), summed, d_parameters)
        return (jax.tree.map(jnp.add, sums, more), summed), (d_hidden, d_weights)

    zeros = _zeros(read, n_targets, hidden, parameters, targets, weights)
    none = [jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for p in parameters]
    (sums, summed), (d_hidden, d_weights) = jax.lax.scan(step, (zeros, tuple(none)), (hidden, targets, weights))
    d_parameters = tuple(d.astype(p.dtype) for d, p in zip(summed, parameters, strict=True))
    return sums, (d_hidden, d_parameters, d_weights)


def _backward(read, n_targets, saved, cotangent):
    d_hidden, d_parameters, d_weights = jax.tree.map(lambda d: (d * cotangent.total).astype(d.dtype), saved)
    return d_hidden, d_parameters, None, d_weights


_looped.defvjp(_forward, _backward)
