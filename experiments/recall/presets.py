"""The configuration of a synthetic task, its model and its training, and a preset for each task."""

import dataclasses

import ssm
import zoo
from experiments.loop.mesh import MeshConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.train import TrainConfig
from experiments.recall.tasks import MQAR, Data, Induction, Parity, Phonebook, SelectiveCopying, at_least


@dataclasses.dataclass(frozen=True)
class Config:
    """A synthetic task, its model and its training. A subclass says which task."""

    data: Data
    """The task."""
    model: zoo.CausalLMConfig = zoo.CausalLMConfig(d_model=64, n_layers=2, pattern="mamba")
    """Shape of the model. Its vocabulary is the task's."""
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig(warmup_steps=0, final_fraction=1.0, weight_decay=0.0)
    """Optimiser and schedule: a constant rate and no weight decay, as in the papers."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    eval_sequences: int = 512
    """Held-out rows of an evaluation, and of each line of the final table."""
    eval_tokens: int = 2**20
    """Most tokens that a line of the table reads: long rows are fewer, though never fewer than 16."""
    run_dir: str | None = None
    """Folder of the run. None: runs/synthetic/TASK, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        at_least(self, eval_sequences=1, eval_tokens=1)


@dataclasses.dataclass(frozen=True)
class SelectiveCopyingConfig(Config):
    """Selective copying."""

    data: SelectiveCopying = SelectiveCopying()
    """The task."""


@dataclasses.dataclass(frozen=True)
class InductionConfig(Config):
    """Induction heads."""

    data: Induction = Induction()
    """The task."""


@dataclasses.dataclass(frozen=True)
class MQARConfig(Config):
    """Multi-query associative recall."""

    data: MQAR = MQAR()
    """The task."""


@dataclasses.dataclass(frozen=True)
class PhonebookConfig(Config):
    """Phonebook look-up."""

    data: Phonebook = Phonebook()
    """The task."""


@dataclasses.dataclass(frozen=True)
class ParityConfig(Config):
    """Parity."""

    data: Parity = Parity()
    """The task."""


PRESETS: dict[str, tuple[str, Config]] = {
    "selective-copying": (
        "Repeat 8 data tokens that are strewn over 64 positions of noise.",
        SelectiveCopyingConfig(
            train=TrainConfig(steps=4500, batch_size=16, eval_every=500, save_every=500, log_every=50),
        ),
    ),
    "induction": (
        "Recall what followed a token, at up to 256 positions; tested at up to 16,384.",
        InductionConfig(
            train=TrainConfig(steps=3000, batch_size=8, eval_every=500, save_every=500, log_every=50),
            optim=OptimConfig(warmup_steps=0, final_fraction=0.0, weight_decay=0.0),
        ),
    ),
    "mqar": (
        "Recall the values of up to 16 keys, by one block of Mamba-2.",
        MQARConfig(
            model=zoo.CausalLMConfig(
                d_model=64,
                n_layers=1,
                pattern="mamba2",
                mamba2=ssm.Mamba2Config(d_state=32, head_dim=16),
                attn=zoo.AttentionConfig(n_heads=2),
            ),
            train=TrainConfig(steps=2500, batch_size=32, eval_every=500, save_every=500, log_every=50),
            optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.0),
        ),
    ),
    "phonebook": (
        "Find a name's number among up to 16; tested among up to 64.",
        PhonebookConfig(
            model=zoo.CausalLMConfig(
                d_model=64,
                n_layers=4,
                pattern="mamba2/mlp",
                mamba2=ssm.Mamba2Config(d_state=16, head_dim=16),
                attn=zoo.AttentionConfig(n_heads=4),
                mlp=zoo.MLPConfig(d_ff=128),
            ),
            train=TrainConfig(steps=3000, batch_size=32, eval_every=500, save_every=500, log_every=50),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.0, weight_decay=0.0),
        ),
    ),
    "parity": (
        "Count ones modulo 2, at up to 160 bits; tested at up to 512.",
        ParityConfig(
            model=zoo.CausalLMConfig(
                d_model=32,
                n_layers=1,
                pattern="mamba3",
                mamba2=ssm.Mamba2Config(d_state=16, head_dim=16),
                mamba3=ssm.Mamba3Config(d_state=16, head_dim=16),
            ),
            train=TrainConfig(steps=2500, batch_size=32, eval_every=500, save_every=500, log_every=50),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=0, final_fraction=0.0, weight_decay=0.0),
        ),
    ),
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("eval_sequences", "eval_tokens", "data.max_eval_length", "data.max_eval_entries")


def fit_vocabulary(config: Config) -> Config:
    """Sets the model's vocabulary to the task's.

    Raises:
      ValueError: the model has another one already.
    """
    if config.model.vocab_size not in (0, config.data.vocab_size):
        raise ValueError(
            f"--model.vocab-size {config.model.vocab_size}, expected the task's, {config.data.vocab_size}, "
            "or 0 to take it"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=config.data.vocab_size))
