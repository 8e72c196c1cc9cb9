"""Small files that are there whole or not at all: JSON, and text."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.loop.distributed import by_first


@by_first
def write_json(content: Any, path: Path) -> None:
    """Writes a JSON file as `write_text` does; of several processes one does."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a file in one step: a reader finds the old one, the new one or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
