"""What a label is to a model: its head, its rows, its loss, and how logits become predictions and scores.

classes    pooled vector -> logits, cross-entropy; or [MASK] -> logits of one word for each class (`verbaliser`)
several    pooled vector -> logits, binary cross-entropy of each class; those above one half are predicted
numbers    pooled vector -> one number, squared error; labels have mean 0 and variance 1 while training
tags       first token of each word -> logits, cross-entropy
spans      every token -> logits of being start and end, cross-entropy over the row (`spans`)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import zoo
from experiments.data.labelled import Examples, Kind
from experiments.data.packing import Batch
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import Tokenizer
from experiments.encoders import spans, verbaliser
from experiments.encoders.encoder_inputs import Encoded, Texts, encode, join
from experiments.encoders.scores import (
    Scores,
    classification_scores,
    multi_label_scores,
    regression_scores,
    squad_scores,
    tagging_scores,
)
from experiments.encoders.shapes import encoder_fields
from experiments.loop import flags
from experiments.loop.cross_entropy import counted
from experiments.loop.train import Loss, with_auxiliary
from zoo.layers.pooling import Pool
from zoo.published.json_files import read_json

Head = Literal["pooled", "mlm"]
# The file of a run that says what its model's outputs mean.
FILE_NAME = "labels.json"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a tuned model's outputs mean, and how texts are put before it."""

    kind: Kind
    head: Head = "pooled"
    classes: tuple[str, ...] = ()
    """Names of the classes or tags."""
    mean: float = 0.0
    std: float = 1.0
    """Of the numbers in training: the model's output times std, plus mean, is the prediction."""
    max_len: int = 128
    """Tokens of a row."""
    stride: int | None = None
    """Tokens from one window of a long context to the next."""
    may_be_none: bool = False
    """Whether there are questions that have no answer."""
    template: str = ""
    words: tuple[str, ...] = ()
    word_ids: tuple[int, ...] = ()
    """The verbaliser, with head "mlm"."""
    pairs: bool | None = None
    """Whether rows are pairs of texts. None: not known, of older runs and published models."""
    text_column: str | None = None
    second_column: str | None = None
    """Where texts were in training, as its command named them. None: in columns of usual names."""


def save_target(target: Target, folder: Path) -> None:
    flags.save_config(target, folder / FILE_NAME)


def load_target(folder: Path) -> Target:
    """Reads what `save_target` wrote.

    Raises:
      FileNotFoundError: there is none; the folder is no run of `finetune`.
    """
    if not (folder / FILE_NAME).is_file():
        seeds = sorted(path.parent.name for path in folder.glob(f"seed-*/{FILE_NAME}"))
        hint = f"; choose one of its runs, {', '.join(seeds)}" if seeds else ""
        raise FileNotFoundError(f"{folder} holds no tuned model: there is no {FILE_NAME} in it{hint}")
    target = flags.load_config(Target, folder / FILE_NAME)
    if (target.text_column, target.second_column) == (None, None):
        text, second = _trained_columns(folder)
        target = dataclasses.replace(target, text_column=text, second_column=second)
    return target


def _trained_columns(folder: Path) -> tuple[str | None, str | None]:
    """The columns that a run was tuned on, where its command named them; of another folder none."""
    try:
        data = read_json(folder / "config.json").get("data")
    except (OSError, ValueError):
        return None, None
    said = (data.get(name) if isinstance(data, dict) else None for name in ("text_column", "second_column"))
    text, second = (name if isinstance(name, str) else None for name in said)
    return text, second


class Predictions(NamedTuple):
    """What a model says, one of each for every example."""

    labels: list[Any]
    """A class's name, a list of them, a number, a list of tags, or an answer."""
    scores: list[Any]
    """A probability for each class (where a row has several, each for itself); the number; a probability for each
    word's tag; how much likelier than no answer."""


