"""The trainings of one seed that a comparison is made of: small models of bytes, in a folder, all by `causal_lm`."""

import dataclasses
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ssm
import zoo
from experiments.bench.over_seeds import ROWS, held_out_bits, trained
from experiments.data.corpus import DataConfig, load_corpus
from experiments.reusing.calibrating import Calibration, batches_of

SHAPE = zoo.CausalLMConfig(
    d_model=64, n_layers=2, pattern="mamba/mlp", mamba=ssm.MambaConfig(d_state=8), mlp=zoo.MLPConfig(d_ff=128)
)
"""Of the model that most comparisons start from."""
DATA = DataConfig(seq_len=64)
"""Python's standard library, in bytes."""


class SeedRuns:
    """The runs of one seed.

    Args:
      seed: of all of them.
      folder: where they are.
      base_steps: steps of the models that are started from.
      steps: steps of each alternative.
    """

    def __init__(self, seed: int, folder: Path, base_steps: int, steps: int):
        self.seed, self.folder, self.base_steps, self.steps = seed, folder, base_steps, steps
        library = Path(sysconfig.get_paths()["stdlib"])
        self.texts = {
            "library": DATA,
            "english": dataclasses.replace(DATA, path=str(library / "pydoc_data" / "topics.py")),
            "tables": dataclasses.replace(DATA, path=str(library / "encodings")),
        }

    def train(self, name: str, text: str | DataConfig, steps: int, rate: float = 3e-3, **options: Any) -> zoo.CausalLM:
        """The model of a run."""
        data = text if isinstance(text, DataConfig) else self.texts[text]
        return trained(self.folder / name, data, steps=steps, seed=self.seed, rate=rate, **options)

    def of_parts(self, parts: Sequence[str]) -> dict[str, float]:
        """What the methods of some parts, `_PART`, give, by name."""
        found: dict[str, float] = {}
        for part in parts:
            found |= getattr(self, f"_{part}")()
        return found

    @functools.cached_property
    def base(self) -> zoo.CausalLM:
        """The model that most comparisons start from; it lies in `start`."""
        return self.train("base", "library", self.base_steps, model=SHAPE)

    @functools.cached_property
    def start(self) -> str:
        """Where `base` lies, once it has been trained."""
        self.base  # noqa: B018
        return str(self.folder / "base")

    def tuned(self, text: str) -> zoo.CausalLM:
        """`base` trained on a text; once."""
        return self.train(text, text, self.steps, init=self.start)

    def save(self, name: str, model: Any) -> str:
        """Writes a model that a run can begin with, which reads bytes."""
        zoo.save_pretrained(model, self.folder / name)
        load_corpus(DATA).tokenizer.save(self.folder / name)
        return str(self.folder / name)

    def bits(self, model: Any, text: str) -> float:
        """Bits per byte of what is held out of a text."""
        return held_out_bits(model, self.texts[text])

    def looked(self) -> list[dict[str, Any]]:
        """Batches of the library that a model is looked at on before it is made smaller."""
        return batches_of(load_corpus(DATA).train, DATA.seq_len, Calibration(batches=8, batch_size=ROWS))

    def at_once_and_taught(self, name: str, small: Any, teacher: str) -> dict[str, float]:
        """Bits per byte of the library by a smaller model as it is, and after learning from another."""
        options: dict[str, Any] = {"rate": 1e-3, "init": self.save(name, small), "teacher": teacher}
        taught = self.train(f"{name}, taught", "library", self.steps, **options)
        return {name: self.bits(small, "library"), f"{name}, taught": self.bits(taught, "library")}
