"""A JSON file that is there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.loop.distributed import by_first


@by_first
def write_json(content: Any, path: Path) -> None:
    """Writes a JSON file in one step: a reader finds the old one, the new one or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
