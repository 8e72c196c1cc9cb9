"""Maps of a trained model as products of smaller ones, which are chosen by what the maps read.

    python -m experiments.reuse factorize MODEL small --n-blocks 8 --data.path my.txt     # channel mixers: Monarch
    python -m experiments.reuse factorize MODEL small --head-dim 32 --data.path my.txt    # narrower heads
    python -m experiments.causal_lm PRESET --init small --data.path my.txt                # and train on

Source: Lin et al. 2024, arXiv:2408.09632 (MoDeGPT); Dao et al. 2022, arXiv:2204.00595; see `zoo.factorize`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

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
    head_dim: int | None = None
    """Width of attention's heads. None: the model's."""
    n_blocks: int | None = None
    """Blocks of the Monarch matrices that dense channel mixers become. None: they stay."""
    d_ff: int | None = None
    """Hidden width of channel mixers. None: the model's."""
    data: DataConfig = DataConfig()
    """Text; its tokenizer is the model's."""
    calibration: Calibration = Calibration()
    """How much of it is read."""


def main() -> int:
    """Loads, looks, factorises, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse factorize", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        loaded, text = load_model(config.source), text_for(config.source, config.data)
        batches = batches_of(text.train, config.data.seq_len, config.calibration)
        sizes: dict[str, Any] = {"head_dim": config.head_dim, "n_blocks": config.n_blocks, "d_ff": config.d_ff}
        model = zoo.factorize(loaded.model, batches, **sizes)
        write_model(model, config.target, loaded, config.source)
    print(f"{config.source} -> {config.target}: {said(loaded.model, model, text, config)}")
    return 0


if __name__ == "__main__":
    flags.run(main)
