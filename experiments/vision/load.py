"""Image classifiers from anywhere: a run of this project, a published folder, or a name on the hub."""

from pathlib import Path
from typing import Any

import zoo
from zoo.published.pretrained import find_folder
from zoo.published.run_folder import is_run


def load_model(source: str | Path, *, step: Any = "latest", masters: bool = False) -> tuple[Any, Path]:
    """An image classifier and its folder: of a run, in our own or a published layout, or by a name on the hub.

    Args:
      step: which checkpoint of a run: a step, "latest" or "best".
      masters: as in `zoo.from_pretrained`.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no image classifier.
    """
    run = is_run(folder := Path(source))
    folder = folder if run else find_folder(source)
    model = zoo.from_pretrained(folder, revision=step if run else None, masters=masters)
    if not isinstance(model, zoo.ImageClassifier):
        raise ValueError(f"{source} holds a {type(model).__name__}, expected an image classifier")
    return model, folder
