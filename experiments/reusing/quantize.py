"""The weights of a model's linear maps in 1 to 8 bits.

    python -m experiments.reuse quantize runs/causal_lm/tiny small --bits 4
    python -m experiments.reuse quantize runs/causal_lm/tiny small --bits 4 --method hessian --data.path my.txt
    python -m experiments.reuse quantize runs/causal_lm/tiny small --mixed-mb 0.2 --data.path my.txt

Each group of inputs of an output has a scale, a number of 4 bytes; 64 inputs in 4 bits are 4.5 bits a weight. They stay
in this form in memory, too, and are multiplied out where they are used: what is saved is memory, not time. Decays,
steps, convolutions, norms and biases stay as they are; so do embeddings unless --embeddings is given.

With --method hessian later inputs make up for what earlier ones lose, on what the maps read of a text; with --mixed-mb
each map, and each expert of a mixture, has 2, 4 or 8 bits, more where rounding costs more of what it gives on that
text. Both are for causal language
models.

Source: Shen et al. 2019, arXiv:1909.05840, section 3; Frantar et al. 2022, arXiv:2210.17323; Yi et al.
2023, arXiv:2308.14352 (EdgeMoE: bits by expert).
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
from flax import nnx

import zoo
from experiments.data.corpus import DataConfig
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.calibrating import Calibration, batches_of, text_for
from experiments.reusing.written import require_empty, write_model
from zoo.reuse.codes import Bits
from zoo.reuse.quantize import Method


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a quantised model."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    bits: Bits = 8
    """Of a weight. 3 take the room of 4."""
    group_size: int = 64
    """Inputs that share a scale; 0 is all inputs of an output."""
    targets: str | None = None
    """Which maps, a regular expression on the end of their names, "in_proj|out_proj" say. None: all of the blocks."""
    embeddings: bool = False
    """Whether tables of embeddings are quantised too, in 8 bits."""
    method: Method = "round"
    """round: each weight to the nearest code. hessian: the later ones make up for what the earlier lost."""
    mixed_mb: float | None = None
    """10^6 bytes of all quantised maps together, in place of --bits. None: all have as many bits."""
    by_expert: bool = True
    """With --mixed-mb, whether each expert of a mixture has bits of its own, or all the same."""
    data: DataConfig = DataConfig()
    """Text that the maps are looked at on; its tokenizer is the model's."""
    calibration: Calibration = Calibration()
    """How much of it is read."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""


def main() -> int:
    """Loads, quantises, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse quantize", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        if config.group_size < 0:
            raise ValueError(f"--group-size {config.group_size}, expected at least 0")
        loaded = load_model(config.source, checkpoint=config.checkpoint)
        moments = None
        if config.method == "hessian" or config.mixed_mb is not None:
            text = text_for(config.source, config.data).train
            moments = zoo.calibrate(loaded.model, batches_of(text, config.data.seq_len, config.calibration))
        model = zoo.quantize(
            loaded.model,
            bits=config.bits,
            group_size=config.group_size or None,
            targets=config.targets,
            embeddings=config.embeddings,
            method=config.method,
            moments=moments,
            mixed=None if config.mixed_mb is None else int(config.mixed_mb * 1e6),
            by_expert=config.by_expert,
        )
        size = write_model(model, config.target, loaded, config.source)
    before = sum(x.nbytes for x in jax.tree.leaves(nnx.state(loaded.model)))
    print(f"{config.source} -> {config.target}: {before / 1e6:,.1f} MB of weights are {size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    flags.run(main)
