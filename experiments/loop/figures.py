"""Pictures of a run, as files."""

from pathlib import Path
from typing import Any

from experiments.loop.distributed import by_first


@by_first
def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure of matplotlib's; of several processes one does."""
    figure.savefig(path, dpi=dpi)
