"""What is said and written of a fine-tuning run: its plan, its predictions, and which classes it confuses."""

import json
from collections.abc import Mapping
from pathlib import Path

from experiments.encoders.confusion import plot_confusion
from experiments.encoders.finetune_task import Prepared
from experiments.encoders.objectives import Predictions
from experiments.loop.model_size import describe_size


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
