"""What starting from a trained model is worth, at equal steps, over several seeds: bits per byte of held-out text.

    python -m experiments.bench reused                      # three seeds, small models of bytes; CPU
    python -m experiments.bench reused --seeds 0 --steps 20 # a look

Of each seed a small model is trained on Python's standard library. Then, each against its alternative:

    grow     a model of twice the width and depth: fresh, or grown from the small one, for as many steps
    cycle    the large model begun (a quarter of the steps), a small one made of it (twice the steps), and the large one
             again (the steps), half of it grown from the small one (V-cycle): beside it one of as many large steps
             straight through, and one of as many operations
    prune    half of the hidden channels go, with and without making up for them: at once, and after being taught
    adapt    the small model tuned on English (pydoc's topics): all of it, or adapters alone
    merge    that tune and one on tables (encodings) in one model: the mean over both texts, against the share of
             changes that is dropped, which DARE makes up for and dropping alone does not

and those of `experiments.bench.smaller`, each at once and after being taught or trained on: gates, sizes, factorize,
vocabulary. What is printed is the mean and the standard deviation over seeds.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from flax import nnx

import zoo
from experiments.bench.over_seeds import print_over_seeds
from experiments.bench.seed_runs import SHAPE, SeedRuns
from experiments.bench.smaller import PARTS
from experiments.loop import flags
from experiments.loop.adapting import AdaptConfig

Part = Literal["grow", "cycle", "prune", "teach", "gates", "sizes", "factorize", "vocabulary", "adapt", "merge"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters, the order of the data, and what is dropped."""
    base_steps: int = 400
    """Steps of the small model."""
    steps: int = 100
    """Steps of each alternative."""
    parts: tuple[Part, ...] = get_args(Part)
    """What is compared. teach: pruned models, after as many steps with the whole one as teacher."""
    rates: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Shares of the changes that merging drops."""


_LARGE = dataclasses.replace(SHAPE, d_model=128, n_layers=4, mlp=zoo.MLPConfig(d_ff=256))


class Bench(SeedRuns):
    """The comparisons of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        super().__init__(seed, folder, config.base_steps, config.steps)
        self.config = config

    def measure(self) -> dict[str, float]:
        """Every alternative that is asked for, by name."""
        found: dict[str, float] = {}
        for part in self.config.parts:
            if part in PARTS:
                found |= PARTS[part](self)
            else:
                found |= {"small model": self.bits(self.base, "library")} | getattr(self, f"_{part}")()
        return found

    def _grow(self) -> dict[str, float]:
        fresh = self.train("fresh", "library", self.steps, model=_LARGE)
        found = {"grow: fresh": self.bits(fresh, "library")}
        methods: tuple[Any, ...] = ("fpi", "aki")
        for method in methods:
            large = zoo.grow(self.base, d_model=128, n_layers=4, method=method, rngs=nnx.Rngs(self.seed))
            place = self.save(f"large-{method}", large)
            grown = self.train(f"grown-{method}", "library", self.steps, init=place)
            found[f"grow: {method}"] = self.bits(grown, "library")
        return found

    def _cycle(self) -> dict[str, float]:
        first, rest = self.steps // 4, self.steps
        begun = self.train("begun", "library", first, model=_LARGE)
        small = zoo.coalesce(begun, d_model=64, n_layers=2)
        small = self.train("within", "library", 2 * rest, init=self.save("coalesced", small))
        grown = zoo.grow(small, d_model=128, n_layers=4, depth="copy", rngs=nnx.Rngs(self.seed))
        mixed = zoo.interpolate(begun, grown, alpha=0.5)
        cycle = self.train("cycle", "library", rest, init=self.save("mixed", mixed))
        found = {"cycle: V-cycle": self.bits(cycle, "library")}
        # A step of the small model has about an eighth of the operations.
        for name, steps in {"as many steps": first + rest, "as many operations": first + rest + rest // 4}.items():
            straight = self.train(f"straight {steps}", "library", steps, model=_LARGE)
            found[f"cycle: straight, {name}"] = self.bits(straight, "library")
        return found

    def _pruned(self) -> dict[str, Any]:
        looked, names = self.looked(), {"refitted": True, "cut alone": False}
        return {
            name: zoo.prune(self.base, looked, d_ff=64, compensate=compensate) for name, compensate in names.items()
        }

    def _prune(self) -> dict[str, float]:
        return {f"prune: {name}": self.bits(small, "library") for name, small in self._pruned().items()}

    def _teach(self) -> dict[str, float]:
        found = {}
        for name, small in self._pruned().items():
            place = self.save(f"small {name}", small)
            options: dict[str, Any] = {"rate": 1e-3, "init": place, "teacher": self.start}
            taught = self.train(f"taught {name}", "library", self.steps, **options)
            found[f"prune: {name}, taught"] = self.bits(taught, "library")
        return found

    def _adapt(self) -> dict[str, float]:
        options: dict[str, Any] = {"rate": 1e-2, "adapt": AdaptConfig(rank=4)}
        adapted = self.train("adapters", "english", self.steps, init=self.start, **options)
        return {
            "adapt: before": self.bits(self.base, "english"),
            "adapt: all": self.bits(self.tuned("english"), "english"),
            "adapt: rank 4": self.bits(adapted, "english"),
        }

    def _merge(self) -> dict[str, float]:
        texts = ("english", "tables")
        tuned = [self.tuned(text) for text in texts]
        found = {"merge: before": statistics.mean(self.bits(self.base, text) for text in texts)}
        for i, text in enumerate(texts):
            found[f"merge: {text} alone"] = statistics.mean(self.bits(tuned[i], other) for other in texts)
        for rate in self.config.rates:
            methods: tuple[Any, ...] = ("dare", "drop") if rate else ("task_arithmetic",)
            for method in methods:
                options: Any = {"rate": rate, "weights": 0.5, "key": jax.random.key(self.seed)}
                merged = zoo.merge(self.base, tuned, method=method, **options)
                found[f"merge: {method} {rate:g}"] = statistics.mean(self.bits(merged, text) for text in texts)
        return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench reused", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
