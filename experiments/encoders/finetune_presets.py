"""The configuration of fine-tuning, and its presets: small ones, and GLUE's by published recipes."""

import dataclasses
from typing import Any

import zoo
from experiments.data.labelled import Kind, LabelledConfig
from experiments.encoders import glue
from experiments.encoders.class_weights import ClassWeights
from experiments.encoders.objectives import Head
from experiments.encoders.shapes import small_encoder
from experiments.loop.adapting import AdaptConfig, check_start
from experiments.loop.duration import check_duration
from experiments.loop.few_bits import QuantizeConfig, check_bits
from experiments.loop.mesh import MeshConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.seeds import check_different
from experiments.loop.train import TrainConfig
from zoo.layers.pooling import Pool


@dataclasses.dataclass(frozen=True)
class Config:
    """What is learned from which labels, from which model on."""

    init: str | None = None
    """The encoder: a run of pretrain or finetune, a published folder or a hub name; its shape and tokenizer replace
    --model and --data.tokenizer, and flags that say otherwise are refused. None: a fresh one."""
    scratch: bool = False
    """Take shape and tokenizer of --init, but fresh parameters: what pre-training is compared with."""
    data: LabelledConfig = LabelledConfig()
    """Texts and labels."""
    kind: Kind | None = None
    """What labels are. None: as their column looks, strings and integers classes, lists of them several classes (or,
    beside lists of words, tags), floats numbers."""
    class_weights: ClassWeights = "none"
    """balanced: in training, rare classes count as much as frequent ones; of tags and of several classes too."""
    head: Head = "pooled"
    """pooled: a new head on a row's vector, or on each token's. mlm: classes are words that the masked-language-model
    head puts in place of [MASK]; nothing is new."""
    pool: Pool = "first"
    """How a row becomes a vector."""
    dropout: float | None = None
    """Of the encoder's layers while it is tuned. None: as its config says."""
    classifier_dropout: float = 0.1
    """Of what the new head reads."""
    template: str | None = None
    """With --head mlm, such as "{text} It was [MASK]."; {second} is a pair's other text, {options} lists classes."""
    verbaliser: str | None = None
    """With --head mlm, a word for each class in order, such as "bad good". None: the classes' own names, or tokens of
    them, or letters."""
    max_len: int = 128
    """Tokens of a row: longer texts are cut, contexts of answers are read in overlapping windows."""
    stride: int | None = None
    """Tokens from one window of a context to the next. None: half a window."""
    epochs: float | None = None
    """Passes over the training rows, instead of --steps, with an evaluation after each."""
    warmup_fraction: float | None = None
    """Share of the steps that warm up, instead of --optim.warmup-steps."""
    seeds: tuple[int, ...] = ()
    """A run for each, in folders of their own, and the mean. None given: one run, of --train.seed."""
    metrics: tuple[str, ...] = ()
    """Which metrics the table at the end shows. None given: all."""
    baseline: bool = False
    """Also fit a linear model to counts of words, and show what it reaches on the same rows."""
    model: zoo.MaskedLMConfig = small_encoder(96, 3, 128)
    """Shape of a fresh encoder. vocab_size 0 takes the tokenizer's."""
    train: TrainConfig = TrainConfig(batch_size=32)
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    adapt: AdaptConfig = AdaptConfig()
    """Adapters of --init, which stays as it is, rather than all of it."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Few bits that weights are read in, and the model is trained for; see `zoo.quantize`."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    run_dir: str | None = None
    """Folder of the run. None: runs/finetune/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        if self.scratch and self.init is None:
            raise ValueError("--scratch is for the shape of an --init; without one the encoder is fresh anyway")
        check_start(self.adapt, None if self.scratch else self.init)
        check_bits(self.quantize, self.adapt)
        check_duration(self)
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"--stride {self.stride}, expected at least 1")
        if self.max_len < 4:
            raise ValueError(f"--max-len {self.max_len}, expected at least 4")
        if self.head != "mlm":
            for flag, value in (("--template", self.template), ("--verbaliser", self.verbaliser)):
                if value is not None:
                    raise ValueError(f"{flag} {value!r} belongs to --head mlm")
        check_different(self.seeds)


def _small(data: LabelledConfig, *, max_len: int, epochs: float, rate: float = 5e-4) -> Config:
    return Config(
        data=data,
        max_len=max_len,
        epochs=epochs,
        warmup_fraction=0.06,
        pool="mean",
        model=small_encoder(128, 4, 512),
        train=TrainConfig(batch_size=32, log_every=50),
        optim=OptimConfig(learning_rate=rate, schedule="linear", final_fraction=0.0, weight_decay=0.05, beta2=0.98),
    )


def _glue(task: str, recipe: glue.Recipe) -> Config:
    return Config(
        data=glue.data(task),
        kind="regression" if task == "stsb" else "classification",
        metrics=glue.TASKS[task].metrics,
        max_len=recipe.max_len,
        pool=recipe.pool,
        epochs=recipe.epochs,
        warmup_fraction=0.06,
        model=small_encoder(128, 4, 512),
        train=TrainConfig(batch_size=recipe.batch_size, save_every=1000),
        optim=OptimConfig(
            learning_rate=recipe.learning_rate,
            schedule="linear",
            final_fraction=0.0,
            weight_decay=recipe.weight_decay,
            beta2=0.98,
            eps=1e-6,
        ),
    )


def _fetched(name: str, **options: Any) -> LabelledConfig:
    return LabelledConfig(fetched=name, validation_fraction=0.05, **options)


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "Which of ten packages of Python's standard library a snippet is from: two minutes on two CPU cores.",
        dataclasses.replace(
            _small(LabelledConfig(vocab_size=4096), max_len=128, epochs=4, rate=1e-3), model=small_encoder(96, 3, 128)
        ),
    ),
    "20newsgroups": ("Which of twenty newsgroups; fetched.", _small(_fetched("20newsgroups"), max_len=256, epochs=6)),
    "r8": ("Which of eight topics of Reuters news; fetched.", _small(_fetched("r8"), max_len=128, epochs=8)),
    "rotten-tomatoes": (
        "Whether a film review praises, from one of its sentences; fetched.",
        _small(_fetched("rotten-tomatoes"), max_len=64, epochs=5),
    ),
    "movie-sentences": (
        "How people rate a sentence about a film, -4 to 4; fetched.",
        _small(_fetched("movie-sentences"), max_len=64, epochs=5),
    ),
}
PRESETS |= {
    task if recipe == "mosaicbert" else f"{task}-{recipe}": (
        f"GLUE's {task} by {recipe}'s recipe; from the hub, for accelerators.",
        _glue(task, tasks[task]),
    )
    for recipe, tasks in glue.RECIPES.items()
    for task in tasks
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("metrics", "baseline", "data.skip_bad")
