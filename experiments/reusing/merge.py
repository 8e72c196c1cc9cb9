"""Several tunes of one model in one.

    python -m experiments.reuse merge BASE out --tuned MATHS CODE --method dare --rate 0.9 --weights 0.5 0.5

All have the base's architecture. What lies beside the first tune, tokenizer and labels, goes with the result. DARE
holds where tuning moved the weights little, by some 0.005 at most; the largest change is printed.

Source: Yu et al. 2023, arXiv:2311.03099; see `zoo.merge` for the methods.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.loop import flags
from experiments.model_folders import load_model
from experiments.reusing.written import require_empty, write_model
from zoo.reuse.merge import Method


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a merged model."""

    base: Annotated[str, flags.Positional]
    """What all were tuned from: the folder of a run, in our own or a published layout, or a name on the hub."""
    target: Annotated[Path, flags.Positional]
    """Folder to write."""
    tuned: tuple[str, ...]
    """The tunes, one or more."""
    method: Method = "dare"
    """dare: changes dropped at random, the others made larger. drop: not made larger, for comparison. ties: the largest
    changes, where their signs agree. task_arithmetic: the changes added up. average: of the tunes alone."""
    rate: float = 0.9
    """Share of each parameter's changes that dare, drop and ties leave out, from 0 to below 1."""
    weights: tuple[float, ...] = ()
    """Of each tune, or one of all. None given: 1 / tunes; 1 for ties and average."""
    exclude: str | None = None
    """Parameters that stay the base's, a regular expression on the end of their names, "classifier.*" say."""
    seed: int = 0
    """Of what is dropped."""


def main() -> int:
    """Loads, merges, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse merge", description=__doc__)
    with flags.usage_errors():
        require_empty(config.target)
        base, *tuned = (load_model(source) for source in (config.base, *config.tuned))
        weights = config.weights[0] if len(config.weights) == 1 else config.weights or None
        models = [loaded.model for loaded in tuned]
        model = zoo.merge(
            base.model,
            models,
            method=config.method,
            rate=config.rate,
            weights=weights,
            exclude=config.exclude,
            key=jax.random.key(config.seed),
        )
        write_model(model, config.target, tuned[0], config.tuned[0])
    for source, other in zip(config.tuned, models, strict=True):
        moved = jax.tree.map(
            lambda a, b: jnp.max(jnp.abs(a - b)), *(nnx.state(m, nnx.Param) for m in (base.model, other))
        )
        print(f"{source}: parameters moved by {max(map(float, jax.tree.leaves(moved))):.3g} at most")
    print(f"{len(models)} tunes of {config.base} -> {config.target}")
    return 0


if __name__ == "__main__":
    flags.run(main)
