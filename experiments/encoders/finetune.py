"""Fine-tuning: an encoder learns classes, numbers, tags of words or answers in a text, from labelled examples.

    python -m experiments.bert finetune tiny                                  # from which package of Python is this?
    python -m experiments.bert finetune tiny --init runs/bert/tiny            # the same, pre-trained on text
    python -m experiments.bert finetune tiny --init runs/bert/tiny --scratch  # its shape and tokenizer, not its weights
    python -m experiments.bert finetune tiny --init runs/bert/tiny --head mlm # the head of pre-training as classifier
    python -m experiments.bert finetune 20newsgroups --init runs/bert/small --seeds 0 1 2 --baseline
    python -m experiments.bert finetune tiny --data.path reviews.csv --data.text-column review --data.label-column stars
    python -m experiments.bert finetune mnli --init FOLDER                    # GLUE, see `glue`; for accelerators

The first names the right package, of ten, for 75 % of the snippets of files that it has not seen (72 ± 3 % over three
seeds); counting words, which --baseline does on the same rows, for 84 %. The same command again resumes the run where
it was. In a notebook: `finetune.predict(RUN_DIR, ["some text"])`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.data.labelled import Examples, Kind, Labelled, LabelledConfig, load_labelled
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import FILE_NAME, Tokenizer, load_tokenizer, restore_tokenizer, save_tokenizer
from experiments.encoders import baselines, glue
from experiments.encoders.confusion import plot_confusion
from experiments.encoders.lengths import check_lengths
from experiments.encoders.load import load_encoder
from experiments.encoders.objectives import (
    Head,
    LabelledRows,
    Objective,
    Predictions,
    Target,
    load_target,
    make_objective,
    save_target,
)
from experiments.encoders.scores import Scores
from experiments.encoders.shapes import small_encoder
from experiments.encoders.verbaliser import choose
from experiments.loop import flags, runs, seeds
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.train import Task, TrainConfig, train
from zoo.layers.pooling import Pool
from zoo.models.build import build


@dataclasses.dataclass(frozen=True)
class Config:
    """What is learned from which labels, from which model on."""

    init: str | None = None
    """The encoder: a run of pretrain or finetune, a published folder or a hub name; its shape and tokenizer replace
    --model and --data.tokenizer. None: a fresh one."""
    scratch: bool = False
    """Take shape and tokenizer of --init, but fresh parameters: what pre-training is compared with."""
    data: LabelledConfig = LabelledConfig()
    """Texts and labels."""
    kind: Kind | None = None
    """What labels are. None: as their column looks, strings and integers classes, floats numbers, lists tags."""
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
    run_dir: str | None = None
    """Folder of the run. None: runs/finetune/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        if self.scratch and self.init is None:
            raise ValueError("--scratch is for the shape of an --init; without one the encoder is fresh anyway")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"--epochs {self.epochs}, expected more than 0")
        if self.epochs is not None and self.train.steps != TrainConfig().steps:
            raise ValueError(f"--steps {self.train.steps} with --epochs {self.epochs}; --epochs None goes by the steps")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"--warmup-fraction {self.warmup_fraction}, expected 0 <= warmup-fraction < 1")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"--stride {self.stride}, expected at least 1")
        if self.max_len < 4:
            raise ValueError(f"--max-len {self.max_len}, expected at least 4")
        if self.head != "mlm":
            for flag, value in (("--template", self.template), ("--verbaliser", self.verbaliser)):
                if value is not None:
                    raise ValueError(f"{flag} {value!r} belongs to --head mlm")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}, expected different ones")


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
FREE = ("metrics", "baseline")


class Prepared(NamedTuple):
    """What the runs of all seeds share."""

    data: Labelled
    objective: Objective
    encoder: Any
    """Config of the model that is tuned, with its head."""
    rows: dict[str, LabelledRows]
    """Of every split, in the data's order."""
    train: TrainConfig
    optim: OptimConfig
    """With numbers of steps for epochs and shares."""


