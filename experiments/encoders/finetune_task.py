"""Fine-tuning as a task of the loop: what its runs share, batches, and how good a model is on a split."""

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

import zoo
from experiments.data.labelled import Examples, Labelled, load_labelled
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import FILE_NAME, Tokenizer, check_same, load_tokenizer, restore_tokenizer
from experiments.encoders.class_weights import balance
from experiments.encoders.finetune_presets import Config
from experiments.encoders.lengths import check_lengths
from experiments.encoders.load import load_encoder
from experiments.encoders.objectives import LabelledRows, Objective, Predictions, Target, make_objective
from experiments.encoders.prediction import run_over
from experiments.encoders.verbaliser import choose
from experiments.loop import runs
from experiments.loop.duration import in_steps
from experiments.loop.few_bits import say_codes
from experiments.loop.optim import OptimConfig
from experiments.loop.starting import check_agreement, load_start, options
from experiments.loop.summary import Scores
from experiments.loop.train import Task, TrainConfig
from zoo.models.build import build


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
    start: Path | None
    """Where the encoder lies that is tuned: --init, or a run that goes on. None: it is fresh."""


def prepare(config: Config, folder: Path | None = None, *, given: Collection[str] = ()) -> Prepared:
    """Reads the data and puts it in rows.

    Args:
      folder: of a run that goes on, which has its tokenizer and its model.
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.
    """
    data = load_labelled(config.data, config.kind)
    first = next(iter(data.splits.values()))
    if config.head == "mlm" and data.kind != "classification":
        raise ValueError(f"--head mlm puts a word in place of [MASK]; it cannot say --kind {data.kind}")
    tokenizer, encoder, start = _tokenizer_and_shape(config, first, folder, given)
    if config.head == "mlm" and special_tokens(tokenizer).mask >= encoder.padded_vocab_size:
        raise ValueError(f"--head mlm with --init {config.init}: its tokenizer has no token to hide others behind")
    if config.dropout is not None:
        encoder = dataclasses.replace(encoder, dropout=config.dropout)
    check_lengths(encoder, config.max_len, "--max-len")

    pairs = first.seconds is not None
    target = Target(data.kind, config.head, data.classes, max_len=config.max_len, stride=config.stride, pairs=pairs)
    if data.kind == "regression":
        numbers = np.array(first.labels)
        target = dataclasses.replace(target, mean=float(numbers.mean()), std=float(numbers.std()) or 1.0)
    if data.kind == "span-qa":
        target = dataclasses.replace(target, may_be_none=any(not answers["text"] for answers in first.labels or []))
    if config.head == "mlm":
        words = None if config.verbaliser is None else config.verbaliser.split()
        chosen = choose(tokenizer, data.classes, words=words, template=config.template, pairs=pairs)
        target = dataclasses.replace(target, words=chosen.words, word_ids=chosen.ids, template=chosen.template)
    objective = make_objective(target, tokenizer, pad_to_max=not encoder.mask_padding)
    wanted = objective.config(encoder, pool=config.pool, dropout=config.classifier_dropout)
    rows = {name: objective.rows(examples) for name, examples in data.splits.items()}
    if config.class_weights == "balanced":
        balance(next(iter(rows.values())), data.kind, len(data.classes))
    train_config, optim = in_steps(config, _plan(next(iter(rows.values())), config.train).n_batches)
    return Prepared(data, objective, wanted, rows, train_config, optim, start)


def _tokenizer_and_shape(
    config: Config, train: Examples, folder: Path | None, given: Collection[str]
) -> tuple[Tokenizer, zoo.EncoderConfig, Path | None]:
    """The tokenizer, the encoder's config, and where its parameters lie unless they are fresh."""
    if config.init is not None:
        load = functools.partial(load_encoder, masters=config.quantize.bits > 0)
        model, tokenizer, start = load_start(config.init, folder, load)
        if not config.scratch:
            say_codes(config.init, model, config.adapt)
        if folder is None:
            check_agreement(config.init, config.model, model.config, given)
            if "data.tokenizer" in given:
                check_same(config.data.tokenizer, tokenizer, flag="--data.tokenizer", source=config.init)
        encoder = dataclasses.replace(model.config, **options(config.model, given))
        return tokenizer, encoder, None if config.scratch else start
    if folder is not None and (folder / FILE_NAME).is_file():
        tokenizer = restore_tokenizer(folder)
    else:
        texts = (text if isinstance(text, str) else " ".join(text) for text in [*train.texts, *(train.seconds or [])])
        tokenizer = load_tokenizer(config.data.tokenizer, texts, config.data.vocab_size)
    needed = special_tokens(tokenizer).vocab_size
    return tokenizer, runs.fit_vocabulary(config.model, needed, config.data.tokenizer), None


def _plan(rows: LabelledRows, config: TrainConfig) -> Epochs:
    return Epochs(rows.texts.bucket, [config.batch_size] * len(rows.texts.lengths), seed=config.seed)


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    objective, rows = prepared.objective, list(prepared.rows.values())
    held_out = list(prepared.data.splits)[1]
    plan = _plan(rows[0], config.train)

    def init(rngs: nnx.Rngs) -> nnx.Module:
        if prepared.start is None:
            return build(prepared.encoder, rngs=rngs)
        return zoo.with_head(
            load_encoder(prepared.start, masters=config.quantize.bits > 0).model, prepared.encoder, rngs=rngs
        )

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
