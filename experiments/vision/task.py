"""Image classification as a task of the loop: what its runs share, batches, the loss, and how good a model is."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments.data.augment import Preprocess, mix
from experiments.data.images import Images, LabelledImages, load_images
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.repeats import RepeatedEpochs
from experiments.encoders.class_weights import weights_of
from experiments.loop.duration import in_steps
from experiments.loop.few_bits import say_codes
from experiments.loop.optim import OptimConfig
from experiments.loop.starting import check_agreement, load_start, options
from experiments.loop.summary import Scores
from experiments.loop.train import Loss, Task, TrainConfig, with_auxiliary
from experiments.vision.load import load_model
from experiments.vision.meaning import Meaning, read_preprocess
from experiments.vision.prediction import logits_of
from experiments.vision.presets import Config


class Prepared(NamedTuple):
    """What the runs of all seeds share."""

    data: LabelledImages
    model: zoo.ImageClassifierConfig
    preprocess: Preprocess
    train: TrainConfig
    optim: OptimConfig
    """With numbers of steps for epochs and shares."""
    start: Path | None
    """Where the model lies that is tuned: --init, or a run that goes on. None: it is fresh."""

    @property
    def meaning(self) -> Meaning:
        """What the model's folder says of its inputs and outputs."""
        return Meaning(self.preprocess.config, self.preprocess.size, self.data.classes)


def prepare(config: Config, folder: Path | None = None, *, given: Collection[str] = ()) -> Prepared:
    """Finds the images, and the shape of the model that classifies them.

    Args:
      folder: of a run that goes on, which has its model.
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.
    """
    data = load_images(config.data)
    model, preprocess, start = config.model, config.preprocess, None
    if config.init is not None:
        load = functools.partial(load_model, masters=config.quantize.bits > 0)
        loaded, start = load_start(config.init, folder, load)
        if not config.evaluate_only:
            say_codes(config.init, loaded, config.adapt)
        model = dataclasses.replace(loaded.config, **options(config.model, given))
        preprocess = read_preprocess(start, preprocess)
        if config.drop_path is not None:
            model = dataclasses.replace(model, drop_path=config.drop_path)
    n_classes = len(data.classes)
    if config.init is None and model.n_classes not in (0, n_classes):
        raise ValueError(
            f"--model.n-classes {model.n_classes}, but {data.where} has {n_classes} classes; set it to 0 to take theirs"
        )
    if config.evaluate_only and model.n_classes != n_classes:
        raise ValueError(f"--init {config.init} has {model.n_classes} classes, {data.where} has {n_classes}")
    model = dataclasses.replace(model, n_classes=n_classes)
    if config.init is not None and folder is None:
        check_agreement(config.init, config.model, model, given)
    size = config.image_size or model.image_size
    rows, columns = model.grid_of(size, size)
    if model.max_tokens is not None and rows * columns + model.n_tokens > model.max_tokens:
        raise ValueError(
            f"images of {size} x {size} pixels are {rows * columns + model.n_tokens} tokens, --model.m2.l-max "
            f"{model.max_tokens}: filters are at most l-max long"
        )
    n_batches = -(-len(next(iter(data.splits.values())).labels) // config.train.batch_size)
    train_config, optim = in_steps(config, n_batches, eval_epochs=config.eval_epochs)
    images = Preprocess(preprocess, size, model.channels, config.augment)
    return Prepared(data, model, images, train_config, optim, start)


def training_batch(images: Images, rows: np.ndarray, preprocess: Preprocess, seed: int, step: int) -> Batch:
    """The batch of a step: its images, changed at random and mixed. Row -1 is filled with one of the others."""
    random = np.random.default_rng((seed % (1 << 64), 1, step))
    rows = np.where(rows < 0, random.choice(rows[rows >= 0], len(rows)), rows)
    keys = [np.random.default_rng((seed % (1 << 64), 2, step, place)) for place in range(len(rows))]
    arrays = np.stack([preprocess(images.read(int(row)), key) for row, key in zip(rows, keys, strict=True)])
    labels = images.labels[rows]
    return {"labels": labels} | mix(arrays, labels, preprocess.augment, random)._asdict()


def image_loss(
    model: Any,
    batch: Mapping[str, Any],
    rngs: nnx.Rngs | None,
    *,
    smoothing: float,
    class_weights: np.ndarray | None = None,
) -> Loss:
    """Cross-entropy of the classes of both images that each image is made of, by their shares.

    Args:
      class_weights: (k,) what an image of each class counts. None: 1.
    """
    hidden, auxiliary = model.run(batch["images"], rngs=rngs)
    logits = model.read(hidden)

    def nats(labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    share = batch["share"]
    if class_weights is not None:
        first, other = (jnp.asarray(class_weights)[batch[name]] for name in ("labels", "partners"))
        first, other = share * first, (1 - share) * other
        total = jnp.sum(first * nats(batch["labels"]) + other * nats(batch["partners"]))
        return with_auxiliary(Loss(total, jnp.sum(first + other)), model, auxiliary)
    each = share * nats(batch["labels"]) + (1 - share) * nats(batch["partners"])
    return with_auxiliary(Loss(jnp.sum(each), jnp.float32(len(each))), model, auxiliary)


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    train_images, held_out = list(prepared.data.splits.values())[:2]
    seed, batch_size = config.train.seed, config.train.batch_size
    n, repeats = len(train_images.labels), config.augment.repeats
    plan = (
        Epochs(np.zeros(n, int), [batch_size], seed=seed)
        if repeats == 1
        else RepeatedEpochs(n, batch_size, repeats, seed=seed)
    )
    counts = np.bincount(train_images.labels, minlength=len(prepared.data.classes))
    weights = weights_of(counts) if config.class_weights == "balanced" else None

    load = functools.partial(load_model, masters=config.quantize.bits > 0)

    def init(rngs: nnx.Rngs) -> nnx.Module:
        if prepared.start is None:
            return zoo.ImageClassifier(prepared.model, rngs=rngs)
        return zoo.with_head(load(prepared.start)[0], prepared.model, rngs=rngs)

    def make(step: int) -> Batch:
        return training_batch(train_images, plan(step), prepared.preprocess, seed, step)

    return Task(
        init=init,
        loss=functools.partial(image_loss, smoothing=config.augment.smoothing, class_weights=weights),
        batches=iter(make_batches(make, threads=config.threads, prefetch=2 * config.threads)),
        evaluate=lambda model: score(logits_of(model, held_out, prepared.preprocess, config), held_out.labels),
        tokens_per_batch=batch_size,
        unit="images",
    )


def score(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """loss in nats, accuracy, and top5: how often the class is among the five likeliest of more than five."""
    rows = np.arange(len(labels))
    above = (logits > logits[rows, labels][:, None]).sum(axis=1)
    scores = {"loss": float(np.mean(nats(logits, labels))), "accuracy": float(np.mean(above == 0))}
    return scores | ({"top5": float(np.mean(above < 5))} if logits.shape[1] > 5 else {})


def nats(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) cross-entropies."""
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels)))
