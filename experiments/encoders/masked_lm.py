"""Masked language modelling: any pattern of mixers that looks both ways, any text.

    python -m experiments.bert pretrain tiny                                  # M2-BERT on Python's standard library
    python -m experiments.bert pretrain tiny --model.pattern mamba2           # the same with Mamba-2 in both directions
    python -m experiments.bert pretrain tiny --model.pattern attn/mlp         # with attention
    python -m experiments.bert pretrain small --data.path texts/              # your own text
    python -m experiments.bert pretrain m2-bert-80m --data.path texts/        # a published size, for accelerators
    python -m experiments.bert pretrain tiny --init SRC --data.path texts/    # goes on with a run or a published model
    python -m experiments.bert pretrain tiny --model.pattern m2/moe --model.moe.n-tasks 2 --data.path A --tasks B
                                                                              # two texts, a router for each

The same command again resumes the run where it was. `python -m experiments.bert finetune --init RUN_DIR ...` goes on
with what it has learned.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.data.corpus import Corpus, DataConfig, load_corpus
from experiments.data.packing import Batch, Epochs, Layout, Rows, make_batches
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import check_same, save_tokenizer
from experiments.encoders.guesses import guesses
from experiments.encoders.lengths import check_lengths, reach
from experiments.encoders.load import load_encoder
from experiments.encoders.masked_loss import masked_loss, masked_sums
from experiments.encoders.masking import Masking, MaskingConfig
from experiments.encoders.several_texts import check_texts, inputs_of, joined, load_texts
from experiments.encoders.shapes import small_encoder
from experiments.loop import flags, runs
from experiments.loop.few_bits import QuantizeConfig, in_few_bits, say_codes
from experiments.loop.mesh import MeshConfig, check_length, current_mesh, meshed
from experiments.loop.metrics import last_evaluation
from experiments.loop.model_size import describe_size
from experiments.loop.optim import OptimConfig
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.starting import check_agreement, load_start, with_options
from experiments.loop.train import Finished, Task, TrainConfig, mean_of, sum_over, train


@dataclasses.dataclass(frozen=True)
class Config:
    """A masked language model: its shape, its text, its masks, its training."""

    model: zoo.MaskedLMConfig = zoo.MaskedLMConfig()
    """Shape of the model. vocab_size 0 takes the tokenizer's, with room for the special tokens that it lacks."""
    data: DataConfig = DataConfig()
    """Text and tokens."""
    tasks: tuple[str, ...] = ()
    """Paths of more texts, whose rows are in every batch, too. With --model.moe.n-tasks as many as there are texts,
    mixtures of experts have a router for each."""
    rows: Layout = "packed"
    """packed: several documents a row, which never see each other. padded: one a row. buckets: one a row, in batches of
    rows of similar length, cut to a power of two; what suits long convolutions, for which packing costs more."""
    masking: MaskingConfig = MaskingConfig()
    """Which tokens are hidden, and behind what."""
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Few bits that weights are read in, and the model is trained for; see `zoo.quantize`."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    init: str | None = None
    """A run, a published folder or a hub name to go on from: its shape and tokenizer replace --model and
    --data.tokenizer, flags that say otherwise are refused, and its table of positions grows to --data.seq-len by
    repetition. --model.dropout, dtype, param-dtype, remat, remat-keeps and scan-layers may be said."""
    eval_batches: int | None = 50
    """Batches of held-out text an evaluation reads, spread evenly over it. None reads all of it."""
    examples: int = 3
    """Held-out sentences that are printed at the end with the model's guesses. 0 prints none."""
    run_dir: str | None = None
    """Folder of the run. None: runs/bert/PRESET, with a suffix that depends on the flags that were changed."""


