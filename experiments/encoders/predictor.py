"""A tuned encoder that is asked: texts in, and what each is, with how sure that is.

    ask = Predictor.from_pretrained("runs/finetune/tiny")        # or a published folder, or a name on the hub
    ask(["a text", "another"])[0].label                          # "asyncio"
    ask(["a text"])[0].probabilities                             # {"asyncio": 0.9, ...}

A run says itself what its outputs mean (labels.json). Of a published folder its config.json says it: classes by
id2label, one class alone is a number, a classifier of tokens gives tags, or answers where it is ForQuestionAnswering.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import zoo
from experiments.data.labelled import Kind
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.lengths import check_lengths, longest
from experiments.encoders.load import load_encoder
from experiments.encoders.objectives import FILE_NAME, Predictions, Target, load_target, make_objective
from experiments.encoders.prediction import run_over
from experiments.encoders.texts_given import check_texts
from experiments.loop import runs
from zoo.published.pretrained import read_config_file
from zoo.published.transformers_fields import read_class_names

# Longest row, in tokens, of published models that read any length.
DEFAULT_LENGTH = 512


class Prediction(NamedTuple):
    """What a model says of a text."""

    label: Any
    """A class's name, a number, a list of tags, or an answer."""
    score: Any
    """The class's probability; one for each word's tag; how much likelier the answer is than none; None of a number."""
    probabilities: dict[str, float] | None
    """Of every class by its name; None where there are no classes of a whole text."""


class Predictor:
    """Says of texts what its model was tuned to say.

    Args:
      model: an encoder with a head.
      tokenizer: the model's.
      target: what its outputs mean.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, target: Target):
        self.model, self.target = model, target
        self.objective = make_objective(target, tokenizer, pad_to_max=not model.config.mask_padding)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, step: Any = "latest", max_len: int | None = None) -> "Predictor":
        """Loads a model to ask.

        Args:
          source: the folder of a run of `finetune` (of one seed), a published folder, or a name on the hub.
          step: which checkpoint of a run: a step, "latest" or "best".
          max_len: tokens of a row; longer texts are cut, contexts of answers read in windows. None: what it was tuned
            with; of a published model, what it reads, at most 512.

        Raises:
          FileNotFoundError: nothing there, or a run that is not of `finetune`.
          ValueError: a model without a classifier, or rows longer than it reads.
        """
        folder = Path(source)
        if (folder / runs.MODEL_FILE).is_file() or any(folder.glob(f"seed-*/{FILE_NAME}")):
            load_target(folder)  # a run that was not tuned is told so before its weights are read
        model, tokenizer, folder = load_encoder(source, step=step)
        target = load_target(folder) if (folder / FILE_NAME).is_file() else published_target(model, folder)
        if max_len is not None:
            check_lengths(model.config, max_len, "--max-len")
            target = dataclasses.replace(target, max_len=max_len)
        return cls(model, tokenizer, target)

    def __call__(
        self,
        texts: Sequence[Any],
        seconds: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[Prediction]:
        """What the model says of each text, in their order.

        Args:
          texts: strings; for answers, questions. For tags, lists of words, or strings, which are split at white space.
          seconds: the second texts of pairs; the contexts that answers are in.
          batch_size: rows in a batch; texts of similar length are together.
          progress: whether to show a bar on stderr, where that is a terminal.

        Raises:
          ValueError: what is no list of texts, or seconds that are missing, too many or not asked for.
        """
        said = self.predictions(texts, seconds, batch_size=batch_size, progress=progress)
        return [self._named(label, score) for label, score in zip(said.labels, said.scores, strict=True)]

    def predictions(
        self,
        texts: Sequence[Any],
        seconds: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Predictions:
        """As `__call__`, with probabilities in the order of the target's classes, without names."""
        examples = check_texts(texts, seconds, self.target)
        if not examples.texts:
            return Predictions([], [])
        _, logits = run_over(self.model, self.objective, self.objective.rows(examples), batch_size, progress=progress)
        return self.objective.predictions(examples, logits)

    def _named(self, label: Any, score: Any) -> Prediction:
        if self.target.kind == "regression":
            return Prediction(label, None, None)
        if self.target.kind in ("tagging", "span-qa"):
            return Prediction(label, score, None)
        probabilities = named(self.target, score)
        return Prediction(label, probabilities.get(label) if isinstance(label, str) else None, probabilities)


def named(target: Target, scores: Sequence[float]) -> dict[str, float]:
    """The probability of each class by its name."""
    return dict(zip(target.classes, map(float, scores), strict=True))


def predict(
    folder: str | Path,
    texts: Sequence[Any],
    seconds: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    step: Any = "latest",
) -> Predictions:
    """What a tuned model says of some texts; `Predictor`, for one question.

    Args:
      folder: of a run of one seed, or a published one.
      texts: strings; for tags, lists of words; for answers, questions.
      seconds: the second texts of pairs; the contexts of questions.
      step: which checkpoint: a step, "latest" or "best".

    Raises:
      FileNotFoundError: no tuned model in the folder.
      ValueError: a string where texts are expected, or seconds that are not as many.
    """
    return Predictor.from_pretrained(folder, step=step).predictions(texts, seconds, batch_size=batch_size)


def published_target(model: Any, folder: Path) -> Target:
    """What the outputs of a published classifier mean.

    Raises:
      ValueError: it has no classifier, or one of a kind that there is none for here.
    """
    raw, path = read_config_file(folder)
    n_labels = getattr(model.config, "n_labels", 0)
    if not n_labels:
        what = type(model).__name__
        raise ValueError(
            f"{folder} holds a {what} without a classifier, which predicts nothing; `finetune` gives it one"
        )
    options: dict[str, Any] = {"max_len": min(longest(model.config) or DEFAULT_LENGTH, DEFAULT_LENGTH)}
    if isinstance(model, zoo.TokenClassifier):
        if "QuestionAnswering" in " ".join(raw.get("architectures") or ()):
            return Target("span-qa", **options)
        return Target("tagging", classes=read_class_names(raw, n_labels), **options)
    problem = raw.get("problem_type") or ("regression" if n_labels == 1 else "single_label_classification")
    kinds = {
        "single_label_classification": "classification",
        "regression": "regression",
        "multi_label_classification": "multi-label",
    }
    kind: Any = kinds.get(problem)
    if kind not in get_args(Kind) or (kind == "regression") != (n_labels == 1):
        raise ValueError(f"{path}: problem_type={problem!r} of {n_labels} labels is not supported")
    return Target(kind, classes=() if kind == "regression" else read_class_names(raw, n_labels), **options)
