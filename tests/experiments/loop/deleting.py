"""Deletes folders that a run is writing to meanwhile."""

import shutil
from pathlib import Path


def delete_under_a_run(folder: Path) -> None:
    """The folder is gone when this returns, though a checkpoint may be on its way into it.

    A name that the run's thread adds, or takes away, while the tree is walked ends the walk: it begins again.
    """
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
