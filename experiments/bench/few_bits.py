"""What fewer bits cost small models, over several seeds: bits per byte of held-out text, and bytes of the weights.

    python -m experiments.bench few_bits                      # three seeds, small models of bytes; CPU
    python -m experiments.bench few_bits --seeds 0 --steps 20 # a look
    python -m experiments.bench few_bits --parts trained      # training in few bits

Of each seed a model is trained on Python's standard library, and its maps are kept in fewer bits:

    maps     Mamba and MLPs in 8, 4, 3, 2 and 1 bits, each weight rounded, or in order by what the maps read
    experts  Mamba and experts, the experts' maps at the bytes of 4 bits, and at the mean of those of 2 and of 4: all
             alike; 2, 4 or 8 bits by map; by expert
    trained  Mamba and MLPs in 4, 2 and 1 bits: rounded, in order, and trained on as they are read rounded, by
             themselves, taught by the floats they began as or by those trained on as long, and taught with
             directions; beside these floats, and them rounded

What is printed is the mean and the standard deviation over seeds; bytes are the same for all of them.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import zoo
from experiments.bench.over_seeds import print_over_seeds
from experiments.bench.seed_runs import SHAPE, SeedRuns
from experiments.loop import flags
from experiments.loop.few_bits import QuantizeConfig
from zoo.reuse.codes import Bits
from zoo.reuse.quantize import quantized_weights

Part = Literal["maps", "experts", "trained"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and of the order of the data."""
    steps: int = 400
    """Steps of each model."""
    parts: tuple[Part, ...] = ("maps", "experts")
    """What is compared."""
    bits: tuple[Bits, ...] = (4, 2, 1)
    """Of the part trained."""


_SHAPE = dataclasses.replace(SHAPE, moe=zoo.MoEConfig(n_experts=8, top_k=1, d_ff=64))
_GROUP = 32
"""Inputs that share a scale."""
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

    def _made(self, name: str, pattern: str) -> tuple[zoo.CausalLM, Any]:
        """A model, and the moments of what its maps read."""
        shape = dataclasses.replace(_SHAPE, pattern=pattern)
        model = self.train(name, "library", self.steps, model=shape)
        return model, zoo.calibrate(model, self.looked())

    def _maps(self) -> dict[str, float]:
        model, moments = self._made("maps", "mamba/mlp")
        found = {"maps: float32": self.bits(model, "library")}
        several: tuple[Any, ...] = (8, 4, 3, 2, 1)
        for bits in several:
            found |= self._at_once(f"maps: {bits} bits", model, moments, bits)
        return found

    def _at_once(self, named: str, model: zoo.CausalLM, moments: Any, bits: Any) -> dict[str, float]:
        """What is lost without training."""
        methods: tuple[tuple[str, Any], ...] = (("rounded", "round"), ("in order", "hessian"))
        options = {"bits": bits, "group_size": _GROUP, "moments": moments}
        return {
            f"{named}, {name}": self.bits(zoo.quantize(model, method=method, **options), "library")
            for name, method in methods
        }

    def _trained_in(self, name: str, bits: int, **options: Any) -> zoo.CausalLM:
        """`base`, trained on as it is read in so many bits; 0: as it is."""
        few: Any = {"bits": bits, "group_size": _GROUP} if bits else {}
        how: dict[str, Any] = {"rate": 1e-3, "init": self.start, "quantize": QuantizeConfig(**few), **options}
        return self.train(name, "library", self.steps, **how)

    def ways(self) -> dict[str, dict[str, Any]]:
        """Fields of `causal_lm.Config` of the ways to train in few bits, by name."""
        found: dict[str, dict[str, Any]] = {"trained in them": {}}
        for name, teacher in {"as they began": self.start, "trained on": str(self.folder / "floats")}.items():
            found[f"trained in them, taught by floats {name}"] = {"teacher": teacher}
            found[f"trained in them, taught by floats {name} and their directions"] = {
                "teacher": teacher,
                "directions": 1.0,
            }
        return found

    def _trained(self) -> dict[str, float]:
        floats = {"trained: float32": self.base, "trained: float32, trained on": self._trained_in("floats", 0)}
        found = {name: self.bits(model, "library") for name, model in floats.items()}
        moments = {name: zoo.calibrate(model, self.looked()) for name, model in floats.items()}
        for bits in self.config.bits:
            for name, model in floats.items():
                found |= self._at_once(name.replace("float32", f"{bits} bits"), model, moments[name], bits)
            for name, options in self.ways().items():
                small = self._trained_in(f"{bits} {name}", bits, **options)
                found[f"trained: {bits} bits, {name}"] = self.bits(small, "library")
        return found

    def _experts(self) -> dict[str, float]:
        model, moments = self._made("experts", "mamba/moe")
        found = {"experts: float32": self.bits(model, "library")}
        options: dict[str, Any] = {"group_size": _GROUP, "targets": _EXPERTS, "moments": moments}
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
