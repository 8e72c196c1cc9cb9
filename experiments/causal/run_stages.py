"""A student's stages one after another, of language models and of models that read pictures alike; and what is kept."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

import zoo
from experiments.causal.stages import STAGES
from experiments.causal.student import Stage
from experiments.loop.json_files import write_json
from experiments.loop.metrics import last_evaluation
from experiments.loop.train import Task, train
from zoo.models.frozen import thaw

RESULTS_FILE = "results.json"


def check_stages(config: Any) -> None:
    """Raises a ValueError where a distillation's configuration has no stage, or warms up for all of one."""
    if not 0 <= config.warmup_fraction < 1:
        raise ValueError(f"--warmup-fraction {config.warmup_fraction}, expected 0 <= warmup-fraction < 1")
    if not any(getattr(config, name).steps for name in STAGES):
        raise ValueError(f"no stage has steps, expected some in --{'.steps, --'.join(STAGES)}.steps")


def random_pair(pair: Any, config: Any) -> Any:
    """The pair with a student of which nothing was copied, in the graph of the other: it need not be compiled again."""
    layers = zoo.converted_layers(pair.teacher.backbone, pair.student.backbone)
    rngs = nnx.Rngs(config.train.seed)
    random = zoo.seed_from_attention(pair.teacher, layers, config=config.mixer.options, init="random", rngs=rngs)
    graphdef, state = nnx.split(pair)
    state["student"] = nnx.state(random)
    return nnx.merge(graphdef, state)


def run_stages(
    config: Any, pair: Any, rows: dict[str, dict[str, float]], folder: Path, task: Callable[[str, Any], Task]
) -> tuple[Any, bool]:
    """Trains each stage that has steps, in a folder of its own, from where a run that was stopped had come to.

    Args:
      config: with the fields of a distillation: a `Stage` for each of STAGES, warmup_fraction, train, optim and so on.
      pair: a teacher and its student.
      rows: what was measured so far, "seeded" among it; each stage adds a row, and results.json has them all.
      folder: of the run.
      task: task(name, pair), of a stage from a pair on.

    Returns:
      (the pair, whether a signal has ended it).
    """
    for name, kind in STAGES.items():
        stage: Stage = getattr(config, name)
        if not stage.steps:
            continue
        print(f"stage {name}: {kind.loss.replace('_', ' ')}, {stage.steps} steps", flush=True)
        loop = dataclasses.replace(config.train, steps=stage.steps)
        warmup = round(config.warmup_fraction * stage.steps)
        optim = dataclasses.replace(config.optim, learning_rate=stage.learning_rate, warmup_steps=warmup)
        finished = train(task(name, pair), loop, optim, folder / name, record=dataclasses.asdict(config))
        pair = thaw(finished.model)
        if finished.stopped:
            return pair, True
        held_out = last_evaluation(folder / name)
        assert held_out is not None  # `train` evaluates at its last step
        rows[name] = {metric: held_out[metric] for metric in rows["seeded"]}
        save_results(config, rows, folder)
    return pair, False


def save_results(config: Any, rows: Mapping[str, Mapping[str, float]], folder: Path) -> None:
    """Writes results.json."""
    write_json({"pattern": config.pattern, "init": config.init, "rows": rows}, folder / RESULTS_FILE)
