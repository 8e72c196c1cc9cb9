"""What an encoder loses where fewer positions go on behind each block, against the operations that saves.

    python -m experiments.bench dropping                      # three seeds, digits of 8 x 8 pixels; CPU, some minutes
    python -m experiments.bench dropping --seeds 0 --epochs 2 # a look

Of each seed and pattern a classifier of three blocks is trained on scikit-learn's digits, 4 pixels a token, as
`experiments.vit tiny` trains one: all positions through all blocks, or half and a quarter of them behind the first two.
Each is then evaluated with other shares and the same weights (`zoo.with_keep`). What is printed is the held-out
accuracy, mean and standard deviation over seeds, and the operations of one image, as compiled, over those of all
positions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import zoo
from experiments import vit
from experiments.bench.over_seeds import print_over_seeds
from experiments.loop import flags
from experiments.vision.prediction import logits_of
from experiments.vision.presets import PRESETS, small_classifier
from experiments.vision.task import prepare, score

Keep = tuple[float, ...] | None
SHARES: tuple[Keep, ...] = (None, (0.75, 0.5), (0.5, 0.25), (0.25, 0.1))
_TRAINED: dict[str, Keep] = {"all": None, "half, a quarter": (0.5, 0.25)}


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, of which mixers, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and the order of the data."""
    patterns: tuple[str, ...] = ("attn/mlp", "m2/monarch")
    """Mixers of the blocks."""
    epochs: int = 40
    """Passes over the images of each training."""


def operations(model: zoo.ImageClassifier, keep: Keep) -> float:
    """Operations of one image, as compiled."""
    size, changed = model.config.image_size, zoo.with_keep(model, keep)
    image = jax.ShapeDtypeStruct((1, size, size, model.config.channels), jnp.float32)
    costs: Any = jax.jit(lambda images: changed(images)).lower(image).compile().cost_analysis()
    return float(costs["flops"])


def measure(config: Config, seed: int, folder: Path) -> dict[str, float]:
    """Accuracies in %, by name, which says the operations too."""
    found: dict[str, float] = {}
    for pattern in config.patterns:
        for name, keep in _TRAINED.items():
            preset = PRESETS["tiny"][1]
            one = dataclasses.replace(
                preset,
                model=small_classifier(48, 3, 8, 2, pattern=pattern, keep=keep),
                epochs=config.epochs,
                eval_epochs=config.epochs,
                train=dataclasses.replace(preset.train, seed=seed, tensorboard=False),
            )
            prepared = prepare(one)
            model: Any = vit.fit(one, folder / f"{pattern.replace('/', '-')} {name}", prepared).model
            images = list(prepared.data.splits.values())[1]
            whole = operations(model, None)
            for share in SHARES:
                changed = zoo.with_keep(model, share)
                accuracy = score(logits_of(changed, images, prepared.preprocess, one), images.labels)["accuracy"]
                said = "all" if share is None else ", ".join(f"{100 * s:g} %" for s in share)
                cost = f"{operations(model, share) / whole:.2f} of the operations"
                found[f"{pattern}, trained with {name}: {said} ({cost})"] = 100 * accuracy
    return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench dropping", description=__doc__)
    print_over_seeds(config.seeds, "accuracy, %", lambda seed, folder: measure(config, seed, folder))
    return 0


if __name__ == "__main__":
    flags.run(main)
