"""What fewer bits cost small models, over several seeds: bits per byte of held-out text, and bytes of the weights.

    python -m experiments.bench few_bits                      # three seeds, small models of bytes; CPU
    python -m experiments.bench few_bits --seeds 0 --steps 20 # a look

Of each seed a model is trained on Python's standard library, and its maps are kept in fewer bits:

    maps     Mamba and MLPs in 8, 4, 3, 2 and 1 bits, each weight rounded, or in order by what the maps read
    experts  Mamba and experts, the experts' maps at the bytes of 4 bits, and at the mean of those of 2 and of 4: all
             alike; 2, 4 or 8 bits by map; by expert

What is printed is the mean and the standard deviation over seeds; bytes are the same for all of them.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import zoo
from experiments.bench.over_seeds import print_over_seeds
from experiments.bench.seed_runs import SHAPE, SeedRuns
from experiments.loop import flags
from zoo.reuse.quantize import quantized_weights

Part = Literal["maps", "experts"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and of the order of the data."""
    steps: int = 400
    """Steps of each model."""
    parts: tuple[Part, ...] = ("maps", "experts")
    """What is compared."""


_SHAPE = dataclasses.replace(SHAPE, moe=zoo.MoEConfig(n_experts=8, top_k=1, d_ff=64))
_EXPERTS = r"experts\.\w+"


class Bench(SeedRuns):
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        super().__init__(seed, folder, config.steps, config.steps)
        self.config = config

    def measure(self) -> dict[str, float]:
        """Every form that is asked for, by name."""
        return self.of_parts(self.config.parts)

    def _trained(self, name: str, pattern: str) -> tuple[zoo.CausalLM, Any]:
        """A model, and the moments of what its maps read."""
        shape = dataclasses.replace(_SHAPE, pattern=pattern)
        model = self.train(name, "library", self.steps, model=shape)
        return model, zoo.calibrate(model, self.looked())

    def _maps(self) -> dict[str, float]:
        model, moments = self._trained("maps", "mamba/mlp")
        found = {"maps: float32": self.bits(model, "library")}
        methods: tuple[Any, ...] = ("round", "hessian")
        names = {"round": "rounded", "hessian": "in order"}
        several: tuple[Any, ...] = (8, 4, 3, 2, 1)
        for bits in several:
            for method in methods:
                small = zoo.quantize(model, bits=bits, group_size=32, method=method, moments=moments)
                found[f"maps: {bits} bits, {names[method]}"] = self.bits(small, "library")
        return found

    def _experts(self) -> dict[str, float]:
        model, moments = self._trained("experts", "mamba/moe")
        found = {"experts: float32": self.bits(model, "library")}
        options: dict[str, Any] = {"group_size": 32, "targets": _EXPERTS, "moments": moments}
        sizes = []
        several: tuple[Any, ...] = (2, 4)
        for bits in several:
            small = zoo.quantize(model, bits=bits, **options)
            sizes.append(sum(linear.weight.nbytes for linear in quantized_weights(small).values()))
            found[f"experts: {bits} bits, {sizes[-1]:,} bytes"] = self.bits(small, "library")
        for budget in (sum(sizes) // 2, sizes[1]):
            for by_expert in (False, True):
                small = zoo.quantize(model, mixed=budget, by_expert=by_expert, **options)
                name = f"experts: {budget:,} bytes, by {'expert' if by_expert else 'map'}"
                found[name] = self.bits(small, "library")
        return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench few_bits", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
