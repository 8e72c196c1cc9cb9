"""A teacher of attention, its student of linear attention, and how far apart they are."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.causal.next_token import next_token_loss
from experiments.loop.train import sum_over


class Pair(nnx.Module):
    """A teacher and its student, and how large what the teacher's layers give is, to measure distances by."""

    blocks = "student.backbone.layers."
    """How the names of the student's blocks begin."""

    def __init__(self, teacher: Any, student: Any):
        self.teacher, self.student = teacher, student
        n = len(zoo.converted_layers(teacher.backbone, student.backbone))
        self.mixed_square = nnx.Variable(jnp.ones((n,)))
        self.update_square = nnx.Variable(jnp.ones((n,)))

    def compare(self, batch: Mapping[str, Any]) -> list[zoo.Compared]:
        """The converted blocks on a batch."""
        x = self.teacher.embed(batch["tokens"])
        return zoo.compare_layers(self.teacher.backbone, self.student.backbone, x, segment_ids=batch["segment_ids"])

    def logits(self, model: Any, batch: Mapping[str, Any]) -> jax.Array:
        """What one of them says of each next token."""
        return model(batch["tokens"], segment_ids=batch["segment_ids"])

    def counted(self, batch: Mapping[str, Any]) -> jax.Array:
        """Weights of the positions at which layers are compared."""
        return batch["weights"]


def per_token(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean square over the channels, summed over the tokens that count."""
    return jnp.sum(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) * weights)


def layer_error(pair: Pair, batch: Mapping[str, Any]) -> jax.Array:
    """Squared error of the mixers' outputs over the mean square of the teacher's: 1 is what zeros would have.

    A mean over channels and layers, and a sum over tokens. Each layer is fed what enters the teacher's.
    """
    counted = pair.counted(batch)
    errors = [per_token(each.student.mixed - each.teacher.mixed, counted) for each in pair.compare(batch)]
    return jnp.mean(jnp.stack(errors) / pair.mixed_square[...])


def hidden_error(pair: Pair, batch: Mapping[str, Any]) -> jax.Array:
    """Squared error of the blocks' outputs, over the mean square of what the teacher's blocks add to their input."""
    counted = pair.counted(batch)
    errors = [per_token(each.student.out - each.teacher.out, counted) for each in pair.compare(batch)]
    return jnp.mean(jnp.stack(errors) / pair.update_square[...])


def kl(pair: Pair, batch: Mapping[str, Any]) -> jax.Array:
    """KL divergence of the student's next token from the teacher's, in nats at temperature 1, summed over tokens."""
    return kl_of(pair.logits(pair.teacher, batch), pair.logits(pair.student, batch), batch["weights"])


def kl_of(taught: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
    """KL divergence of what `logits` say from what `taught` say, in nats, summed over the tokens that count."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(x.astype(wide)) for x in (taught, logits))
    return jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * weights)


DISTANCES: dict[str, Callable[[Pair, Mapping[str, Any]], jax.Array]] = {
    "layer_error": layer_error,
    "hidden_error": hidden_error,
    "kl": kl,
}


def measure(pair: Pair, batch: Mapping[str, Any], rngs: None) -> dict[str, jax.Array]:
    """All distances of a student from its teacher and its own loss, as sums over "weight" tokens."""
    loss = next_token_loss(pair.student, batch, None)
    return {"nats": loss.total, "weight": loss.weight} | {name: f(pair, batch) for name, f in DISTANCES.items()}


def _squares(pair: Pair, batch: Mapping[str, Any], rngs: None) -> tuple[Any, ...]:
    """Mean squares of what the teacher's mixers give and of what its blocks add, as sums over tokens."""
    compared, counted = pair.compare(batch), pair.counted(batch)
    mixed = tuple(per_token(each.teacher.mixed, counted) for each in compared)
    update = tuple(per_token(each.teacher.out - each.x, counted) for each in compared)
    return mixed, update, jnp.sum(counted)


def make_pair(teacher: Any, student: Any, batches: Any, kind: type[Pair] = Pair) -> Pair:
    """A pair whose distances are relative to what the teacher gives on these batches."""
    pair = kind(teacher, student)
    mixed, update, weight = sum_over(pair, _squares, batches)
    for variable, squares in ((pair.mixed_square, mixed), (pair.update_square, update)):
        variable[...] = jnp.maximum(jnp.asarray(squares) / weight, 1e-20)
    return pair
