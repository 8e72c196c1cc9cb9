"""What is said and written of a run: its scores, predictions and pictures, its speed and its memory."""

import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.images import Images
from experiments.encoders.confusion import plot_confusion
from experiments.loop.metrics import read_metrics
from experiments.loop.model_size import describe_size
from experiments.loop.row_files import write_rows
from experiments.loop.summary import Scores
from experiments.vision.mistakes import plot_mistakes
from experiments.vision.prediction import logits_of
from experiments.vision.presets import Config
from experiments.vision.task import Prepared, score


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines."""
    sizes = ", ".join(f"{len(images.labels):,} {name}" for name, images in prepared.data.splits.items())
    size = prepared.preprocess.size
    return (
        f"{describe_size(prepared.model, folder)}\n"
        f"{len(prepared.data.classes)} classes: {sizes} images of {size} x {size}"
    )


def write_results(model: Any, folder: Path, config: Config, prepared: Prepared) -> dict[str, Scores]:
    """Scores of every split but that of training; predictions.jsonl, confusion.png and mistakes.png in the folder.

    The pictures are of the images that were kept for testing, or else of those held out.
    """
    classes, folder = prepared.data.classes, Path(folder)
    splits = list(prepared.data.splits.items())[1:]
    logits = {name: logits_of(model, images, prepared.preprocess, config) for name, images in splits}
    write_rows(
        (row for name, images in splits for row in prediction_rows(name, images, logits[name], classes)),
        folder / "predictions.jsonl",
    )
    name, images = splits[-1]
    predicted = np.argmax(logits[name], axis=1)
    if len(classes) <= 60:
        said, true = ([classes[i] for i in rows] for rows in (predicted, images.labels))
        plot_confusion(said, true, classes, folder, name)
    plot_mistakes(images, logits[name], classes, folder, name, n=config.mistakes)
    return {name: score(logits[name], images.labels) for name, images in splits}


def prediction_rows(split: str, images: Images, logits: np.ndarray, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is said of each image of a split, with its path where it has one."""
    for row, (label, p) in enumerate(zip(images.labels, np.asarray(jax.nn.softmax(logits, axis=-1)), strict=True)):
        path, best = images.path(row) if images.path else None, int(np.argmax(p))
        about = {"split": split, "row": row} | ({"path": path} if path else {})
        yield about | {"label": classes[label], "predicted": classes[best], "probability": float(p[best])}


def speed_and_memory(folders: Sequence[Path]) -> dict[str, float]:
    """Of all runs together: the median of their images a second, where a run took a step more than that which was
    compiled, and the most bytes in use."""
    speeds = [r["images_per_second"] for f in folders for r in read_metrics(f) if "images_per_second" in r]
    median = {"images_per_second": float(np.median(speeds))} if speeds else {}
    return median | {"peak_memory_bytes": peak_memory()}


def peak_memory() -> int:
    """The most bytes in use so far: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return stats.get("peak_bytes_in_use", used)
