"""One task of a model that was trained on several: an ordinary model, for every command that takes one.

    python -m experiments.bert pretrain tiny --model.pattern attn/moe --data.path prose/ --tasks code/
        --model.moe.n-tasks 2 --run-dir both
    python -m experiments.reuse task both out --task 1                  # as it reads code/
    python -m experiments.bert finetune tiny --init out

Source: Liang et al. 2022, arXiv:2210.14793 (M3ViT), section 3.2.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import zoo
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.written import require_empty, write_model


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the model of one task."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, or one in our own layout, of a model with a router for each task."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    task: int
    """Number of the task, from 0: of --data.path, then those of --tasks in their order."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""


def main() -> int:
    """Loads, takes one out, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse task", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded = load_model(config.source, checkpoint=config.checkpoint)
        write_model(zoo.of_task(loaded.model, config.task), config.target, loaded, config.source)
    print(f"{config.source}, task {config.task} -> {config.target}")
    return 0


if __name__ == "__main__":
    flags.run(main)
