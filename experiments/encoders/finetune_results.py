"""What is said and written of a fine-tuning run: its plan, its predictions, and which classes it confuses."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.encoders.confusion import plot_confusion
from experiments.encoders.finetune_task import Prepared
from experiments.encoders.objectives import Predictions
from experiments.encoders.predictor import named
from experiments.loop.model_size import describe_size
from experiments.loop.row_files import write_rows


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines, and what labels could be taken for as well."""
    sizes = ", ".join(f"{len(examples.texts):,} {name}" for name, examples in prepared.data.splits.items())
    target, rows = prepared.objective.target, next(iter(prepared.rows.values()))
    classes = f" of {len(target.classes)} classes" if target.classes else ""
    words = f"; {' '.join(target.words)} in {target.template!r}" if target.words else ""
    note = f"\n{prepared.data.note}" if prepared.data.note else ""
    return (
        f"{describe_size(prepared.encoder, folder)}\n"
        f"{target.kind}{classes}: {sizes}; rows {rows.texts.fill:.1%} text{words}{note}"
    )


def write_results(folder: Path, prepared: Prepared, predictions: Mapping[str, Predictions]) -> None:
    """predictions.jsonl and confusion.png, of the rows that were kept for testing, or else those held out."""
    held_out, *tests = list(prepared.data.splits)[1:]
    splits, target = tests or [held_out], prepared.objective.target
    rows = (row for split in splits for row in prediction_rows(prepared, split, predictions[split]))
    write_rows(rows, folder / "predictions.jsonl")
    split = next((name for name in splits if prepared.data.splits[name].labels is not None), held_out)
    if target.kind == "classification" and len(target.classes) <= 60:
        labels = prepared.data.splits[split].labels or []
        plot_confusion(predictions[split].labels, labels, target.classes, folder, split)


def prediction_rows(prepared: Prepared, split: str, predictions: Predictions) -> Iterator[dict[str, Any]]:
    """What is said of each example of a split, with its text, and its id where the data has one."""
    examples, target = prepared.data.splits[split], prepared.objective.target
    labels = examples.labels or [None] * len(examples.texts)
    for row, said in enumerate(zip(labels, *predictions, strict=True)):
        label, predicted, scores = said
        names = {"id": examples.ids, "text": examples.texts, "second": examples.seconds}
        about = {name: values[row] for name, values in names.items() if values is not None}
        if target.classes and target.kind != "tagging":
            scores = named(target, scores)
        yield {"split": split, "row": row, **about, "label": label, "predicted": predicted, "scores": scores}
