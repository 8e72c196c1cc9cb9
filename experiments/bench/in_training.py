"""What options of training are worth, at equal steps, over several seeds, on Python's standard library as bytes.

    python -m experiments.bench in_training                      # three seeds, small models; CPU
    python -m experiments.bench in_training --seeds 0 --steps 20 # a look

    depths   a mixture of depths: every second block, or more with depth (p-MoD), takes some of the positions; beside
             it all blocks whole, and as many whole blocks as cost about the same. Evaluated as it generates, by what
             each position says alone, and as it is trained, the best of each row
    shared   four blocks of experts; one at all depths; the same with norms of each depth (WideNet)
    decoder  a masked language model; with two blocks above it in training alone (BPDec); with two more blocks
    pangu    a Transformer; with two terms in its activations; with a shortcut beside attention; with both (PanGu-pi)
    tasks    a masked language model with experts, of two texts, English and tables: a router for both, or each (M3ViT)

What is printed is the mean and the standard deviation over seeds: bits per byte of held-out text, of `decoder` nats a
hidden token, which is another quantity, and of `tasks` their mean over the texts.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from flax import nnx

import ssm
import zoo
from experiments.bench.over_seeds import ROWS, held_out_bits, print_over_seeds
from experiments.bench.seed_runs import DATA, SeedRuns
from experiments.causal.next_token import next_token_loss
from experiments.encoders import masked_lm
from experiments.loop import flags
from experiments.loop.metrics import last_evaluation
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig

Part = Literal["depths", "shared", "decoder", "pangu", "tasks"]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each training is, over which seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters, the order of the data, and what is drawn in training."""
    steps: int = 200
    """Steps of each model."""
    parts: tuple[Part, ...] = ("depths", "shared", "decoder", "pangu", "tasks")
    """What is compared."""


_WARMUP_STEPS = 20
_SHAPE = zoo.CausalLMConfig(
    d_model=64,
    n_layers=4,
    pattern="mamba/mlp",
    mamba=ssm.MambaConfig(d_state=8),
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=128),
    moe=zoo.MoEConfig(n_experts=4, top_k=1, d_ff=128),
)
_P_MOD = zoo.MoDConfig(gate="tanh", weighs="symmetric")
_DEPTHS: dict[str, dict[str, Any]] = {
    "four blocks": {},
    "three blocks": {"n_layers": 3},
    "every second block: 1/2": {"pattern": "mamba/mlp mamba/mlp:0.5"},
    "every second block: 1/8": {"pattern": "mamba/mlp mamba/mlp:0.125"},
    "fewer with depth": {"pattern": "mamba/mlp:cosine", "mod": _P_MOD},
}
_SHARED: dict[str, dict[str, Any]] = {
    "four blocks": {"pattern": "mamba/moe"},
    "one block": {"pattern": "mamba/moe@a"},
    "one block, norms of each depth": {"pattern": "mamba/moe@a", "share_norms": False},
}
_SERIES = zoo.MLPConfig(d_ff=128, activation="gelu", series=2)
_PANGU: dict[str, dict[str, Any]] = {
    "plain": {},
    "two terms": {"mlp": _SERIES},
    "a shortcut of rank 4": {"shortcut_rank": 4},
    "both": {"mlp": _SERIES, "shortcut_rank": 4},
}
_ENCODER = zoo.MaskedLMConfig(
    d_model=64,
    n_layers=2,
    pattern="attn/mlp",
    norm_place="pre",
    max_len=None,
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=128),
)
_ENCODERS: dict[str, dict[str, Any]] = {
    "two blocks": {},
    "two blocks, two above in training": {"decoder_layers": 2},
    "four blocks": {"n_layers": 4},
}

_ROUTERS = {"one router for both texts": 1, "a router for each": 2}


def _chosen_among_rows(model: Any, batch: Any, rngs: nnx.Rngs | None) -> Any:
    """The loss where blocks choose among whole rows, as in training."""
    return next_token_loss(model, batch, nnx.Rngs(dropout=0))


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
        """Every model that is asked for, by name."""
        return self.of_parts(self.config.parts)

    def causal(self, name: str, fields: dict[str, Any]) -> zoo.CausalLM:
        """A trained language model."""
        model = dataclasses.replace(_SHAPE, **fields)
        return self.train(name, "library", self.steps, model=model, warmup_steps=_WARMUP_STEPS)

    def _depths(self) -> dict[str, float]:
        found = {}
        for name, fields in _DEPTHS.items():
            model = self.causal(f"depths {name}", fields)
            found[f"depths: {name}"] = self.bits(model, "library")
            if any(word.capacity for word in model.backbone.words):
                found[f"depths: {name}, as in training"] = held_out_bits(model, DATA, _chosen_among_rows)
        return found

    def _shared(self) -> dict[str, float]:
        models = {name: self.causal(f"shared {name}", fields) for name, fields in _SHARED.items()}
        return {f"shared: {name}": self.bits(model, "library") for name, model in models.items()}

    def _pangu(self) -> dict[str, float]:
        plain: dict[str, Any] = {"pattern": "attn/mlp", "mlp": dataclasses.replace(_SERIES, series=1)}
        models = {name: self.causal(f"pangu {name}", plain | fields) for name, fields in _PANGU.items()}
        return {f"pangu: {name}": self.bits(model, "library") for name, model in models.items()}

    def masked(self, name: str, model: zoo.MaskedLMConfig, text: str = "library", tasks: tuple[str, ...] = ()) -> float:
        """Nats a hidden token of a trained masked language model."""
        steps: dict[str, Any] = {"steps": self.steps, "eval_every": self.steps, "save_every": self.steps}
        config = masked_lm.Config(
            model=model,
            data=self.texts[text],
            tasks=tasks,
            examples=0,
            train=TrainConfig(**steps, batch_size=ROWS, tensorboard=False, seed=self.seed),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=_WARMUP_STEPS),
        )
        masked_lm.fit(config, self.folder / name)
        evaluated = last_evaluation(self.folder / name)
        assert evaluated is not None
        return evaluated["loss"]

    def _decoder(self) -> dict[str, float]:
        names = {f"decoder: {name}": dataclasses.replace(_ENCODER, **fields) for name, fields in _ENCODERS.items()}
        return {name: self.masked(name, model) for name, model in names.items()}

    def _tasks(self) -> dict[str, float]:
        tables = self.texts["tables"].path
        assert tables is not None  # a folder of the library
        found = {}
        for name, n_tasks in _ROUTERS.items():
            moe = dataclasses.replace(_SHAPE.moe, n_tasks=n_tasks)
            model = dataclasses.replace(_ENCODER, pattern="attn/moe", moe=moe)
            found[f"tasks: {name}"] = self.masked(f"tasks {name}", model, "english", (tables,))
        return found


def main() -> int:
    """Trains, measures, prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench in_training", description=__doc__)
    print_over_seeds(config.seeds, "held out", lambda seed, folder: Bench(config, seed, folder).measure())
    return 0


if __name__ == "__main__":
    flags.run(main)
