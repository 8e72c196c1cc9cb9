"""Captioning and question answering as a task of the loop: what its runs share, the loss, and how often it is right."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.causal.load import load_causal
from experiments.data.augment import Preprocess
from experiments.data.image_texts import Found, load_image_texts
from experiments.data.packing import Epochs, make_batches
from experiments.data.tokenizers import Tokenizer, load_tokenizer, restore_tokenizer
from experiments.loop.duration import in_steps
from experiments.loop.mesh import current_mesh, gathered, placed, spread
from experiments.loop.optim import OptimConfig
from experiments.loop.starting import load_start
from experiments.loop.summary import Scores
from experiments.loop.train import Loss, Task, TrainConfig, with_auxiliary
from experiments.loop.vocabulary_loss import vocabulary_loss
from experiments.vision.load import load_model as load_classifier
from experiments.vision.meaning import read_preprocess
from experiments.vision_language.presets import Config
from experiments.vision_language.rows import Rows
from experiments.vision_language.stages import Trained, hold, without_gradients
from zoo.published.pretrained import find_folder
from zoo.published.run_folder import is_run


class Start(NamedTuple):
    """Models that a run starts from; None where a part is fresh."""

    whole: zoo.VisionLanguageModel | None = None
    vision: zoo.ImageClassifier | None = None
    language: zoo.CausalLM | None = None


class Prepared(NamedTuple):
    """What the runs of all seeds share."""

    data: Found
    model: zoo.VisionLanguageConfig
    tokenizer: Tokenizer
    preprocess: Preprocess
    rows: tuple[Rows, Rows]
    """To train on, and held out."""
    train: TrainConfig
    optim: OptimConfig
    """With numbers of steps for epochs and shares."""
    start: Start


def load_model(source: str | Path) -> tuple[zoo.VisionLanguageModel, Path]:
    """A vision-language model and its folder: of a run, in a layout, or by a name on the hub.

    Raises:
      ValueError: what is there is no vision-language model.
    """
    folder = Path(source) if is_run(Path(source)) else find_folder(source)
    return zoo.from_pretrained(folder, kind=zoo.VisionLanguageModel), folder


def prepare(config: Config, folder: Path | None = None) -> Prepared:
    """Finds images and texts, the tokenizer, and the shape of the model.

    Args:
      folder: of a run that goes on, which has its model's shape and its tokenizer.
    """
    data, model, preprocess = load_image_texts(config.data), config.model, config.preprocess
    start, tokenizer = _start(config, folder)
    if start.whole is not None:
        model = start.whole.config
    elif start.vision or start.language:
        model = dataclasses.replace(
            model,
            vision=dataclasses.replace(start.vision.config, n_classes=0) if start.vision else model.vision,
            text=start.language.config if start.language else model.text,
        )
    for source in (config.init, config.vision_init):
        if source is not None:
            preprocess = read_preprocess(find_folder(source) if not Path(source).is_dir() else Path(source), preprocess)
    if tokenizer is None:
        texts = [f"{e.question} {e.answer}" for e in data.train.examples]
        tokenizer = load_tokenizer(config.tokenizer, texts, config.bpe_vocab_size, folder)
    model = _with_image_token(model, tokenizer, start)
    images = Preprocess(preprocess, model.vision.image_size, model.vision.channels)
    options: dict[str, Any] = {"places": model.image_tokens, "image_token": model.image_token_id, "preprocess": images}
    longest = Rows(data.train, tokenizer, **options, text_len=config.text_len)
    held_out = Rows(data.held_out, tokenizer, **options, text_len=longest.text_len)
    for name, rows in (("train", longest), ("held out", held_out)):
        if not len(rows):
            raise ValueError(f"--text-len {config.text_len}: no example {name} is as short as that")
    train, optim = in_steps(config, -(-len(longest) // config.train.batch_size))
    return Prepared(data, model, tokenizer, images, (longest, held_out), train, optim, start)


def _start(config: Config, folder: Path | None) -> tuple[Start, Tokenizer | None]:
    """What a run starts from, and the tokenizer that comes with it."""
    if config.init is not None:
        whole, place = load_start(config.init, folder, load_model)
        return Start(whole), restore_tokenizer(place)
    vision = load_classifier(config.vision_init)[0] if config.vision_init else None
    if config.language_init is None:
        return Start(None, vision), None
    loaded = load_causal(config.language_init)
    return Start(None, vision, loaded.model), loaded.tokenizer


def _with_image_token(model: zoo.VisionLanguageConfig, tokenizer: Tokenizer, start: Start) -> zoo.VisionLanguageConfig:
    """The shape with a vocabulary, and a token of it that no text has, for the images' places."""
    if start.whole is not None:
        return model
    wanted, text = tokenizer.vocab_size + 1, model.text
    rows = text.padded_vocab_size if start.language or text.vocab_size else wanted
    if wanted > rows:
        what = "--language-init" if start.language else "--model.text.vocab-size"
        raise ValueError(f"{what} has {rows} rows of tokens, expected {wanted}: the tokenizer's and one for images")
    if start.language is None:
        text = dataclasses.replace(text, vocab_size=max(wanted, text.vocab_size))
    elif text.vocab_size < wanted:  # a row that pads the table
        multiple = text.padded_vocab_size
        text = dataclasses.replace(text, vocab_size=wanted, pad_vocab_multiple=multiple)
        start.language.config = text
    return dataclasses.replace(model, text=text, image_token_id=tokenizer.vocab_size)


