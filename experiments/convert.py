"""A model from one layout to another, or out of the folder of a run.

    python -m experiments.convert runs/causal_lm/tiny out                          # ours, which holds every model
    python -m experiments.convert runs/causal_lm/tiny out --layout official        # what state-spaces/mamba loads
    python -m experiments.convert state-spaces/mamba-130m out --layout transformers
    python -m experiments.convert out back --layout official --dtype bfloat16
    python -m experiments.convert runs/causal_lm/tuned out --adapter                # the adapter alone, as peft has it

`zoo.from_pretrained`, and every command here that takes a model, read what is written; it is read back and compared
before the command says so. A run of --adapt.rank becomes one model, or with --adapter a few MB for the model that it
was begun with. In our own layout it says, too, which published layouts would hold the model, and what the
others lack. Beside the weights go the tokenizer, in files from which AutoTokenizer gives the same ids, what a causal
model begins and ends texts with, its chat template where it has one, and a model card, README.md.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, on_mesh
from experiments.model_folders import Said, load_model, write_companions
from zoo.published.adapted_run import base_of, is_adapted
from zoo.published.layout_options import Layout
from zoo.published.native_layout import STORED
from zoo.published.pretrained import what_lacks


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts weights, config and tokenizer."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    layout: Layout = "native"
    """native: ours, for every model. official: what state-spaces/mamba, HazyResearch/m2 or hustvl/Vim loads.
    transformers: what transformers loads; Mamba-3, Vision Mamba and M2-BERT are not among it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to store weights in. None: that of the source."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    adapter: bool = False
    """Of a run that trained adapters, write these alone, with what else it trained, in peft's files."""
    max_shard_gb: float = 5.0
    """Largest file, in 10^9 bytes; more become numbered shards."""
    allow_nonfinite: bool = False
    """Take weights that are infinite or no numbers as they are, rather than refuse them."""


def main() -> int:
    """Loads, writes, reads back and compares."""
    config = flags.parse_one(Config, prog="python -m experiments.convert", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        if config.target.exists() and any(config.target.iterdir()):
            raise ValueError(f"{config.target} is not empty; choose another folder")
        if config.adapter:
            print(write_adapter(config))
            return 0
        said: Said = {"layout": config.layout, "checkpoint": config.checkpoint}
        model, folder, extra = load_model(
            config.source, dtype=config.dtype, allow_nonfinite=config.allow_nonfinite, **said
        )
        limit = int(config.max_shard_gb * 1e9)
        zoo.save_pretrained(model, config.target, config.layout, extra=extra, max_shard_bytes=limit)
        write_companions(folder, config.target, model, source=config.source, **said)
        written = _stored(zoo.from_pretrained(config.target, allow_nonfinite=config.allow_nonfinite))
        for path, expected in _stored(model).items():
            if np.asarray(written[path]).tobytes() != np.asarray(expected).tobytes():
                raise ValueError(f"{config.target}: {path} does not read back as it was written")
    size = sum(param.size for param in jax.tree.leaves(nnx.state(zoo.dequantize(model), nnx.Param)))
    print(f"{config.source} -> {config.target}: {size:,} parameters in the {config.layout} layout, read back and equal")
    if config.layout == "native":
        for layout in get_args(Layout)[1:]:
            reason = what_lacks(model, layout)
            print(f"--layout {layout}: " + (f"not this model, {reason}" if reason else "would hold it, too"))
    return 0


def write_adapter(config: Config) -> str:
    """Writes what a run trained beside the model that it was begun with, and reads it back; says what it did."""
    folder = Path(config.source)
    if not is_adapted(folder):
        raise ValueError(f"--adapter with {folder}, expected the folder of a run of --adapt.rank")
    base: Any = zoo.from_pretrained(base_of(folder))
    trained = zoo.load_adapter(base, folder, revision=config.checkpoint)
    zoo.save_adapter(trained, config.target)
    expected, written = _stored(trained), _stored(zoo.load_adapter(base, config.target))
    for path, value in expected.items():
        if path not in written or not np.array_equal(np.asarray(written[path]), np.asarray(value)):
            raise ValueError(f"{config.target}: {path} does not read back as it was written")
    size = sum(path.stat().st_size for path in config.target.iterdir())
    return f"{folder} -> {config.target}: an adapter of {size / 1e6:,.2f} MB, read back and equal"


def _stored(model) -> dict[str, jax.Array]:
    """What files hold of a model: parameters, and codes of few bits and their scales."""
    flat = nnx.to_flat_state(nnx.state(model, STORED))
    return {".".join(map(str, path)): param[...] for path, param in flat}


if __name__ == "__main__":
    flags.run(main)