def _published(name: str, rate: float, *, batch: int = 4096, steps: int = 70_000, length: int = 128, **optim) -> Config:
    # Sources: the yamls of HazyResearch/m2 and MosaicBERT: linear to 0.02 of the peak after 6 % warm-up, betas 0.9 and
    # 0.98, eps 1e-6, clip 1. Their decoupled decay of 1e-5 a step at the peak is AdamW's 1e-5 / rate.
    model = cast(zoo.MaskedLMConfig, zoo.presets[name])
    recipe: dict[str, Any] = {"schedule": "linear", "warmup_steps": round(0.06 * steps), "final_fraction": 0.02} | optim
    return Config(
        model=model,
        data=DataConfig(tokenizer="wordpiece", bpe_vocab_size=model.vocab_size, seq_len=length),
        rows="padded" if name.startswith("m2") else "packed",
        train=TrainConfig(steps=steps, batch_size=batch, eval_every=2000, save_every=500),
        optim=OptimConfig(learning_rate=rate, weight_decay=1e-5 / rate, beta2=0.98, eps=1e-6, **recipe),
    )


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "An encoder of 0.8 M parameters on Python's standard library: two minutes on two CPU cores, no downloads.",
        Config(
            model=small_encoder(96, 3, 128),
            data=DataConfig(tokenizer="wordpiece", bpe_vocab_size=4096, seq_len=128),
            train=TrainConfig(steps=400, batch_size=16, eval_every=200, save_every=200),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=40),
        ),
    ),
    "small": (
        "An encoder of 2 M parameters and 8,192 WordPieces, 4 M tokens of text: 15 minutes on a CPU core.",
        Config(
            model=small_encoder(128, 4, 512),
            data=DataConfig(tokenizer="wordpiece", bpe_vocab_size=8192, seq_len=128),
            rows="buckets",
            train=TrainConfig(steps=1000, batch_size=32, eval_every=250, save_every=250),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, final_fraction=0.02),
        ),
    ),
}
_PUBLISHED = {
    **{f"m2-bert-{size}": _published(f"m2-bert-{size}", 8e-4) for size in ("80m", "110m", "260m", "341m")},
    "m2-bert-341m-2k": _published("m2-bert-341m-2k", 5e-4, batch=256, length=2048),
    "mosaicbert-base": _published("mosaicbert-base", 5e-4),
    # Warner et al. 2024, arXiv:2412.13663: 1.7 T tokens, 3 B of them warm-up. Their optimiser clips each tensor's
    # update instead of the gradient, and their batch grows over the first 50 B tokens: neither is done here.
    "modernbert-base": _published(
        "modernbert-base",
        8e-4,
        batch=4608,
        steps=360_000,
        length=1024,
        schedule="trapezoid",
        warmup_steps=636,
        final_fraction=0.0,
    ),
    # Ours: M2-BERT's recipe.
    "bimamba-base": _published("bimamba-base", 8e-4),
    "bimamba2-base": _published("bimamba2-base", 8e-4),
}
PRESETS |= {
    name: (f"The shape and recipe of {name}, on your text; for accelerators.", config)
    for name, config in _PUBLISHED.items()
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("eval_batches", "examples", "data.cache_dir", "data.skip_bad")


def masked_batch(rows: Rows, masking: Masking, indices: np.ndarray, random: np.random.Generator, rate: float) -> Batch:
    """The batch of some rows, with tokens hidden."""
    batch = rows(indices)
    masked = masking(batch["tokens"], random, rate=rate)
    return batch | masked._asdict()


def make_rows(config: Config, corpus: Corpus) -> tuple[Rows, Rows]:
    """The training text and the held-out text as rows. Packing a large text takes a while: once is enough."""
    make = functools.partial(
        Rows, special=special_tokens(corpus.tokenizer), seq_len=config.data.seq_len, layout=config.rows
    )
    return make(corpus.train), make(corpus.validation)


def make_task(
    config: Config, corpus: Corpus, rows: Rows, held_out: Rows, init: Any = None, number: int | None = None
) -> Task:
    """The task of a configuration whose vocabulary is known.

    Args:
      rows, held_out: from `make_rows`.
      init: a model to go on from, or None.
      number: of the text among several, of which a batch has its share of rows. None: there is this one alone.
    """
    masking = Masking(config.masking, corpus.tokenizer)
    seed, batch_size = config.train.seed, config.train.batch_size // (1 if number is None else 1 + len(config.tasks))

    def said(batch: Batch) -> Batch:
        return batch if number is None else batch | {"task": np.full(len(batch["tokens"]), number, np.int32)}

    multiple = jax.device_count() * config.train.accumulate
    plan = Epochs(rows.bucket, rows.rows_per_batch(batch_size, multiple), seed=seed)

    def make(step: int) -> Batch:
        random = np.random.default_rng((seed % (1 << 64), 1, step))
        return said(masked_batch(rows, masking, plan(step), random, config.masking.rate))

    # Every evaluation hides the same tokens.
    order = Epochs(held_out.bucket, held_out.rows_per_batch(batch_size, multiple), seed=0)
    n_batches = min(order.n_batches, config.eval_batches or order.n_batches)

    def make_held_out(number: int) -> Batch:
        step = number * order.n_batches // n_batches
        random = np.random.default_rng((0, 2, step))
        return said(masked_batch(held_out, masking, order(step), random, config.masking.eval_rate))

    def evaluate(model):
        sums = sum_over(model, masked_sums, make_batches(make_held_out, n_batches=n_batches, prefetch=4))
        loss = mean_of(sums.total, sums.weight)
        return {"loss": loss, "accuracy": mean_of(sums.correct, sums.weight)} | describe(loss)

    return Task(
        init=lambda rngs: zoo.MaskedLM(config.model, rngs=rngs) if init is None else init,
        loss=masked_loss,
        batches=iter(make_batches(make)),
        evaluate=evaluate,
        describe=describe,
        tokens_per_batch=rows.n_tokens // plan.n_batches,
    )


def describe(loss: float) -> dict[str, float]:
    """A loss in the unit people compare."""
    return {"perplexity": math.exp(min(loss, 700))}


def default_run_dir(config: Config) -> Path:
    """runs/bert/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "bert", FREE)


def start_from(
    config: Config, kept: Path | None = None, given: Collection[str] = ()
) -> tuple[Config, zoo.MaskedLM | None]:
    """Takes model and tokenizer from --init, where there is one, with room for rows of --data.seq-len.

    Args:
      kept: the run's folder, where it goes on.
      given: the fields that flags name.

    Raises:
      ValueError: flags say otherwise.
    """
    if config.init is None:
        return config, None
    model, tokenizer, folder = load_start(
        config.init, kept, functools.partial(load_encoder, masters=config.quantize.bits > 0)
    )
    say_codes(config.init, model)
    model = zoo.dequantize(model)
    if kept is None and "data.tokenizer" in given:
        check_same(config.data.tokenizer, tokenizer, flag="--data.tokenizer", source=config.init)
    if not isinstance(model, zoo.MaskedLM):
        model = zoo.with_head(model, zoo.MaskedLMConfig, rngs=nnx.Rngs(params=jax.random.key(config.train.seed)))
    model = with_options(reach(model, config.data.seq_len), config.model, given)
    if kept is None:
        check_agreement(config.init, config.model, model.config, given)
    data = dataclasses.replace(config.data, tokenizer=str(folder))
    return dataclasses.replace(config, model=model.config, data=data), model


@locked
@meshed
def fit(config: Config, folder: Path, *, given: Collection[str] = ()) -> tuple[Finished, Corpus]:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Args:
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.

    Raises:
      UsageError: the text, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        check_length(current_mesh(), config.data.seq_len)
        kept = runs.resumed(config, folder, FREE)
        started, init = start_from(config, kept, given)
        corpus = load_corpus(started.data, kept)
        needed = special_tokens(corpus.tokenizer).vocab_size
        model = runs.fit_vocabulary(started.model, needed, started.data.tokenizer)
        fitted = dataclasses.replace(started, model=model)
        check_lengths(fitted.model, fitted.data.seq_len)
        check_texts(fitted.tasks, fitted.model, fitted.train.batch_size, fitted.rows)
        corpora = load_texts(corpus, started.data, fitted.tasks)
        rows = [make_rows(fitted, each) for each in corpora]
        task = joined(
            [
                make_task(fitted, each, *of_each, init, i if fitted.tasks else None)
                for i, (each, of_each) in enumerate(zip(corpora, rows, strict=True))
            ]
        )
        fresh = init is None
        task, save_bits = in_few_bits(task, config.quantize, folder, seed=config.train.seed, fresh=fresh)
        save_tokenizer(corpus.tokenizer, folder)
        runs.begin(config, folder, fitted.model, inputs_of(corpora))
    print(describe_size(fitted.model, folder), flush=True)
    save_bits()
    for each, (trained, _) in zip(corpora, rows, strict=True):
        print(f"{each.train.n_tokens:,} tokens; {fitted.rows} rows, {trained.fill:.1%} of them text", flush=True)
    return train(task, config.train, config.optim, folder, record=dataclasses.asdict(fitted)), corpus


def main() -> int:
    """Trains, evaluates and guesses."""
    config = flags.parse(PRESETS, prog="python -m experiments.bert pretrain", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    finished, corpus = fit(config, folder, given=flags.given(Config))
    if finished.stopped:
        return 0
    step = int(finished.state.step)
    lines = []
    if last := last_evaluation(folder):
        lines.append(
            f"held-out text: loss {last['loss']:.3f} nats a hidden token, {last['accuracy']:.1%} guessed right, "
            f"after {last['step']} steps"
        )
    model: Any = finished.model
    model = zoo.of_task(model, 0) if model.config.moe.n_tasks > 1 else model
    lines += guesses(model, corpus, config.examples)
    show_end(folder, lines, "curves.png, metrics.jsonl, tensorboard, checkpoints")
    print(flags.as_called(f"tune it:    python -m experiments.bert finetune tiny --init {folder}"))
    print(f"train on:   the same command with --steps {2 * max(step, config.train.steps)} resumes from step {step}")
    return 0
