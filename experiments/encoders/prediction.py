"""What a tuned encoder says of texts: of labelled rows, or of any that it is given."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.data.labelled import Examples
from experiments.encoders.load import load_encoder
from experiments.encoders.objectives import LabelledRows, Objective, Predictions, load_target, make_objective


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
