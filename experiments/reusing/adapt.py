"""A model with its adapter folded in: an ordinary one, which any layout that has the model holds.

    python -m experiments.reuse adapt MODEL out --adapter ADAPTER
    python -m experiments.convert out published --layout transformers

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; see `zoo.load_adapter` for the files that are read.
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
    """Writes an adapted model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    adapter: Path
    """Folder of the adapter, as `zoo.save_adapter` or peft writes it."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""


def main() -> int:
    """Loads, adapts, merges, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse adapt", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded = load_model(config.source, checkpoint=config.checkpoint)
        model = zoo.merge_lora(zoo.load_adapter(loaded.model, config.adapter))
        write_model(model, config.target, loaded, config.source)
    print(f"{config.source} with {config.adapter} -> {config.target}")
    return 0


if __name__ == "__main__":
    flags.run(main)
