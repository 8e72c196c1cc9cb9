"""Gates on the units of a model, trained by the one loop on a text: how much each is needed. See `zoo.add_gates`."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import zoo
from experiments.causal.next_token import next_token_loss
from experiments.data.corpus import Corpus, evaluation_batches, make_batches
from experiments.loop.optim import OptimConfig
from experiments.loop.train import Batch, Loss, Task, TrainConfig, mean_loss, train

_LOOKED_AT = 8  # held-out batches, for the line at the end


@dataclasses.dataclass(frozen=True)
class GatesConfig:
    """How the gates are trained; the model is not."""

    steps: int = 0
    """Steps of their training. 0: there are none, and units go by what is lost without them."""
    batch_size: int = 8
    """Rows of a step."""
    learning_rate: float = 0.05
    """At its height."""
    penalty: float = 1e-3
    """Factor on the divergence of each gate, in nats, beside the loss of a token."""
    seed: int = 0
    """Of the order of the text and of what is drawn."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"--gates.steps {self.steps}, expected at least 0")
        for name in ("batch_size", "learning_rate", "penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--gates.{name.replace('_', '-')} {getattr(self, name)}, expected more than 0")


def trained_scores(
    model: zoo.CausalLM,
    text: Corpus,
    seq_len: int,
    config: GatesConfig,
    *,
    d_ff: int | None = None,
    n_heads: int | Mapping[str, int] | None = None,
) -> dict[str, np.ndarray] | None:
    """How much the units of widths that shall shrink are needed, as `zoo.prune` takes it; None where a signal stops it.

    Args:
      model: stays as it is.
      text: what it is for.
      seq_len: tokens of a row.
      config: how the gates are trained.
      d_ff, n_heads: which widths.

    Raises:
      ValueError: neither.
    """
    gated = zoo.add_gates(model, d_ff=d_ff, n_heads=n_heads)
    rows: dict[str, Any] = {"batch_size": config.batch_size, "seq_len": seq_len}
    held_out = list(evaluation_batches(text.validation, **rows, max_batches=_LOOKED_AT))

    def loss(model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        if rngs is not None:
            zoo.draw_gates(model, rngs.dropout())
        found = next_token_loss(model, batch, rngs)
        added = config.penalty * zoo.gate_penalty(model)
        return found._replace(auxiliary=added if found.auxiliary is None else found.auxiliary + added)

    task = Task(
        init=lambda rngs: gated,
        loss=loss,
        batches=make_batches(text.train, **rows, seed=config.seed),
        evaluate=lambda model: {"loss": mean_loss(model, next_token_loss, held_out)},
        tokens_per_batch=config.batch_size * seq_len,
    )
    options: dict[str, Any] = {"steps": config.steps, "eval_every": config.steps, "save_every": config.steps}
    options |= {"batch_size": config.batch_size, "seed": config.seed, "tensorboard": False}
    optim = OptimConfig(learning_rate=config.learning_rate, warmup_steps=min(10, config.steps // 4), weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        finished = train(task, TrainConfig(**options), optim, Path(folder))
    return None if finished.stopped else zoo.gate_scores(finished.model)
