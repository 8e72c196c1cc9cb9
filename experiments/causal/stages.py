"""The stages in which a student learns from its teacher: what each trains, by which distance; and its evaluation."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.causal.next_token import describe, next_token_loss
from experiments.causal.pair import DISTANCES, Pair, measure
from experiments.data.corpus import evaluation_batches, make_batches
from experiments.data.streams import TokenStream
from experiments.loop.train import Loss, Task, mean_loss, mean_of, sum_over
from zoo.models.frozen import freeze, thaw


class StageKind(NamedTuple):
    """What one stage trains, and by what."""

    loss: str
    """Which of `measure`'s distances."""
    parts: frozenset[str] | None
    """Parts of a converted layer's mixer that are trained. None: all."""


_NEW = frozenset({"A_log", "dt_bias", "dt_proj", "conv1d", "gate_proj", "norm"})
STAGES = {
    "layers": StageKind("layer_error", _NEW),
    "qkv": StageKind("layer_error", _NEW | {"q_proj", "k_proj", "v_proj"}),
    "hidden": StageKind("hidden_error", None),
    "logits": StageKind("kl", None),
}


def stage_model(pair: Pair, kind: StageKind) -> Pair:
    """The pair in which a stage's parameters alone are trained."""
    layers = zoo.converted_layers(pair.teacher.backbone, pair.student.backbone)

    def trained(name: str) -> bool:
        inside = name.removeprefix(pair.blocks).split(".")
        if not name.startswith(pair.blocks) or len(inside) < 3 or inside[1] != "mixer" or int(inside[0]) not in layers:
            return False
        return kind.parts is None or inside[2] in kind.parts

    return freeze(pair, trained)


class Evaluation:
    """What a model gives on held-out text."""

    def __init__(self, stream: TokenStream, *, batch_size: int, seq_len: int, max_batches: int | None):
        self.bits_per_nat = stream.n_tokens / stream.n_bytes / math.log(2)
        self.batches = evaluation_batches(stream, batch_size=batch_size, seq_len=seq_len, max_batches=max_batches)

    def of_teacher(self, teacher: zoo.CausalLM) -> dict[str, float]:
        """Perplexity, and bits per byte of text."""
        nats = mean_loss(teacher, next_token_loss, self.batches)
        return describe(nats, self.bits_per_nat)

    def __call__(self, pair: Pair) -> dict[str, float]:
        """These of a student, and its distances from its teacher."""
        sums = sum_over(thaw(pair), measure, self.batches)
        means = {name: mean_of(total, sums["weight"]) for name, total in sums.items() if name != "weight"}
        return describe(means.pop("nats"), self.bits_per_nat) | means


def make_task(
    name: str, pair: Pair, stream: TokenStream, evaluate: Evaluation, *, batch_size: int, seq_len: int, seed: int
) -> Task:
    """The task of one stage, from a pair on; `seed` is that of all stages."""
    kind = STAGES[name]
    distance = DISTANCES[kind.loss]

    def loss(pair: Pair, batch: Mapping[str, Any], rngs: Any) -> Loss:
        return Loss(distance(pair, batch), jnp.sum(batch["weights"]))

    def held_out(pair: nnx.Module) -> dict[str, float]:
        found = evaluate(cast(Pair, pair))
        return {"loss": found[kind.loss]} | found

    seed += list(STAGES).index(name)
    return Task(
        init=lambda rngs: stage_model(pair, kind),
        loss=loss,
        batches=make_batches(stream, batch_size=batch_size, seq_len=seq_len, seed=seed),
        evaluate=held_out,
        tokens_per_batch=batch_size * seq_len,
    )
