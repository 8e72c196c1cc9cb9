"""What learning module by module is worth before a student learns as a whole, over seeds: bits per byte held out.

    python -m experiments.bench modules                      # three seeds, small models of bytes; CPU
    python -m experiments.bench modules --seeds 0 --steps 20 # a look

Of each seed a Transformer of four blocks is trained on Python's standard library, and teaches a student of two blocks
of Mamba and MLP, for as many steps in each way:

    logits   the student learns what the teacher says of each next token (`--teacher`), from fresh parameters; or with
             the teacher's embedding, final norm and head
    modules  its blocks first learn in place of the teacher's for a part of the steps (`--modules.steps`), by hidden
             states or through the teacher's later blocks; then all of it by the teacher's logits

What is printed is the mean and the standard deviation over seeds; also of the modules as they are put together.
"""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

import ssm
import zoo
from experiments.bench.over_seeds import held_out_bits, print_over_seeds, trained
from experiments.causal.module_wise import FOLDER, ModulesConfig
from experiments.data.corpus import DataConfig, load_corpus
from experiments.loop import flags
from experiments.loop.metrics import last_evaluation


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and of the order of the data."""
    teacher_steps: int = 400
    """Steps of the teacher."""
    steps: int = 200
    """Steps of each student, those of its modules among them."""
    share: float = 0.5
    """Share of the steps in which modules learn by themselves."""


_DATA = DataConfig(seq_len=64)
_TEACHER = zoo.CausalLMConfig(
    d_model=64, n_layers=4, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=128)
)
_STUDENT = dataclasses.replace(_TEACHER, n_layers=2, pattern="mamba/mlp", mamba=ssm.MambaConfig(d_state=8))


class Bench:
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        self.config, self.seed, self.folder = config, seed, folder

    def train(self, name: str, steps: int, **options: Any) -> zoo.CausalLM:
        """The model of a run."""
        return trained(self.folder / name, _DATA, steps=steps, seed=self.seed, **options)

    def measure(self) -> dict[str, float]:
        """Teacher and students, by name."""
        steps, taught = self.config.steps, {"teacher": str(self.folder / "teacher")}
        found = {"teacher": self.bits(self.train("teacher", self.config.teacher_steps, model=_TEACHER))}
        found["logits: fresh"] = self.bits(self.train("logits", steps, model=_STUDENT, **taught))
        fresh = zoo.CausalLM(self._of_bytes(_STUDENT), rngs=nnx.Rngs(self.seed))
        teacher = zoo.from_pretrained(self.folder / "teacher", kind=zoo.CausalLM)
        started = self.save("between", zoo.between_ends_of(teacher, fresh))
        found["logits: the teacher's ends"] = self.bits(self.train("ends", steps, init=started, **taught))
        alone = round(steps * self.config.share)
        matches: tuple[Any, ...] = ("hidden", "logits")
        for match in matches:
            modules = ModulesConfig(steps=alone, match=match)
            name = f"modules by {match}"
            model = self.train(name, steps - alone, model=_STUDENT, modules=modules, **taught)
            together = last_evaluation(self.folder / name / FOLDER)
            assert together is not None
            found[f"modules: by {match}, put together"] = together["bits_per_byte"]
            found[f"modules: by {match}, then logits"] = self.bits(model)
        return found

    def save(self, name: str, model: zoo.CausalLM) -> str:
        """Writes a model that a run can begin with, which reads bytes."""
        zoo.save_pretrained(model, self.folder / name)
        load_corpus(_DATA).tokenizer.save(self.folder / name)
        return str(self.folder / name)

    @staticmethod
    def bits(model: zoo.CausalLM) -> float:
        """Bits per byte of held-out text."""
        return held_out_bits(model, _DATA)

    @staticmethod
    def _of_bytes(config: zoo.CausalLMConfig) -> zoo.CausalLMConfig:
        return dataclasses.replace(config, vocab_size=load_corpus(_DATA).tokenizer.vocab_size)


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench modules", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
