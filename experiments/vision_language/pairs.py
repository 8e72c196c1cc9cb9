"""Contrastive training as a task of the loop: pairs of images and captions, and how well each finds the other."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.data.augment import Preprocess
from experiments.data.image_texts import Found, ImageTexts, load_image_texts
from experiments.data.packing import Epochs, make_batches
from experiments.data.pictures import from_array
from experiments.data.scenes import COLOURS, PLACES, SHAPES, Thing, draw_scene
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import Tokenizer, load_tokenizer
from experiments.loop.duration import in_steps
from experiments.loop.mesh import current_mesh, gathered, placed, spread
from experiments.loop.optim import OptimConfig
from experiments.loop.summary import Scores
from experiments.loop.train import LossFunction, Task, TrainConfig, mean_loss
from experiments.vision_language.contrast import Kind, Towers, contrastive_loss
from experiments.vision_language.contrast_presets import Config


class Captions:
    """Pairs of a split as arrays: images (b, x, y, c), tokens and mask (b, l), and text_ids (b), equal where texts are.

    Args:
      data: examples, of which captions are taken.
      tokenizer, special: of the texts.
      preprocess: from an image to an array.
      text_len: most tokens of a text; longer ones are cut. None: the longest.
    """

    def __init__(
        self,
        data: ImageTexts,
        tokenizer: Tokenizer,
        special: SpecialTokens,
        preprocess: Preprocess,
        text_len: int | None = None,
    ):
        self.data, self.preprocess, self.tokenizer, self.special = data, preprocess, tokenizer, special
        self.examples = [example for example in data.examples if example.kind == "caption"]
        self.texts = [example.answer for example in self.examples]
        number = {text: i for i, text in enumerate(dict.fromkeys(self.texts))}
        self.text_ids = np.array([number[text] for text in self.texts], np.int32)
        """(n,) equal where texts are."""
        rows = [special.row(row) for row in tokenizer.encode_batch(self.texts)]
        self.text_len = text_len or max(map(len, rows), default=1)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.examples)

    def as_arrays(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        """tokens and mask of rows of ids."""
        tokens = np.full((len(rows), self.text_len), self.special.pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            size = min(len(row), self.text_len)
            tokens[i, :size], mask[i, :size] = row[:size], True
        return {"tokens": tokens, "mask": mask}

    def encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        """tokens and mask of any texts."""
        return self.as_arrays([self.special.row(row) for row in self.tokenizer.encode_batch(texts)])

    def __call__(self, rows: Any) -> dict[str, np.ndarray]:
        """The batch of some pairs; row -1 is none."""
        there = [max(int(row), 0) for row in rows]
        images = [self.preprocess(self.data.read(self.examples[i].image)) for i in there]
        ids = np.where(np.asarray(rows) < 0, -1, self.text_ids[there]).astype(np.int32)
        texts = self.as_arrays([self.rows[i] for i in there])
        return {"images": np.stack(images).astype(np.float32), "text_ids": ids} | texts


class Prepared(NamedTuple):
    """What the runs of all seeds share."""

    data: Found
    images: zoo.ImageClassifierConfig
    texts: zoo.SequenceClassifierConfig
    tokenizer: Tokenizer
    preprocess: Preprocess
    pairs: tuple[Captions, Captions]
    """To train on, and held out."""
    train: TrainConfig
    optim: OptimConfig


def prepare(config: Config, folder: Path | None = None) -> Prepared:
    """Finds images and captions, the tokenizer, and the shapes of both encoders.

    Args:
      folder: of a run that goes on, which has its tokenizer.
    """
    data = load_image_texts(config.data)
    texts = [example.answer for example in data.train.examples if example.kind == "caption"]
    if not texts:
        raise ValueError(f"{data.where}: there are no captions to learn from")
    tokenizer = load_tokenizer(config.tokenizer, texts, config.bpe_vocab_size, folder)
    special = special_tokens(tokenizer)
    images = dataclasses.replace(config.images, n_classes=config.d_embed)
    vocab_size = config.texts.vocab_size or special.vocab_size
    if vocab_size < special.vocab_size:
        raise ValueError(f"--texts.vocab-size {vocab_size}, expected at least the tokenizer's {special.vocab_size}")
    encoder = dataclasses.replace(config.texts, n_labels=config.d_embed, vocab_size=vocab_size)
    preprocess = Preprocess(config.preprocess, images.image_size, images.channels)
    train = Captions(data.train, tokenizer, special, preprocess, config.text_len)
    held_out = Captions(data.held_out, tokenizer, special, preprocess, train.text_len)
    if encoder.max_len is not None and train.text_len > encoder.max_len:
        raise ValueError(f"captions of {train.text_len} tokens, expected at most --texts.max-len {encoder.max_len}")
    if not len(held_out):
        raise ValueError(f"{data.where}: there are no captions to evaluate on")
    steps, optim = in_steps(config, -(-len(train) // config.train.batch_size))
    return Prepared(data, images, encoder, tokenizer, preprocess, (train, held_out), steps, optim)


@functools.cache
def loss_of(kind: Kind, mini_batch: int | None = None) -> LossFunction:
    """The loss of a batch: the same object each time, so that what evaluates it is compiled once."""
    return functools.partial(contrastive_loss, kind=kind, mini_batch=mini_batch)


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    pairs, held_out = prepared.pairs
    plan = Epochs(np.zeros(len(pairs), int), [config.train.batch_size], seed=config.train.seed)

    def init(rngs: nnx.Rngs) -> Towers:
        images = zoo.ImageClassifier(prepared.images, rngs=rngs)
        return Towers(images, zoo.SequenceClassifier(prepared.texts, rngs=rngs), config.loss)

    return Task(
        init=init,
        loss=loss_of(config.loss, config.mini_batch),
        batches=iter(make_batches(lambda step: pairs(plan(step)), threads=config.threads, prefetch=2 * config.threads)),
        evaluate=lambda towers: evaluate(towers, held_out, config),
        tokens_per_batch=config.train.batch_size,
        unit="images",
    )


@functools.partial(jax.jit, static_argnums=0)
def _image_vectors(graphdef, variables, batch):
    return nnx.merge(graphdef, variables).of_images(batch["images"])[0]


@functools.partial(jax.jit, static_argnums=0)
def _text_vectors(graphdef, variables, batch):
    return nnx.merge(graphdef, variables).of_texts(batch["tokens"], batch["mask"])[0]


def vectors(towers: Any, batches: list[dict[str, np.ndarray]], of: Any) -> np.ndarray:
    """(n, d) vectors of images or texts, batch by batch of equal size.

    Args:
      of: `_image_vectors` or `_text_vectors`.
    """
    graphdef, variables = nnx.split(towers)
    mesh = current_mesh()
    variables = placed(variables, mesh)
    with jax.set_mesh(mesh):
        parts = [of(graphdef, variables, spread(batch, mesh)) for batch in batches]
    return np.concatenate(gathered(parts))


def in_batches(arrays: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Rows in batches of one size, the last filled up with its first row."""
    n = len(next(iter(arrays.values())))
    rows = np.append(np.arange(n), np.zeros(-n % size, int)).reshape(-1, size)
    return [{name: values[some] for name, values in arrays.items()} for some in rows]


