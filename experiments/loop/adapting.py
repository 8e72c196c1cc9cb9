"""Training adapters alone: the model that a run starts from is frozen, and checkpoints hold the adapters.

    python -m experiments.causal_lm tiny --init MODEL --adapt.rank 8 --adapt.targets "in_proj|out_proj"

The model lies in the run's folder once, see `zoo.published.adapted_run`; nothing else of it goes into a checkpoint or
the optimiser's state.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

import zoo
from experiments.loop import distributed
from experiments.loop.disk_space import bytes_of
from experiments.loop.json_files import write_json
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.starting import OPTIONS, with_options
from experiments.loop.train import Task, split_model
from zoo.published.adapted_run import ADAPTER_FILE, BASE, Adapters, base_of, is_adapted, read_adapters
from zoo.reuse.linear_maps import named

# What stands behind the encoder in a classifier of images.
_HEADS = ("classifier.", "distillation_classifier.")


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """Low-rank adapters on a model that stays as it is (LoRA, DoRA). Classifiers are trained as they are."""

    rank: int = 0
    """Rank of each adapter: of a map of i inputs and o outputs, rank (i + o) parameters. 0: all of the model is
    trained."""
    alpha: float | None = None
    """Factor on an adapter's change, times the rank. None: the rank, a factor of 1."""
    targets: str | None = None
    """Which maps, a regular expression on the end of their names, "in_proj|out_proj" say. None: all of the blocks."""
    dora: bool = False
    """Whether the magnitudes of outputs' weights are trained on their own, too."""
    trained: str | None = None
    """Further parameters that are trained as they are, a regular expression on the end of their names, "norm_f.*"
    say."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"--adapt.rank {self.rank}, expected at least 0")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"--adapt.alpha {self.alpha}, expected more than 0")
        if not self.rank:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"--adapt.{field.name} without --adapt.rank: there are no adapters")


def check_start(adapt: AdaptConfig, init: str | None) -> None:
    """Raises a ValueError where there is nothing that could be adapted."""
    if adapt.rank and init is None:
        raise ValueError(f"--adapt.rank {adapt.rank} without --init: there is no trained model to adapt")


class Adapted(NamedTuple):
    """A task that trains adapters, or one without."""

    task: Task
    save: Callable[[], None]
    """Writes what is adapted, where the run's folder has it not yet, and says how much is trained."""


def adapted(task: Task, adapt: AdaptConfig, folder: Path, optim: OptimConfig, *, steps: int, seed: int) -> Adapted:
    """A task that trains adapters of its model, or the task itself where none are asked for. Writes nothing yet.

    A folder that holds the run's base goes on with that, whatever the task's model is.

    Args:
      task: its model is what is adapted.
      adapt: which adapters.
      folder: the run's.
      optim, steps: as for `make_optimizer`, for what is said.
      seed: of the adapters, as of all else.

    Raises:
      ValueError: names that match nothing.
    """
    if not adapt.rank:  # all of it is trained, of few bits too
        return Adapted(task._replace(init=lambda rngs: zoo.dequantize(task.init(rngs))), lambda: None)
    rngs, goes_on = nnx.Rngs(params=jax.random.key(seed)), is_adapted(folder)
    base: Any = task.init(rngs)
    if goes_on:
        every = [f"model.{option}" for option in OPTIONS]
        base = with_options(zoo.from_pretrained(base_of(folder)), base.config, every)
    adapters = read_adapters(folder) if goes_on else _adapters(base, adapt, folder)
    model = adapters.on(base, rngs=rngs)

    def save() -> None:
        if not goes_on:
            _write(base, adapters, folder)
        print(said(model, base, optim, steps), flush=True)

    return Adapted(task._replace(init=lambda rngs: model), save)


def said(model: nnx.Module, base: nnx.Module, optim: OptimConfig, steps: int) -> str:
    """How much of a model is trained, and what the optimiser keeps of it.

    Args:
      model: with adapters.
      base: without.
      optim, steps: of the training.
    """

    def sizes(model: nnx.Module) -> tuple[int, int]:
        params = split_model(model)[1]
        kept = jax.eval_shape(make_optimizer(optim, steps, model).init, params)
        return sum(x.size for x in jax.tree.leaves(params)), bytes_of(kept)

    (trained, kept), (all_, all_kept) = sizes(model), sizes(base)
    return (
        f"adapters: {trained:,} parameters are trained beside {all_:,}, {trained / max(all_, 1):.2%}; "
        f"the optimiser's state takes {kept / 1e6:,.2f} MB, of all it would be {all_kept / 1e6:,.2f} MB"
    )


def _adapters(model: Any, adapt: AdaptConfig, folder: Path) -> Adapters:
    """The adapters that a configuration asks for; what stands behind an encoder is trained as it is."""
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    trained = {name for name in names if _is_of_a_head(model, name)}
    if adapt.trained is not None:
        trained |= set(named("--adapt.trained", adapt.trained, names))
    pattern = "|".join(map(re.escape, sorted(trained)))
    return Adapters(adapt.rank, adapt.alpha, adapt.targets, adapt.dora, pattern, str(folder.absolute()))


def _is_of_a_head(model: Any, name: str) -> bool:
    if isinstance(model, zoo.ImageClassifier):
        return name.startswith(_HEADS)
    return isinstance(model, zoo.SequenceClassifier | zoo.TokenClassifier) and not name.startswith("encoder.")


@distributed.by_first
def _write(base: Any, adapters: Adapters, folder: Path) -> None:
    """The base, then what says that it is one."""
    place = folder / BASE
    partial = place.with_name(f"{BASE}.partial")
    for left_over in (place, partial):
        shutil.rmtree(left_over, ignore_errors=True)
    zoo.save_pretrained(base, partial)
    os.replace(partial, place)
    write_json(dataclasses.asdict(adapters), folder / ADAPTER_FILE)
