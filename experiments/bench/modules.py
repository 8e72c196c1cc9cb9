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
from experiments.bench.over_seeds import print_over_seeds
from experiments.bench.seed_runs import DATA, SeedRuns
from experiments.causal.module_wise import FOLDER, ModulesConfig
from experiments.data.corpus import load_corpus
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


_TEACHER = zoo.CausalLMConfig(
    d_model=64, n_layers=4, pattern="attn/mlp", attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(d_ff=128)
)
_STUDENT = dataclasses.replace(_TEACHER, n_layers=2, pattern="mamba/mlp", mamba=ssm.MambaConfig(d_state=8))


class Bench(SeedRuns):
    """The runs of one seed, in a folder.

    Args:
      config: options.
      seed: of all runs.
      folder: where they are.
    """

    def __init__(self, config: Config, seed: int, folder: Path):
        super().__init__(seed, folder, config.teacher_steps, config.steps)
        self.config = config

    def measure(self) -> dict[str, float]:
        """Teacher and students, by name."""
        taught: dict[str, Any] = {"teacher": str(self.folder / "teacher")}
        teacher = self.train("teacher", "library", self.base_steps, model=_TEACHER)
        by_logits = self.train("logits", "library", self.steps, model=_STUDENT, **taught)
        shape = dataclasses.replace(_STUDENT, vocab_size=load_corpus(DATA).tokenizer.vocab_size)
        fresh = zoo.CausalLM(shape, rngs=nnx.Rngs(self.seed))
        started = self.save("between", zoo.between_ends_of(teacher, fresh))
        with_ends = self.train("ends", "library", self.steps, init=started, **taught)
        models = {"teacher": teacher, "logits: fresh": by_logits, "logits: the teacher's ends": with_ends}
        found = {name: self.bits(model, "library") for name, model in models.items()}
        alone = round(self.steps * self.config.share)
        matches: tuple[Any, ...] = ("hidden", "logits")
        for match in matches:
            modules = ModulesConfig(steps=alone, match=match)
            name = f"modules by {match}"
            model = self.train(name, "library", self.steps - alone, model=_STUDENT, modules=modules, **taught)
            together = last_evaluation(self.folder / name / FOLDER)
            assert together is not None
            found[f"modules: by {match}, put together"] = together["bits_per_byte"]
            found[f"modules: by {match}, then logits"] = self.bits(model, "library")
        return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench modules", description=__doc__)
    print_over_seeds(config.seeds, "bits/byte", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
