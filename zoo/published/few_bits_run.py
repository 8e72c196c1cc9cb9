"""The model of a run that trains in few bits: checkpoints hold floats, and the folder says how these are read.

    run/quantized.json     {"bits": 4, "group_size": 64, "targets": null, "embeddings": false}

`zoo.from_pretrained` of such a run gives the quantised model, codes and scales: what the run evaluated. With
masters=True it gives the floats, from which a training goes on.
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from zoo.models import build
from zoo.published.run_folder import read_options
from zoo.reuse.codes import Bits
from zoo.reuse.linear_maps import Model
from zoo.reuse.quantize import options_of, quantize, with_options
from zoo.reuse.straight_through import straight_through

FEW_BITS_FILE = "quantized.json"


@dataclasses.dataclass(frozen=True)
class FewBits:
    """How the weights of a run are read; see `zoo.quantize`."""

    bits: int
    """Of a weight."""
    group_size: int | None = 64
    """Inputs that share a scale. None: all of an output."""
    targets: str | None = None
    """Which maps. None: all of the blocks."""
    embeddings: bool = False
    """Whether tables of embeddings are in 8 bits, too."""

    def __post_init__(self):
        if self.bits not in get_args(Bits):
            raise ValueError(f"bits={self.bits}, expected one of {', '.join(map(str, get_args(Bits)))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}, expected at least 1")

    def of(self, model: Model) -> Model:
        """A model of floats in these bits."""
        return quantize(model, **dataclasses.asdict(self))

    def straight(self, model: Model) -> Model:
        """A model of floats that is read in these bits and trained as floats."""
        return straight_through(model, **dataclasses.asdict(self))


def is_in_few_bits(folder: Path) -> bool:
    """Whether a folder is that of a run that trains in few bits."""
    return (folder / FEW_BITS_FILE).is_file()


def read_few_bits(folder: Path) -> FewBits:
    """How the weights of a run are read.

    Raises:
      ValueError: what says so is damaged.
    """
    return read_options(FewBits, folder / FEW_BITS_FILE, "does not say how weights are read")


def in_dtype(model: Model, dtype: Dtype | None) -> Model:
    """A quantised model in another dtype, of the same codes; None leaves it as it is."""
    if dtype is None:
        return model
    there: Any = model
    config = build.in_dtype(there.config, jnp.dtype(dtype).name)
    like: Any = with_options(build.abstract(config), options_of(model))
    graphdef, shapes = nnx.split(like)
    return nnx.merge(graphdef, jax.tree.map(lambda x, to: x.astype(to.dtype), nnx.state(model), shapes))