class Tuned(NamedTuple):
    """A run that has ended."""

    model: Any
    scores: dict[str, Scores]
    """Of the last step, by split: "loss" and the metrics."""
    predictions: dict[str, Predictions]
    """The same."""
    stopped: bool
    """Whether a signal ended it before its last step; there are no scores then."""


def prepare(config: Config, folder: Path | None = None) -> Prepared:
    """Reads the data and puts it in rows.

    Args:
      folder: of a run that goes on, whose tokenizer is used again.
    """
    data = load_labelled(config.data, config.kind)
    first = next(iter(data.splits.values()))
    if config.head == "mlm" and data.kind != "classification":
        raise ValueError(f"--head mlm puts a word in place of [MASK]; it cannot say --kind {data.kind}")
    tokenizer, encoder = _tokenizer_and_shape(config, first, folder)
    if config.dropout is not None:
        encoder = dataclasses.replace(encoder, dropout=config.dropout)
    check_lengths(encoder, config.max_len, "--max-len")

    target = Target(data.kind, config.head, data.classes, max_len=config.max_len, stride=config.stride)
    if data.kind == "regression":
        numbers = np.array(first.labels)
        target = dataclasses.replace(target, mean=float(numbers.mean()), std=float(numbers.std()) or 1.0)
    if data.kind == "span-qa":
        target = dataclasses.replace(target, may_be_none=any(not answers["text"] for answers in first.labels or []))
    if config.head == "mlm":
        words = None if config.verbaliser is None else config.verbaliser.split()
        pairs = first.seconds is not None
        chosen = choose(tokenizer, data.classes, words=words, template=config.template, pairs=pairs)
        target = dataclasses.replace(target, words=chosen.words, word_ids=chosen.ids, template=chosen.template)
    objective = make_objective(target, tokenizer, pad_to_max=not encoder.mask_padding)
    wanted = objective.config(encoder, pool=config.pool, dropout=config.classifier_dropout)
    rows = {name: objective.rows(examples) for name, examples in data.splits.items()}

    train_config, optim = config.train, config.optim
    n_batches = _plan(next(iter(rows.values())), train_config).n_batches
    if config.epochs is not None:
        steps = max(1, round(config.epochs * n_batches))
        train_config = dataclasses.replace(train_config, steps=steps, eval_every=n_batches)
    if config.warmup_fraction is not None:
        optim = dataclasses.replace(optim, warmup_steps=round(config.warmup_fraction * train_config.steps))
    return Prepared(data, objective, wanted, rows, train_config, optim)


def _tokenizer_and_shape(config: Config, train: Examples, folder: Path | None) -> tuple[Tokenizer, zoo.EncoderConfig]:
    if config.init is not None:
        model, tokenizer, _ = load_encoder(config.init)
        return tokenizer, model.config
    if folder is not None and (folder / FILE_NAME).is_file():
        tokenizer = restore_tokenizer(folder)
    else:
        texts = (text if isinstance(text, str) else " ".join(text) for text in [*train.texts, *(train.seconds or [])])
        tokenizer = load_tokenizer(config.data.tokenizer, texts, config.data.vocab_size)
    needed = special_tokens(tokenizer).vocab_size
    return tokenizer, runs.fit_vocabulary(config.model, needed, config.data.tokenizer)


def _plan(rows: LabelledRows, config: TrainConfig) -> Epochs:
    return Epochs(rows.texts.bucket, [config.batch_size] * len(rows.texts.lengths), seed=config.seed)


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    objective, rows = prepared.objective, list(prepared.rows.values())
    held_out = list(prepared.data.splits)[1]
    plan = _plan(rows[0], config.train)

    def init(rngs: nnx.Rngs) -> nnx.Module:
        if config.init is None or config.scratch:
            return build(prepared.encoder, rngs=rngs)
        return zoo.with_head(load_encoder(config.init).model, prepared.encoder, rngs=rngs)

    def make(step: int) -> Batch:
        return rows[0](plan(step))

    return Task(
        init=init,
        loss=objective.loss,
        batches=iter(make_batches(make)),
        evaluate=lambda model: evaluate(model, prepared, held_out, config.train.batch_size)[0],
        tokens_per_batch=sum(len(text.tokens) for text in rows[0].texts.texts) // plan.n_batches,
    )


