"""The images that a model is most wrong about, as a picture."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.data.images import Images
from experiments.data.pictures import flatten
from experiments.loop.figures import save_figure


def plot_mistakes(
    images: Images, logits: np.ndarray, classes: Sequence[str], folder: Path, split: str, *, n: int = 25
) -> Path:
    """Draws the images whose class the model gives the least probability into mistakes.png, the worst first.

    Args:
      logits: (n, k) of every image.
      n: how many at most.
    """
    from matplotlib.figure import Figure

    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    right = probabilities[np.arange(len(logits)), images.labels]
    predicted = np.argmax(probabilities, axis=1)
    wrong = int(np.sum(predicted != images.labels))
    worst = np.argsort(right, kind="stable")[: min(n, len(right))]
    columns = int(np.ceil(np.sqrt(len(worst))))
    rows = -(-len(worst) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, i in zip(panels.flat, worst, strict=False):
        image = images.read(int(i))
        panel.imshow(image if image.mode == "L" else flatten(image, "RGB", (255,)), cmap="gray")
        said, color = classes[predicted[i]], "tab:red" if predicted[i] != images.labels[i] else "tab:green"
        title = f"is {classes[images.labels[i]]}: {right[i]:.0%}"
        if predicted[i] != images.labels[i]:
            title += f"\nsaid {said}: {probabilities[i, predicted[i]]:.0%}"
        panel.set_title(title, fontsize=7, color=color)
    figure.suptitle(
        f"{split}: {wrong} of {len(logits)} wrong; the least probable truths, and what was said", fontsize=9
    )
    path = folder / "mistakes.png"
    save_figure(figure, path, dpi=120)
    return path
