"""Which classes are taken for which, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.encoders.scores import confusion
from experiments.loop.figures import save_figure


def plot_confusion(
    predicted: Sequence[str], labels: Sequence[str], classes: Sequence[str], folder: Path, split: str
) -> Path:
    """Draws which classes were taken for which into confusion.png: a row for each true class, its shares."""
    from matplotlib.figure import Figure

    counts = confusion(predicted, labels, classes)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = 3 + 0.35 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{split}: {np.trace(counts) / counts.sum():.1%} right")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    for i, j in np.argwhere(counts):
        axes.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.5 else "k")
    figure.colorbar(image, shrink=0.8, label="share of the true class")
    path = folder / "confusion.png"
    save_figure(figure, path, dpi=120)
    return path
