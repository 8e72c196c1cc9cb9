"""A larger model out of a trained one, whose output it starts with.

    python -m experiments.reuse grow runs/causal_lm/tiny large --d-model 256 --n-layers 8
    python -m experiments.causal_lm tiny --init large                                        # and train on

The V-cycle trains a large model for a little, a smaller one made of it for longer, and the large one again:

    python -m experiments.reuse coalesce LARGE small --d-model 64 --n-layers 2
    python -m experiments.causal_lm ... --init small --run-dir trained
    python -m experiments.reuse grow trained again --d-model 128 --n-layers 4 --depth copy --into LARGE --alpha 0.5

Source: Chen et al. 2021, arXiv:2110.07143 (bert2BERT); Zou et al. 2024, arXiv:2404.07999 (V-cycle).
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from flax import nnx

import zoo
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.written import require_empty, write_model
from zoo.reuse.grow import Depth, Method


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a larger model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    d_model: int | None = None
    """Width between the blocks; a multiple of the model's keeps its output. None: the model's."""
    n_layers: int | None = None
    """Blocks; the pattern goes on. None: the model's."""
    d_ff: int | None = None
    """Hidden width of channel mixers. None: it grows as d_model does."""
    method: Method = "fpi"
    """fpi: copies, the same output. aki: copies write what the layer above does, not exact, but it learns faster."""
    depth: Depth = "zero"
    """zero: new blocks add nothing at first. copy: each block several times in a row, which changes the output."""
    into: str | None = None
    """A model of the size that is asked for, which the result is mixed into: the end of a V-cycle."""
    alpha: float = 0.5
    """Share of the grown model in that mixture, 0 to 1."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    seed: int = 0
    """Of the channels that are there once more where the width is no multiple."""

    def __post_init__(self):
        if self.into is None and self.alpha != 0.5:
            raise ValueError(f"--alpha {self.alpha:g} without --into: there is nothing to mix the result into")


def main() -> int:
    """Loads, grows, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse grow", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded = load_model(config.source, checkpoint=config.checkpoint)
        model = zoo.grow(
            loaded.model,
            d_model=config.d_model,
            n_layers=config.n_layers,
            d_ff=config.d_ff,
            method=config.method,
            depth=config.depth,
            rngs=nnx.Rngs(config.seed),
        )
        if config.into is not None:
            model = zoo.interpolate(load_model(config.into).model, model, config.alpha)
        write_model(model, config.target, loaded, config.source)
    said = model.config
    print(f"{config.source} -> {config.target}: d_model={said.d_model}, n_layers={said.n_layers}, {said.pattern!r}")
    return 0


if __name__ == "__main__":
    flags.run(main)
