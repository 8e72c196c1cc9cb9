"""How far a student's insides are from its teacher's: which positions its projections find alike, and hidden states.

    python -m experiments.causal_lm tiny --init RUN --quantize.bits 1 --teacher RUN --directions 1

For each part F that a mixer writes (queries, keys, values, or what takes their place, see `zoo.reuse.projections`),

    P = F F^T / ||F F^T||        of each row, over pairs of positions of one document        b l l
    distance = sum over layers and parts of ||P - P_teacher||^2 + sum over layers of mean over channels of (h - h_t)^2

A matrix of similarities has no scale and no axes of F's: few bits change sizes and bases, and what attention or a
state space reads of F is which positions are like which.

Source: Qin et al. 2022, arXiv:2203.06390, section 3.3 (direction-matching distillation, and the hidden states' loss
beside it). Here: squared distances of both; F with all its heads together; each row of the batch by itself, pairs of
one document and positions that count alone; rows weighted by how many positions count; hidden states behind each block
and not the embedding. It needs l^2 numbers for each part, and the teacher's F and h go with the batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import zoo
from experiments.causal.pair import per_token
from zoo.reuse.projections import projections


class Projected(NamedTuple):
    """What a model's layers write."""

    parts: dict[str, Float[Array, "b l p"]]
    """By its name, each part that a mixer writes."""
    hidden: tuple[Float[Array, "b l d"], ...]
    """The residual stream behind each block."""


def project(model: Any, ids: jax.Array, segment_ids: jax.Array, rngs: nnx.Rngs | None) -> tuple[Any, Any, Projected]:
    """`run` of a language model, and what its layers write: (hidden, loss of its mixers, what they wrote)."""
    with projections(model) as (telling, written):
        told: Any = telling
        hidden, auxiliary = told.run(ids, segment_ids=segment_ids, rngs=rngs)
    return hidden, auxiliary, Projected(written.parts, tuple(written.hidden))


def pattern(F: Float[Array, "b l p"], together: Float[Array, "b l l"]) -> Float[Array, "b l l"]:
    """F F^T over its norm in each row, of pairs that are together (1, others 0); zeros of a row without such pairs."""
    wide = F.astype(jnp.promote_types(F.dtype, jnp.float32))
    similar = jnp.einsum("bip,bjp->bij", wide, wide) * together
    square = jnp.sum(jnp.square(similar), axis=(1, 2), keepdims=True)
    return similar * jax.lax.rsqrt(jnp.where(square == 0, 1, square))


def unlike(
    student: Projected, teacher: Projected, segment_ids: Int[Array, "b l"], weights: Float[Array, "b l"]
) -> Float[Array, ""]:
    """How far what a student writes is from what its teacher does, summed over the positions that count.

    Args:
      student, teacher: of the same names and hidden widths.
      segment_ids: documents packed in a row.
      weights: of positions.
    """
    counts = weights > 0
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    together = (same & counts[:, :, None] & counts[:, None, :]).astype(jnp.float32)
    of_row, total = jnp.sum(weights, axis=1), jnp.float32(0)
    for name, F in student.parts.items():
        apart = pattern(F, together) - pattern(jnp.asarray(teacher.parts[name]), together)
        total += jnp.sum(of_row * jnp.sum(jnp.square(apart), axis=(1, 2)))
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        total += per_token(ours - theirs, weights)
    return total


def check_alike(source: str, teacher: zoo.CausalLM, student: Any) -> None:
    """Raises a ValueError where a teacher's layers do not write what the student's do.

    Args:
      source: what the teacher is called.
      teacher, student: models, or shapes of them.
    """

    def shapes(model: Any) -> Projected:
        ids = jnp.zeros((1, 4), jnp.int32)
        graphdef, state = nnx.split(model)
        return jax.eval_shape(lambda state: project(nnx.merge(graphdef, state), ids, ids, None)[2], state)

    theirs, ours = shapes(teacher), shapes(student)
    if len(theirs.hidden) != len(ours.hidden):
        depth = f"{len(theirs.hidden)} layers, the model that it teaches {len(ours.hidden)}"
        raise ValueError(f"--directions with --teacher {source}: it has {depth}")
    if (width := theirs.hidden[0].shape[-1]) != ours.hidden[0].shape[-1]:
        raise ValueError(
            f"--directions with --teacher {source}: its hidden states have {width} channels, those of the model that "
            f"it teaches {ours.hidden[0].shape[-1]}"
        )
    if other := sorted(theirs.parts.keys() ^ ours.parts.keys()):
        raise ValueError(
            f"--directions with --teacher {source}: {other[0]} is in one of the two models alone; mixers have to agree"
        )
    if cut := [name for name, part in ours.parts.items() if part.shape[1] != 4]:
        raise ValueError(f"--directions with {cut[0]}, which reads some of the positions alone")
