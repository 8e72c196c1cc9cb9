"""A language model that learns module by module in place of its teacher's, before all of it learns together.

    python -m experiments.causal_lm tiny --model.pattern mamba/mlp --teacher LARGE --modules.steps 100

The model is cut into as many runs of blocks as its teacher, each of which reads what enters the teacher's and stands
in its place, see `zoo.compare_modules`; embedding, final norm and head are the teacher's. All modules learn at once, of
other batches than what comes after, by themselves: none depends on another's parameters. Then they are put together,
and the run begins with that model.

What differs from the source: there the modules stand in a small model of one layer for each, trained for that, in which
the teacher's own were trained before; here, among the teacher's. So widths are equal, and no maps between them are
learned.

Source: Lo et al. 2024, arXiv:2402.16918 (m2mKD), section 3.2; the loss of "logits" is its soft distillation, at
temperature 1 and without the labels' share.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.causal.pair import kl_of, per_token
from experiments.loop.adapting import AdaptConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.train import BatchIterator, Finished, Loss, Task, TrainConfig, train, with_auxiliary
from zoo.models.frozen import freeze, thaw
from zoo.stack.parts import cut_in_parts

FOLDER = "modules"


@dataclasses.dataclass(frozen=True)
class ModulesConfig:
    """How the model's modules learn by themselves, before the run's own steps."""

    steps: int = 0
    """Steps of all modules at once, each by itself in place of the teacher's. 0: none."""
    count: int | None = None
    """Modules, runs of about equally many blocks. None: as many as the smaller of the two models has blocks."""
    match: Literal["hidden", "logits"] = "hidden"
    """What a module is to give. hidden: what comes behind the teacher's. logits: what makes the teacher's later blocks
    guess as they do; a pass through these for each module."""
    learning_rate: float | None = None
    """Peak learning rate of these steps. None: that of --optim."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"--modules.steps {self.steps}, expected at least 0")
        if self.count is not None and self.count < 1:
            raise ValueError(f"--modules.count {self.count}, expected at least 1")


def check_modules(modules: ModulesConfig, teacher: str | None, adapt: AdaptConfig) -> None:
    """Raises a ValueError where modules have no place to learn in, or are not trained."""
    if modules.steps and teacher is None:
        raise ValueError(f"--modules.steps {modules.steps} without --teacher: there is nothing to stand in for")
    if modules.steps and adapt.rank:
        raise ValueError(f"--modules.steps {modules.steps} with --adapt.rank {adapt.rank}: blocks stay as they are")


class Taught(nnx.Module):
    """A teacher and a student, cut alike."""

    def __init__(self, teacher: zoo.CausalLM, student: zoo.CausalLM, count: int | None):
        self.teacher, self.student, self.count = teacher, student, count


def compared(taught: Taught, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> list[zoo.ComparedModule]:
    """The modules on a batch."""
    x, given = taught.teacher.embed(batch["tokens"]), {"segment_ids": batch["segment_ids"]}
    teacher, student = taught.teacher.backbone, taught.student.backbone
    return zoo.compare_modules(teacher, student, x, n_modules=taught.count, rngs=rngs, **given)


def hidden_error(modules: list[zoo.ComparedModule], weights: jax.Array) -> jax.Array:
    """Squared error of the modules over the mean square of what the teacher's add: 1 is what nothing would have.

    A mean over modules and channels, and a sum over tokens.
    """
    errors, squares = (
        jnp.stack([per_token(each, weights) for each in differences])
        for differences in ([m.student - m.teacher for m in modules], [m.teacher - m.x for m in modules])
    )
    return jnp.mean(errors / jnp.maximum(squares, 1e-20)) * jnp.sum(weights)


def logits_divergence(taught: Taught, modules: list[zoo.ComparedModule], batch: Mapping[str, Any]) -> jax.Array:
    """KL divergence of the next token, from the teacher, of the teacher with one module in it: a mean over modules."""
    teacher = taught.teacher
    later = cut_in_parts(teacher.backbone, len(modules))

    def guess(x: jax.Array, first: int) -> jax.Array:
        for part in later[first:]:
            x = part(x, segment_ids=batch["segment_ids"])
        x = x if teacher.backbone.norm_f is None else teacher.backbone.norm_f(x)
        return teacher.head(x)[..., : teacher.config.vocab_size]

    theirs = guess(modules[-1].teacher, len(modules))
    ours = [guess(module.student, i + 1) for i, module in enumerate(modules)]
    return jnp.mean(jnp.stack([kl_of(theirs, each, batch["weights"]) for each in ours]))


class ModuleWise:
    """What a run does before its first step, in a folder of its own.

    Args:
      config: how.
      teacher, student: language models of the same tokens.

    Raises:
      ValueError: the student cannot stand in the teacher's places.
    """

    def __init__(self, config: ModulesConfig, teacher: zoo.CausalLM, student: zoo.CausalLM):
        self.config = config
        self.taught = Taught(teacher, zoo.between_ends_of(teacher, student), config.count)
        ids = jnp.zeros((1, 1), jnp.int32)
        batch = {"tokens": ids, "segment_ids": ids, "weights": jnp.ones((1, 1))}
        jax.eval_shape(lambda: self.loss(self.taught, batch, None))

    def loss(self, taught: Taught, batch: Mapping[str, Any], rngs: nnx.Rngs | None) -> Loss:
        """The modules' distances from the teacher's, and what their mixers add."""
        modules = compared(taught, batch, rngs)
        hidden = self.config.match == "hidden"
        total = hidden_error(modules, batch["weights"]) if hidden else logits_divergence(taught, modules, batch)
        loss = Loss(total, jnp.sum(batch["weights"]))
        return with_auxiliary(loss, taught.student, jnp.sum(jnp.stack([each.loss for each in modules])))

    def learn(
        self,
        task: Task,
        batches: BatchIterator,
        loop: TrainConfig,
        optim: OptimConfig,
        folder: Path,
        record: dict[str, Any],
    ) -> Finished:
        """Trains, from where a run that was stopped there had come to.

        Args:
          task: the run's, by which the modules are evaluated as one model.
          batches: what they read.
          loop, optim, record: the run's.
          folder: the run's.

        Returns:
          How it ended; its model is the modules put together.
        """
        config = self.config
        rate = optim.learning_rate if config.learning_rate is None else config.learning_rate
        print(f"modules by themselves: {config.match}, {config.steps} steps", flush=True)
        finished = train(
            Task(
                init=lambda rngs: freeze(self.taught, lambda name: name.startswith("student.backbone.layers.")),
                loss=self.loss,
                batches=batches,
                evaluate=lambda taught: task.evaluate(task.read(cast(Taught, taught).student)),
                tokens_per_batch=task.tokens_per_batch,
            ),
            dataclasses.replace(loop, steps=config.steps),
            dataclasses.replace(optim, learning_rate=rate),
            folder / FOLDER,
            record=record,
        )
        return finished._replace(model=thaw(finished.model).student)