class LabelledRows:
    """Rows with what else a batch needs, by name: an array of values for each row, or a list of arrays for its tokens.

    A batch is a dict of tokens, token_types and mask, all (b, l); weights, (b,), (b, l) or (b, c), 0 for what does not
    count; and those others.
    """

    def __init__(self, texts: Texts, arrays: Mapping[str, Sequence[np.ndarray]]):
        self.texts, self.arrays = texts, {"weights": np.ones(len(texts), np.float32)} | dict(arrays)

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, rows: np.ndarray) -> Batch:
        """The batch of some rows; -1 is an empty one, whose values are 0."""
        batch = self.texts(rows)
        for name, values in self.arrays.items():
            first = np.asarray(values[0])
            of_tokens = isinstance(values, list)
            shape = (len(rows), batch["tokens"].shape[1]) if of_tokens else (len(rows), *first.shape)
            out = np.zeros(shape, first.dtype)
            for i, row in enumerate(rows):
                if row >= 0 and of_tokens:
                    out[i, : len(values[row])] = values[row]
                elif row >= 0:
                    out[i] = values[row]
            batch[name] = out
        return batch


class Objective:
    """One kind of label. What differs from kind to kind is in the subclasses.

    Args:
      target: see there.
      tokenizer: the model's.
      pad_to_max: whether every row has max_len positions, as models want that take padding for text.
    """

    def __init__(self, target: Target, tokenizer: Tokenizer, *, pad_to_max: bool = False):
        self.target, self.tokenizer, self.pad_to_max = target, tokenizer, pad_to_max

    def rows(self, examples: Examples) -> LabelledRows:
        """The rows of some examples, for a model."""
        raise NotImplementedError

    def config(self, encoder: zoo.EncoderConfig, *, pool: Pool, dropout: float) -> Any:
        """The config of an encoder with the head for these labels; `dropout` is the head's."""
        raise NotImplementedError

    def logits(self, model: Any, hidden: jax.Array, batch: Batch, rngs: nnx.Rngs | None) -> jax.Array:
        """What the model's head makes of its encoder's output for a batch."""
        return model.read(hidden, batch["mask"], rngs=rngs)

    def nats(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """The loss of each example, in the shape of the batch's weights."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def predictions(self, examples: Examples, logits: Sequence[np.ndarray]) -> Predictions:
        """What the logits of every row, in order, say of the examples."""
        raise NotImplementedError

    def scores(self, predicted: Sequence[Any], labels: Sequence[Any]) -> Scores:
        """The metrics of this kind."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, rngs: nnx.Rngs | None) -> Loss:
        """The weighted sum over a batch, as the loop takes it."""
        return self.outputs(model, batch, rngs)[0]

    def outputs(self, model: Any, batch: Batch, rngs: nnx.Rngs | None) -> tuple[Loss, jax.Array]:
        """The loss (0 of 0 without labels) and the logits of a batch."""
        types = token_types(model, batch)
        hidden, auxiliary = model.run(batch["tokens"], batch["mask"], token_type_ids=types, rngs=rngs)
        logits = self.logits(model, hidden, batch, rngs)
        if "labels" not in batch:
            return Loss(jnp.float32(0), jnp.float32(0)), logits
        weights = jnp.asarray(batch["weights"])
        nats = self.nats(counted(logits, weights), jnp.asarray(batch["labels"]))
        total = jnp.sum(nats * weights)
        return with_auxiliary(Loss(total, jnp.sum(weights)), model, auxiliary), logits

    def _texts(self, encoded: Sequence[Encoded]) -> Texts:
        special = special_tokens(self.tokenizer)
        return Texts(encoded, special, max_len=self.target.max_len, pad_to_max=self.pad_to_max)


def token_types(model: Any, batch: Batch) -> Any:
    """The kinds of a batch's tokens, for a model that tells them apart."""
    return batch["token_types"] if model.config.type_vocab_size > 1 else None


class Classes(Objective):
    """A class for a row."""

    def rows(self, examples):
        encoded = encode(self.tokenizer, examples.texts, examples.seconds, max_len=self.target.max_len)
        return LabelledRows(self._texts(encoded), self._labels(examples))

    def _labels(self, examples: Examples) -> dict[str, np.ndarray]:
        number = {name: i for i, name in enumerate(self.target.classes)}
        labels = examples.labels
        return {} if labels is None else {"labels": np.array([number[label] for label in labels], np.int32)}

    def config(self, encoder, *, pool, dropout):
        head = {"n_labels": len(self.target.classes), "pool": pool, "classifier_dropout": dropout}
        return zoo.SequenceClassifierConfig(**encoder_fields(encoder), **head)

    def predictions(self, examples, logits):
        probabilities = _softmax(np.stack(logits))
        labels = [self.target.classes[i] for i in np.argmax(probabilities, axis=1)]
        return Predictions(labels, probabilities.tolist())

    def scores(self, predicted, labels):
        return classification_scores(predicted, labels, self.target.classes)


class SeveralClasses(Classes):
    """Any number of classes for a row, each of which is there or not. The batch's weights are (b, c)."""

    def _labels(self, examples):
        if examples.labels is None:
            return {}
        number = {name: i for i, name in enumerate(self.target.classes)}
        there = np.zeros((len(examples.labels), len(number)), np.float32)
        for row, names in enumerate(examples.labels):
            there[row, [number[name] for name in names]] = 1
        return {"labels": there, "weights": np.ones_like(there)}

    def nats(self, logits, labels):
        return optax.sigmoid_binary_cross_entropy(logits, labels)

    def predictions(self, examples, logits):
        probabilities = 1 / (1 + np.exp(-np.stack(logits).astype(np.float64)))
        labels = [[self.target.classes[i] for i in np.flatnonzero(row > 0.5)] for row in probabilities]
        return Predictions(labels, probabilities.tolist())

    def scores(self, predicted, labels):
        return multi_label_scores(predicted, labels, self.target.classes)


class MaskedWords(Classes):
    """A class for a row, as the word that the masked-language-model head puts in place of [MASK]."""

    def rows(self, examples):
        prompts = verbaliser.encode_prompts(
            self.tokenizer, self.target.template, examples.texts, examples.seconds, max_len=self.target.max_len
        )
        return LabelledRows(self._texts(prompts.rows), self._labels(examples) | {"positions": prompts.positions})

    def config(self, encoder, *, pool, dropout):
        known = {f.name for f in dataclasses.fields(zoo.MaskedLMConfig)} if hasattr(encoder, "head_bias") else set()
        return zoo.MaskedLMConfig(**encoder_fields(encoder) | {name: getattr(encoder, name) for name in known})

    def logits(self, model, hidden, batch, rngs):
        return self.word_logits(model, hidden, batch["positions"])

    def word_logits(self, model: zoo.MaskedLM, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits of the classes' words at one position of each row: (b, c)."""
        hidden = jnp.take_along_axis(hidden, jnp.asarray(positions)[:, None, None], axis=1)[:, 0]  # b d
        return model.head(hidden)[:, np.array(self.target.word_ids)]


class Numbers(Objective):
    """A number for a row."""

    def rows(self, examples):
        encoded = encode(self.tokenizer, examples.texts, examples.seconds, max_len=self.target.max_len)
        if examples.labels is None:
            return LabelledRows(self._texts(encoded), {})
        labels = (np.array(examples.labels) - self.target.mean) / self.target.std
        return LabelledRows(self._texts(encoded), {"labels": labels.astype(np.float32)})

    def config(self, encoder, *, pool, dropout):
        return zoo.SequenceClassifierConfig(
            **encoder_fields(encoder), n_labels=1, pool=pool, classifier_dropout=dropout
        )

    def nats(self, logits, labels):
        return jnp.square(logits[:, 0] - labels)

    def predictions(self, examples, logits):
        numbers = (np.stack(logits)[:, 0] * self.target.std + self.target.mean).tolist()
        return Predictions(numbers, numbers)

    def scores(self, predicted, labels):
        return regression_scores(predicted, labels)


class Tags(Objective):
    """A class for each word, read at its first token. Words behind the end of a row get the first class, or "O"."""

    def rows(self, examples):
        special, number = special_tokens(self.tokenizer), {name: i for i, name in enumerate(self.target.classes)}
        encoded: list[Encoded] = []
        labels, weights = [], []
        for i, words in enumerate(examples.texts):
            tokens, places = self._align(words)
            encoded.append(join(special, tokens, None, self.target.max_len - special.around))
            targets, counts = np.zeros((2, len(encoded[-1].tokens)), np.int32)
            for word in np.flatnonzero(places >= 0):
                counts[places[word]] = 1
                targets[places[word]] = 0 if examples.labels is None else number[examples.labels[i][word]]
            labels.append(targets)
            weights.append(counts.astype(np.float32))
        arrays = {"weights": weights} | ({} if examples.labels is None else {"labels": labels})
        return LabelledRows(self._texts(encoded), arrays)

    def _align(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the words, and where in the row the first of each is."""
        tokens, offsets = self.tokenizer.encode_with_offsets(" ".join(words))
        frame, places = special_tokens(self.tokenizer).frame, first_tokens(words, offsets)
        there = (places >= 0) & (places < self.target.max_len - len(frame.opening) - len(frame.closing))
        return tokens, np.where(there, places + len(frame.opening), -1)

    def config(self, encoder, *, pool, dropout):
        n_labels = len(self.target.classes)
        return zoo.TokenClassifierConfig(**encoder_fields(encoder), n_labels=n_labels, classifier_dropout=dropout)

    def predictions(self, examples, logits):
        fallback = self.target.classes.index("O") if "O" in self.target.classes else 0
        labels, scores = [], []
        for words, row in zip(examples.texts, logits, strict=True):
            _, places = self._align(words)
            probabilities = _softmax(row)[places]
            best = np.where(places >= 0, np.argmax(probabilities, axis=1), fallback)
            labels.append([self.target.classes[i] for i in best])
            scores.append(np.where(places >= 0, np.max(probabilities, axis=1), 0.0).tolist())
        return Predictions(labels, scores)

    def scores(self, predicted, labels):
        return tagging_scores(predicted, labels)


class Spans(Objective):
    """An answer in a context: where it starts and where it ends."""

    def rows(self, examples):
        windows = self._windows(examples)
        arrays: dict[str, Any] = {"allowed": [window.allowed for window in windows]}
        if examples.labels is not None:
            arrays["labels"] = np.array([window.span for window in windows], np.int32)
        return LabelledRows(self._texts([window.row for window in windows]), arrays)

    def _windows(self, examples: Examples) -> list[spans.Window]:
        return spans.windows(
            self.tokenizer,
            examples.texts,
            examples.seconds or [],
            examples.labels,
            max_len=self.target.max_len,
            stride=self.target.stride,
        )

    def config(self, encoder, *, pool, dropout):
        return zoo.TokenClassifierConfig(**encoder_fields(encoder), n_labels=2, classifier_dropout=dropout)

    def logits(self, model, hidden, batch, rngs):
        logits = super().logits(model, hidden, batch, rngs)
        return jnp.where(jnp.asarray(batch["allowed"])[..., None], logits, jnp.finfo(logits.dtype).min)

    def nats(self, logits, labels):
        ends = optax.softmax_cross_entropy_with_integer_labels(jnp.swapaxes(logits, 1, 2), labels)
        return jnp.mean(ends, axis=1)

    def predictions(self, examples, logits):
        windows, contexts = self._windows(examples._replace(labels=None)), examples.seconds or []
        answers = spans.best_answers(windows, logits, contexts, may_be_none=self.target.may_be_none)
        return Predictions([answer.text for answer in answers], [answer.score for answer in answers])

    def scores(self, predicted, labels):
        return squad_scores(predicted, spans.golds(labels))


def make_objective(target: Target, tokenizer: Tokenizer, *, pad_to_max: bool = False) -> Objective:
    """The objective of a target."""
    kinds = {
        "classification": Classes,
        "multi-label": SeveralClasses,
        "regression": Numbers,
        "tagging": Tags,
        "span-qa": Spans,
    }
    kind = MaskedWords if target.head == "mlm" else kinds[target.kind]
    return kind(target, tokenizer, pad_to_max=pad_to_max)


def first_tokens(words: Sequence[str], offsets: np.ndarray) -> np.ndarray:
    """Which token is the first of each word of " ".join(words): (n_words,) int, -1 where none is.

    Args:
      offsets: (n, 2) where each token begins and ends in that text. A token may hold the space before its word.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    begins = ends - [len(word) for word in words]
    # A token belongs to the last word that it reaches into.
    owner = np.searchsorted(begins, offsets[:, 1] - 1, side="right") - 1
    first = np.full(len(words), -1)
    for token in reversed(range(len(offsets))):
        if offsets[token, 1] > offsets[token, 0] and offsets[token, 1] > begins[owner[token]]:
            first[owner[token]] = token
    return first


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
