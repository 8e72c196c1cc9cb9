"""A smaller model out of a large one: neighbouring channels, heads and layers become one.

    python -m experiments.reuse coalesce LARGE small --d-model 64 --n-layers 2

It is the start of a V-cycle, see `python -m experiments.reuse grow --help`, and undoes `grow`.

Source: Zou et al. 2024, arXiv:2404.07999.
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
    """Writes a smaller model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    d_model: int | None = None
    """Width between the blocks, a divisor of the model's. None: the model's."""
    n_layers: int | None = None
    """Blocks, a divisor of the model's. None: the model's."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""


def main() -> int:
    """Loads, coalesces, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse coalesce", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded = load_model(config.source, checkpoint=config.checkpoint)
        model = zoo.coalesce(loaded.model, d_model=config.d_model, n_layers=config.n_layers)
        write_model(model, config.target, loaded, config.source)
    said = model.config
    print(f"{config.source} -> {config.target}: d_model={said.d_model}, n_layers={said.n_layers}, {said.pattern!r}")
    return 0


if __name__ == "__main__":
    flags.run(main)