def evaluate(model: Any, prepared: Prepared, split: str, batch_size: int) -> tuple[Scores, Predictions]:
    """Loss and metrics of a split, where it has labels, and what the model says of each of its examples."""
    examples, objective = prepared.data.splits[split], prepared.objective
    loss, logits = run_over(model, objective, prepared.rows[split], batch_size)
    predicted = objective.predictions(examples, logits)
    if examples.labels is None:
        return {}, predicted
    return {"loss": loss} | objective.scores(predicted.labels, examples.labels), predicted


def run_over(model: Any, objective: Objective, rows: LabelledRows, batch_size: int) -> tuple[float, list[np.ndarray]]:
    """The mean loss over rows (nan without labels), and the logits of each, in their order."""
    graphdef, variables = nnx.split(model)
    order = list(rows.texts.in_order_of_length(batch_size))
    outputs = jax.device_get([_outputs(graphdef, variables, rows(batch), objective.outputs) for batch in order])
    total, weight = (sum(float(loss[i]) for loss, _ in outputs) for i in (0, 1))
    logits = {
        int(row): values
        for batch, (_, batch_logits) in zip(order, outputs, strict=True)
        for row, values in zip(batch, batch_logits, strict=True)
        if row >= 0
    }
    return total / weight if weight else float("nan"), [logits[row] for row in range(len(rows))]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _outputs(graphdef, variables, batch, function):
    return function(nnx.merge(graphdef, variables), batch, None)


def default_run_dir(config: Config) -> Path:
    """runs/finetune/PRESET for a preset as it is, with a digest of the changes for a changed one, and "-seeds"."""
    return seeds.default_run_dir(config, PRESETS, "finetune", FREE)


def fit(config: Config, folder: Path, prepared: Prepared | None = None) -> Tuned:
    """Tunes a model with one seed in a folder, from the run's newest checkpoint where there is one.

    Args:
      prepared: what `prepare` gives for this configuration, whatever the seed. None: made here.

    Raises:
      UsageError: data, model or folder are not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    config = seeds.of_one(config)
    with flags.usage_errors():
        going_on = runs.holds_run(config, folder, FREE)
        prepared = prepared or prepare(config, folder if going_on else None)
        task = make_task(config, prepared)
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(prepared.objective.tokenizer, folder)
        runs.save_model_config(prepared.encoder, folder)
        save_target(prepared.objective.target, folder)
        flags.save_config(config, folder / "config.json")
    print(describe(prepared, folder), flush=True)
    train_config = dataclasses.replace(prepared.train, seed=config.train.seed)
    record = dataclasses.asdict(config) | {"encoder": dataclasses.asdict(prepared.encoder)}
    finished = train(task, train_config, prepared.optim, folder, record=record)
    if finished.stopped:
        return Tuned(finished.model, {}, {}, stopped=True)
    results = {
        name: evaluate(finished.model, prepared, name, config.train.batch_size) for name in list(prepared.rows)[1:]
    }
    scores = {name: scores for name, (scores, _) in results.items() if scores}
    predictions = {name: predicted for name, (_, predicted) in results.items()}
    write_results(folder, prepared, predictions)
    return Tuned(finished.model, scores, predictions, stopped=False)


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines."""
    sizes = ", ".join(f"{len(examples.texts):,} {name}" for name, examples in prepared.data.splits.items())
    target, rows = prepared.objective.target, next(iter(prepared.rows.values()))
    classes = f" of {len(target.classes)} classes" if target.classes else ""
    words = f"; {' '.join(target.words)} in {target.template!r}" if target.words else ""
    return (
        f"{prepared.encoder.pattern}: {count_params(prepared.encoder):,} parameters; {folder}\n"
        f"{target.kind}{classes}: {sizes}; rows {rows.texts.fill:.1%} text{words}"
    )