def recalls(scores: np.ndarray, right: np.ndarray, at: tuple[int, ...] = (1, 5)) -> Scores:
    """How often one of the k best columns is right, of each row: r1, r5."""
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(right, order, axis=1)
    return {f"r{k}": float(hits[:, :k].any(axis=1).mean()) for k in at}


def evaluate(towers: Any, held_out: Captions, config: Config) -> Scores:
    """The loss of batches held out, retrieval both ways, and of scenes zero-shot classification."""
    size = config.train.batch_size
    numbers = np.append(np.arange(len(held_out)), np.full(-len(held_out) % size, -1)).reshape(-1, size)
    batches = [held_out(rows) for rows in numbers]
    images = vectors(towers, batches, _image_vectors)[: len(held_out)]
    texts = vectors(towers, batches, _text_vectors)[: len(held_out)]
    first = np.unique(held_out.text_ids, return_index=True)[1]
    right = held_out.text_ids[:, None] == held_out.text_ids[first]
    found = images @ texts[first].T
    scores = {"loss": mean_loss(towers, loss_of(config.loss), batches)}
    scores |= {f"image to text {name}": value for name, value in recalls(found, right).items()}
    scores |= {f"text to image {name}": value for name, value in recalls(found.T, right.T).items()}
    if config.data.path is None and config.data.hub is None:
        scores["zero-shot"] = zero_shot_scenes(towers, held_out, config)
    return scores


def class_vectors(towers: Any, prompts: list[list[str]], captions: Captions, size: int) -> np.ndarray:
    """(k, d) a vector for each class: the mean of those of its texts, scaled to length 1 (CLIP's prompt ensembles).

    Args:
      prompts: texts of each class, of all as many.
      captions: what texts are encoded with.
      size: rows in a batch.
    """
    flat = [text for texts in prompts for text in texts]
    found = vectors(towers, in_batches(captions.encode(flat), size), _text_vectors)[: len(flat)]
    mean = found.reshape(len(prompts), -1, found.shape[-1]).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zero_shot_scenes(towers: Any, captions: Captions, config: Config) -> float:
    """Accuracy over colour and shape of scenes with one thing in them: a class is told by captions alone."""
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = [[f"{place} a {colour} {shape}." for place in PLACES] for colour, shape in classes]
    size = config.data.scene_size
    scenes = [(Thing(place, shape, colour),) for colour, shape in classes for place in range(len(PLACES))]
    pictures = [draw_scene(scene, size, 10**6 + i, held_out=True) for i, scene in enumerate(scenes)]
    arrays = np.stack([captions.preprocess(from_array(picture)) for picture in pictures]).astype(np.float32)
    batches = in_batches({"images": arrays}, config.train.batch_size)
    images = vectors(towers, batches, _image_vectors)[: len(scenes)]
    scores = images @ class_vectors(towers, prompts, captions, config.train.batch_size).T
    return float(np.mean(np.argmax(scores, axis=1) == np.repeat(np.arange(len(classes)), len(PLACES))))
