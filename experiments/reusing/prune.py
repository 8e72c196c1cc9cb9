"""A smaller model out of a trained one: what is needed least goes, and what is left makes up for it.

    python -m experiments.reuse prune runs/causal_lm/tiny small --n-layers 3 --n-heads 192 --data.path my.txt
    python -m experiments.causal_lm tiny --init small --teacher runs/causal_lm/tiny --data.path my.txt --steps 200

What is needed is read off some of the text, which is the training text at best; the second command teaches the small
model what the large one says. n-heads are Mamba-2's, -3's and attention's heads, and Mamba-1's inner channels.

Source: Muralidharan et al. 2024, arXiv:2407.14679; see `zoo.prune`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import zoo
from experiments.data.corpus import DataConfig
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.calibrating import Calibration, batches_of, said, text_for
from experiments.reusing.written import require_empty, write_model


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a smaller model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    d_model: int | None = None
    """Width between the blocks. None: the model's."""
    d_ff: int | None = None
    """Hidden width of channel mixers. None: the model's."""
    n_heads: int | None = None
    """Heads of the mixers, of Mamba-1 inner channels. None: the model's."""
    n_layers: int | None = None
    """Blocks. None: the model's."""
    compensate: bool = True
    """Whether what is left makes up for what goes."""
    data: DataConfig = DataConfig()
    """Text; its tokenizer is the model's."""
    calibration: Calibration = Calibration()
    """How much of it is read."""


def main() -> int:
    """Loads, looks, prunes, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse prune", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded, text = load_model(config.source), text_for(config.source, config.data)
        model = zoo.prune(
            loaded.model,
            batches_of(text.train, config.data.seq_len, config.calibration),
            d_model=config.d_model,
            d_ff=config.d_ff,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            compensate=config.compensate,
        )
        write_model(model, config.target, loaded, config.source)
    print(f"{config.source} -> {config.target}: {said(loaded.model, model, text, config)}")
    return 0


if __name__ == "__main__":
    flags.run(main)
