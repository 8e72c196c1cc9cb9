"""Training in few bits: the loop trains floats, and what it evaluates and hands on is the model that they round to.

    python -m experiments.causal_lm tiny --init RUN --quantize.bits 2

Checkpoints and the optimiser are those of an ordinary run; the folder says how the weights are read, see
`zoo.published.few_bits_run`. A run of its own starts from the floats of another with `--init RUN --quantize.bits N`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from experiments.loop.adapting import AdaptConfig
from experiments.loop.json_files import write_json
from experiments.loop.train import Task
from zoo.published.few_bits_run import FEW_BITS_FILE, FewBits
from zoo.reuse.quantize import maps_to_round, quantized_weights


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Weights that are read in few bits, and trained as floats (straight through)."""

    bits: Literal[0, 1, 2, 3, 4, 8] = 0
    """Of a weight, which is rounded wherever the model reads it. 0: none is."""
    group_size: int = 64
    """Inputs that share a scale; 0 is all inputs of an output."""
    targets: str | None = None
    """Which maps, a regular expression on the end of their names, "in_proj|out_proj" say. None: all of the blocks."""
    embeddings: bool = False
    """Whether tables of embeddings are read in 8 bits, too."""

    def __post_init__(self):
        if self.group_size < 0:
            raise ValueError(f"--quantize.group-size {self.group_size}, expected at least 0")
        if not self.bits:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    name = field.name.replace("_", "-")
                    raise ValueError(f"--quantize.{name} without --quantize.bits: all is read as it is")


def check_bits(quantize: QuantizeConfig, adapt: AdaptConfig) -> None:
    """Raises a ValueError where the weights that would be rounded are not trained."""
    if quantize.bits and adapt.rank:
        raise ValueError(
            f"--quantize.bits {quantize.bits} with --adapt.rank {adapt.rank}: adapters leave the weights as they are; "
            "python -m experiments.reuse quantize writes a model in few bits, which --init takes to be adapted"
        )


def say_codes(init: str, model: nnx.Module, adapt: AdaptConfig = AdaptConfig()) -> None:
    """Says what becomes of the codes of a model that a run starts from, which are not trained as they are."""
    if not adapt.rank and quantized_weights(model):
        print(f"--init {init} is in few bits: floats of the same values are trained, all of them", flush=True)


class InFewBits(NamedTuple):
    """A task whose model is read in few bits, or one as it was."""

    task: Task
    save: Callable[[], None]
    """Writes how weights are read, and says how many are."""


def in_few_bits(task: Task, config: QuantizeConfig, folder: Path, *, seed: int, fresh: bool) -> InFewBits:
    """A task that trains floats for a model in few bits, or the task itself. Writes nothing yet.

    Args:
      task: its model is what is rounded.
      config: how.
      folder: the run's.
      seed: of the model, where it is a fresh one.
      fresh: whether the task makes its model anew; one that it loads is loaded here, too.

    Raises:
      ValueError: names that match nothing, or weights that are no floats.
    """
    if not config.bits:
        return InFewBits(task, lambda: None)
    few = FewBits(config.bits, config.group_size or None, config.targets, config.embeddings)

    def init() -> nnx.Module:
        return task.init(nnx.Rngs(params=jax.random.key(seed)))

    model = nnx.eval_shape(init) if fresh else init()
    rounded = sum(linear.weight.size for linear in maps_to_round(model, **dataclasses.asdict(few)).values())
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    loss, carried = task.loss, task.carried_loss

    def save() -> None:
        write_json(dataclasses.asdict(few), folder / FEW_BITS_FILE)
        print(f"in {config.bits} bits: {rounded:,} of {whole:,} parameters are read rounded", flush=True)

    def few_carried(model: Any, *rest: Any) -> Any:
        assert carried is not None
        return carried(few.straight(model), *rest)

    return InFewBits(
        task._replace(
            loss=lambda model, batch, rngs: loss(few.straight(model), batch, rngs),
            carried_loss=None if carried is None else few_carried,
            read=few.of,
        ),
        save,
    )