def write_results(folder: Path, prepared: Prepared, predictions: Mapping[str, Predictions]) -> None:
    """predictions.jsonl and confusion.png, of the rows that were kept for testing, or else those held out."""
    held_out, *tests = list(prepared.data.splits)[1:]
    splits, target = tests or [held_out], prepared.objective.target
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for split in splits:
            labels = prepared.data.splits[split].labels or [None] * len(predictions[split].labels)
            for row, said in enumerate(zip(labels, *predictions[split], strict=True)):
                label, predicted, scores = said
                record = {"split": split, "row": row, "label": label, "predicted": predicted, "scores": scores}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    split = next((name for name in splits if prepared.data.splits[name].labels is not None), held_out)
    if target.kind == "classification" and len(target.classes) <= 60:
        labels = prepared.data.splits[split].labels or []
        plot_confusion(predictions[split].labels, labels, target.classes, folder, split)


def fit_seeds(config: Config, folder: Path) -> list[Tuned]:
    """A run for each seed: in the folder itself where there is one, else in its seed-0, seed-1, ...

    Ends at the first run that is stopped. The table of them is in the folder's results.json.

    Raises:
      UsageError, FloatingPointError: as `fit`.
    """
    if len(config.seeds) > 1:

        def keep(prepared: Prepared) -> None:
            save_tokenizer(prepared.objective.tokenizer, folder)

        tuned = seeds.fit_several(config, folder, prepare=prepare, fit=fit, free=FREE, keep=keep)
    else:
        tuned = [fit(config, folder)]
    if not tuned[-1].stopped:
        seeds.save_summary(folder, config.seeds or (config.train.seed,), [run.scores for run in tuned])
    return tuned


def main() -> int:
    """Tunes, evaluates and shows a table."""
    config = flags.parse(PRESETS, prog="python -m experiments.bert finetune", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    tuned = fit_seeds(config, folder)
    if tuned[-1].stopped:
        return 0
    rows: dict[str, Mapping[str, seeds.Summary]] = dict(seeds.summarise([run.scores for run in tuned]))
    with flags.usage_errors():
        if config.baseline:
            counted = baselines.bag_of_words(load_labelled(config.data, config.kind))
            rows |= {
                f"{split}, counting words": {name: seeds.Summary(value, None) for name, value in scores.items()}
                for split, scores in counted.items()
            }
        lines = seeds.table(rows, config.metrics)
    several = f", mean of {len(tuned)} seeds ± their standard deviation" if len(tuned) > 1 else ""
    print(f"after the last step{several}:")
    print("\n".join(f"  {line}" for line in lines))
    print(f"run folder: {folder} (results.json, predictions.jsonl, confusion.png, curves.png, checkpoints)")
    return 0


def predict(
    folder: str | Path,
    texts: Sequence[Any],
    seconds: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    step: Any = "latest",
) -> Predictions:
    """What a tuned model says of some texts.

    Args:
      folder: of a run of one seed.
      texts: strings; for tags, lists of words; for answers, questions.
      seconds: the second texts of pairs; the contexts of questions.
      step: which checkpoint: a step, "latest" or "best".

    Raises:
      FileNotFoundError: no tuned model in the folder.
      ValueError: a string where texts are expected, or seconds that are not as many.
    """
    folder = Path(folder)
    target = load_target(folder)
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {texts!r:.40}, expected a list of texts")
    if target.kind == "span-qa" and seconds is None:
        raise ValueError("seconds=None, expected the contexts that the answers are in")
    if seconds is not None and len(seconds) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(seconds)} seconds, expected as many")
    if not len(texts):
        return Predictions([], [])
    model, tokenizer, _ = load_encoder(folder, step=step)
    objective = make_objective(target, tokenizer, pad_to_max=not model.config.mask_padding)
    examples = Examples(list(texts), None if seconds is None else list(seconds), None)
    _, logits = run_over(model, objective, objective.rows(examples), batch_size)
    return objective.predictions(examples, logits)
