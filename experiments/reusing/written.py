"""What every verb ends with: the model in a new folder, with all that lay beside the one that it was made of."""

from pathlib import Path

import zoo
from experiments.model_folders import Loaded, write_companions
from zoo.models.build import Model


def require_empty(target: Path) -> None:
    """Raises a ValueError where something lies in a folder, or a file in its place."""
    if target.is_file():
        raise ValueError(f"{target} is a file; choose another folder")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; choose another folder")


def write_model(model: Model, target: Path, loaded: Loaded, source: str) -> int:
    """Writes a model in our own layout.

    Args:
      model: what was made.
      target: an empty folder, or none.
      loaded: what it was made of.
      source: what that is called.

    Returns:
      Bytes of its weights.
    """
    zoo.save_pretrained(model, target, extra=loaded.extra)
    write_companions(loaded.folder, target, model, source=source, layout="native")
    return sum(path.stat().st_size for path in target.glob("*.safetensors"))
