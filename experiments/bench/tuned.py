"""Ways to tune a model and to put tunes together, at equal steps, over several seeds: bits per byte of held-out text.

    python -m experiments.bench tuned                      # three seeds, small models of bytes; CPU
    python -m experiments.bench tuned --seeds 0 --steps 20 # a look

Of each seed the small model of `seed_runs` is tuned on English (pydoc's topics) and, where tunes are put
together, on tables (encodings):

    tune   all of it; low-rank adapters, with and without magnitudes of their own (LoRA, DoRA); bottlenecks behind the
           mixers; of the whole tune, the weights that moved most alone (sparse deltas)
    merge  the mean over both texts, of the two tunes in one: task arithmetic, which halves each change; TIES; the sums
           of the weights that moved most; and of two tunes on English in other orders, their average (a soup), on
           English alone

What is printed is the mean and the standard deviation over seeds.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal

from flax import nnx

import zoo
from experiments import causal_lm
from experiments.bench.over_seeds import ROWS, print_over_seeds, trained
from experiments.bench.seed_runs import SeedRuns
from experiments.data.corpus import load_corpus
from experiments.loop import flags
from experiments.loop.adapting import AdaptConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig, train

Part = Literal["tune", "merge"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and of the order of the data."""
    base_steps: int = 400
    """Steps of the small model."""
    steps: int = 100
    """Steps of each tune."""
    parts: tuple[Part, ...] = ("tune", "merge")
    """What is compared."""
    shares: tuple[float, ...] = (0.01, 0.1)
    """Shares of the weights that sparse deltas keep."""


class Bench(SeedRuns):
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        super().__init__(seed, folder, config.base_steps, config.steps)
        self.config = config

    def measure(self) -> dict[str, float]:
        """Every way that is asked for, by name."""
        found: dict[str, float] = {}
        english = self.tuned("english")
        for part in self.config.parts:
            found |= getattr(self, f"_{part}")(self.base, english)
        return found

    def _tune(self, base: Any, english: Any) -> dict[str, float]:
        found = {"tune: before": self.bits(base, "english"), "tune: all": self.bits(english, "english")}
        for name, dora in (("LoRA", False), ("DoRA", True)):
            how: dict[str, Any] = {"rate": 1e-2, "adapt": AdaptConfig(rank=4, dora=dora)}
            tuned = self.train(name, "english", self.config.steps, init=self.start, **how)
            found[f"tune: {name} of rank 4"] = self.bits(tuned, "english")
        for width in (8, 32):
            found[f"tune: bottlenecks of {width}"] = self.bits(self._bottlenecks(base, width), "english")
        for share in self.config.shares:
            sparse = zoo.add_deltas(base, [zoo.sparse_delta(base, english, share=share)])
            found[f"tune: the {share:g} that moved most"] = self.bits(sparse, "english")
        return found

    def _bottlenecks(self, base: Any, width: int) -> Any:
        steps, corpus = self.config.steps, load_corpus(self.texts["english"])
        adapted: Any = zoo.add_adapters(base, width=width, rngs=nnx.Rngs(self.seed))
        looks: dict[str, Any] = {"eval_every": steps, "save_every": steps, "tensorboard": False}
        loop = TrainConfig(steps=steps, batch_size=ROWS, seed=self.seed, **looks)
        config = causal_lm.Config(model=adapted.config, data=self.texts["english"], train=loop, eval_batches=1)
        task = causal_lm.make_task(config, corpus, adapted)
        return train(task, loop, OptimConfig(learning_rate=1e-2, warmup_steps=10), self.folder / f"width {width}").model

    def _merge(self, base: Any, english: Any) -> dict[str, float]:
        texts = "english", "tables"
        tunes = [english, self.tuned("tables")]

        def over_both(model: Any) -> float:
            return statistics.mean(self.bits(model, text) for text in texts)

        found = {"merge: before": over_both(base)}
        found["merge: task arithmetic"] = over_both(zoo.merge(base, tunes, method="task_arithmetic"))
        for rate in (0.5, 0.8):
            found[f"merge: TIES, {rate:g} trimmed"] = over_both(zoo.merge(base, tunes, method="ties", rate=rate))
        for share in self.config.shares:
            deltas = [zoo.sparse_delta(base, tuned, share=share) for tuned in tunes]
            found[f"merge: sum of the {share:g} that moved most"] = over_both(zoo.add_deltas(base, deltas))
        of_text: dict[str, Any] = {"steps": self.steps, "seed": self.seed + 100}  # another order of the data
        other = trained(self.folder / "english again", self.texts["english"], init=self.start, **of_text)
        both = [self.bits(model, "english") for model in (english, other)]
        found["merge: two tunes on English, their mean"] = statistics.mean(both)
        soup: Any = zoo.merge(None, [english, other], method="average")
        found["merge: two tunes on English, a soup"] = self.bits(soup, "english")
        return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench tuned", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
