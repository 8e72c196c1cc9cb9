"""Image classifiers from anywhere: a run of this project, a published folder, or a name on the hub."""

from pathlib import Path
from typing import Any

import zoo
from experiments.loop import runs
from zoo.published.pretrained import find_folder


def load_model(source: str | Path, *, step: Any = "latest") -> tuple[Any, Path]:
    """An image classifier and its folder: of a run, in a published layout, or by a name on the hub.

    Args:
      step: which checkpoint of a run: a step, "latest" or "best".

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no image classifier.
    """
    folder = Path(source)
    if (folder / runs.MODEL_FILE).is_file():
        model = runs.restore_model(folder, runs.load_model_config(folder), step=step)
    else:
        folder = find_folder(source)
        model = zoo.from_pretrained(folder)
    if not isinstance(model, zoo.ImageClassifier):
        raise ValueError(f"{source} holds a {type(model).__name__}, expected an image classifier")
    return model, folder
