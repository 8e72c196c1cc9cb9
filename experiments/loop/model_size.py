"""How large a model is, from its configuration alone."""

from pathlib import Path

import jax
from flax import nnx

from zoo.models.build import ModelConfig, abstract


def count_params(config: ModelConfig) -> int:
    """Number of parameters of a model, without building it."""
    model = abstract(config)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def describe_size(config: ModelConfig, folder: Path) -> str:
    """The line that a run begins with: what is trained, how large it is, and where."""
    return f"{config.pattern}: {count_params(config):,} parameters; {folder}"