def make_model(prepared: Prepared, trained: Trained, rngs: nnx.Rngs) -> zoo.VisionLanguageModel:
    """The model that a run begins with, its arrays its own: training gives their memory away."""
    start = prepared.start
    if start.whole is not None:
        return hold(_copied(start.whole), trained)
    parts: dict[str, Any] = {"language": None if start.language is None else _copied(start.language)}
    if start.vision is not None:
        parts["vision"] = zoo.with_head(_copied(start.vision), prepared.model.vision, rngs=rngs)
    return hold(zoo.VisionLanguageModel(prepared.model, rngs=rngs, **parts), trained)


def _copied(model: Any) -> Any:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(np.array, state))


def answer_loss(
    model: zoo.VisionLanguageModel, batch: Mapping[str, Any], rngs: nnx.Rngs | None, *, trained: Trained = "all"
) -> Loss:
    """Cross-entropy of the answers' tokens, summed over those that count."""
    model = without_gradients(model, trained) if rngs is not None else model
    hidden, auxiliary = model.run(
        batch["tokens"], batch["mask"], images=batch["images"], prompt_mask=batch["prompt"], rngs=rngs
    )
    sums = vocabulary_loss(model.head, hidden, batch["targets"], batch["weights"], model.config.vocab_size)
    return with_auxiliary(Loss(sums.total, jnp.sum(batch["weights"])), model, auxiliary)


def make_task(config: Config, prepared: Prepared) -> Task:
    """The task of one seed."""
    rows, held_out = prepared.rows
    plan = Epochs(np.zeros(len(rows), int), [config.train.batch_size], seed=config.train.seed)
    return Task(
        init=functools.partial(make_model, prepared, config.trained),
        loss=functools.partial(answer_loss, trained=config.trained),
        batches=iter(make_batches(lambda step: rows(plan(step)), threads=config.threads, prefetch=2 * config.threads)),
        evaluate=lambda model: evaluate(model, held_out, config.train.batch_size),
        tokens_per_batch=config.train.batch_size * rows.length,
    )


class Guesses(NamedTuple):
    """What a model says of each row."""

    nats: np.ndarray
    """(n,) of the answer, summed over its tokens."""
    tokens: np.ndarray
    """(n,) how many it has."""
    right: np.ndarray
    """(n,) whether the likeliest tokens are the answer, end included: what generating without chance gives."""


def guesses(model: Any, rows: Rows, batch_size: int) -> Guesses:
    """What a model says of all rows, in their order.

    The likeliest token at each place after the right ones before it is what greedy generation says as long as that is
    right: so it says the whole answer exactly where each of them is.
    """
    n = len(rows)
    numbers = np.append(np.arange(n), np.full(-n % batch_size, -1)).reshape(-1, batch_size)
    graphdef, variables = nnx.split(model)
    mesh = current_mesh()
    variables = placed(variables, mesh)
    with jax.set_mesh(mesh):
        parts = [_guess(graphdef, variables, spread(rows(some), mesh)) for some in numbers]
    return Guesses(*(np.concatenate(gathered(list(part)))[:n] for part in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _guess(graphdef, variables, batch):
    model = nnx.merge(graphdef, variables)
    given = {"images": batch["images"], "prompt_mask": batch["prompt"]}
    logits = model(batch["tokens"], batch["mask"], **given)[..., : model.config.vocab_size]
    weights, targets = batch["weights"], batch["targets"]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    wrong = (jnp.argmax(logits, axis=-1) != targets) & (weights > 0)
    return jnp.sum(jnp.where(weights > 0, nats, 0), axis=1), jnp.sum(weights, axis=1), ~jnp.any(wrong, axis=1)


def scores_of(said: Guesses, kinds: list[str]) -> Scores:
    """loss in nats a token, exact match, and that of each kind of question."""
    scores = {"loss": float(said.nats.sum() / said.tokens.sum()), "exact": float(said.right.mean())}
    names = np.array(kinds)
    return scores | {kind: float(said.right[names == kind].mean()) for kind in dict.fromkeys(sorted(kinds))}


def evaluate(model: Any, rows: Rows, batch_size: int) -> Scores:
    """Scores of all rows."""
    return scores_of(guesses(model, rows, batch_size), [rows.example(i).kind for i in range(len(rows))])
