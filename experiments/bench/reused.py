"""What starting from a trained model is worth, at equal steps, over several seeds: bits per byte of held-out text.

    python -m experiments.bench reused                      # three seeds, small models of bytes; CPU
    python -m experiments.bench reused --seeds 0 --steps 20 # a look

Of each seed a small model is trained on Python's standard library. Then, each against its alternative:

    grow     a model of twice the width and depth: fresh, or grown from the small one, for as many steps
    prune    half of the hidden channels go, with and without making up for them: at once, and after being taught
    adapt    the small model tuned on English (pydoc's topics): all of it, or adapters alone
    merge    that tune and one on tables (encodings) in one model: the mean over both texts, against the share of
             changes that is dropped, which DARE makes up for and dropping alone does not

What is printed is the mean and the standard deviation over seeds.
"""

import dataclasses
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

import ssm
import zoo
from experiments import causal_lm
from experiments.bench.over_seeds import ROWS, held_out_bits, print_over_seeds
from experiments.data.corpus import DataConfig, load_corpus
from experiments.loop import flags
from experiments.loop.adapting import AdaptConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig
from experiments.reusing.calibrating import Calibration, batches_of

Part = Literal["grow", "prune", "teach", "adapt", "merge"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters, the order of the data, and what is dropped."""
    base_steps: int = 400
    """Steps of the small model."""
    steps: int = 100
    """Steps of each alternative."""
    parts: tuple[Part, ...] = ("grow", "prune", "teach", "adapt", "merge")
    """What is compared. teach: pruned models, after as many steps with the whole one as teacher."""
    rates: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Shares of the changes that merging drops."""


_SHAPE = zoo.CausalLMConfig(
    d_model=64, n_layers=2, pattern="mamba/mlp", mamba=ssm.MambaConfig(d_state=8), mlp=zoo.MLPConfig(d_ff=128)
)
_LARGE = dataclasses.replace(_SHAPE, d_model=128, n_layers=4, mlp=zoo.MLPConfig(d_ff=256))
_DATA = DataConfig(seq_len=64)


class Bench:
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        self.config, self.seed, self.folder = config, seed, folder
        library = Path(sysconfig.get_paths()["stdlib"])
        self.texts = {
            "library": _DATA,
            "english": dataclasses.replace(_DATA, path=str(library / "pydoc_data" / "topics.py")),
            "tables": dataclasses.replace(_DATA, path=str(library / "encodings")),
        }

    def train(self, name: str, text: str, steps: int, rate: float = 3e-3, **options: Any) -> zoo.CausalLM:
        """The model of a run."""
        config = causal_lm.Config(
            data=self.texts[text],
            train=TrainConfig(
                steps=steps, batch_size=ROWS, eval_every=steps, save_every=steps, tensorboard=False, seed=self.seed
            ),
            optim=OptimConfig(learning_rate=rate, warmup_steps=10),
            eval_batches=1,
            **options,
        )
        causal_lm.fit(config, self.folder / name)
        return zoo.from_pretrained(self.folder / name, kind=zoo.CausalLM)

    def save(self, name: str, model: Any) -> str:
        """Writes a model that a run can begin with, which reads bytes."""
        zoo.save_pretrained(model, self.folder / name)
        load_corpus(_DATA).tokenizer.save(self.folder / name)
        return str(self.folder / name)

    def bits(self, model: Any, text: str) -> float:
        """Bits per byte of what is held out of a text."""
        return held_out_bits(model, self.texts[text])

    def measure(self) -> dict[str, float]:
        """Every alternative that is asked for, by name."""
        base = self.train("base", "library", self.config.base_steps, model=_SHAPE)
        found = {"small model": self.bits(base, "library")}
        for part in self.config.parts:
            found |= getattr(self, f"_{part}")(base, str(self.folder / "base"))
        return found

    def _grow(self, base: Any, start: str) -> dict[str, float]:
        fresh = self.train("fresh", "library", self.config.steps, model=_LARGE)
        found = {"grow: fresh": self.bits(fresh, "library")}
        methods: tuple[Any, ...] = ("fpi", "aki")
        for method in methods:
            large = zoo.grow(base, d_model=128, n_layers=4, method=method, rngs=nnx.Rngs(self.seed))
            place = self.save(f"large-{method}", large)
            grown = self.train(f"grown-{method}", "library", self.config.steps, init=place)
            found[f"grow: {method}"] = self.bits(grown, "library")
        return found

    def _pruned(self, base: Any) -> dict[str, Any]:
        looked = batches_of(load_corpus(_DATA).train, _DATA.seq_len, Calibration(batches=8, batch_size=ROWS))
        names = {"refitted": True, "cut alone": False}
        return {name: zoo.prune(base, looked, d_ff=64, compensate=compensate) for name, compensate in names.items()}

    def _prune(self, base: Any, start: str) -> dict[str, float]:
        return {f"prune: {name}": self.bits(small, "library") for name, small in self._pruned(base).items()}

    def _teach(self, base: Any, start: str) -> dict[str, float]:
        found = {}
        for name, small in self._pruned(base).items():
            place = self.save(f"small {name}", small)
            options: dict[str, Any] = {"rate": 1e-3, "init": place, "teacher": start}
            taught = self.train(f"taught {name}", "library", self.config.steps, **options)
            found[f"prune: {name}, taught"] = self.bits(taught, "library")
        return found

    def _adapt(self, base: Any, start: str) -> dict[str, float]:
        options: dict[str, Any] = {"rate": 1e-2, "adapt": AdaptConfig(rank=4)}
        adapted = self.train("adapters", "english", self.config.steps, init=start, **options)
        return {
            "adapt: before": self.bits(base, "english"),
            "adapt: all": self.bits(self._tuned("english", start), "english"),
            "adapt: rank 4": self.bits(adapted, "english"),
        }

    def _merge(self, base: Any, start: str) -> dict[str, float]:
        texts = ("english", "tables")
        tuned = [self._tuned(text, start) for text in texts]
        found = {"merge: before": statistics.mean(self.bits(base, text) for text in texts)}
        for i, text in enumerate(texts):
            found[f"merge: {text} alone"] = statistics.mean(self.bits(tuned[i], other) for other in texts)
        for rate in self.config.rates:
            methods: tuple[Any, ...] = ("dare", "drop") if rate else ("task_arithmetic",)
            for method in methods:
                options: Any = {"rate": rate, "weights": 0.5, "key": jax.random.key(self.seed)}
                merged = zoo.merge(base, tuned, method=method, **options)
                found[f"merge: {method} {rate:g}"] = statistics.mean(self.bits(merged, text) for text in texts)
        return found

    def _tuned(self, text: str, start: str) -> zoo.CausalLM:
        """The small model trained on a text; once."""
        return self.train(text, text, self.config.steps, init=start)


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench reused", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
