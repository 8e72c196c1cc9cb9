"""Where a run goes on when its folder cannot be written any more: the disk is full or read-only, the folder taken away.

    runs/a.rescued/         beside the run's folder, where that can be written; or --rescue DIR/a.rescued
    /tmp/a.rescued/         in the system's temporary folder, where it cannot

What is written there is the whole run, its metrics from the first step on, so that it is resumed from there.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def rescue_places(folder: Path, rescue: Path | None) -> Iterator[Path]:
    """Folders that a run may be written to in place of its own, the first first; none of them is there yet.

    Args:
      folder: the run's, an absolute path.
      rescue: where `--rescue` says that it shall go. None: beside its folder.
    """
    for parent in dict.fromkeys([folder.parent if rescue is None else rescue, Path(tempfile.gettempdir())]):
        names = (f"{folder.name}.rescued" + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
        yield next(parent / name for name in names if not os.path.lexists(parent / name))


class Rescued:
    """The folders in which a run has been going on, and why it left them.

    Args:
      top: the first, or the one around it that holds several runs of which it is one.
      rescue: as in `rescue_places`.
    """

    def __init__(self, top: Path, rescue: Path | None):
        self.top = self._left = top.absolute()
        self._places = rescue_places(self.top, rescue.absolute() if rescue else None)
        self.reasons: list[str] = []
        """Why each folder was left, the first first."""

    @property
    def moved(self) -> bool:
        """Whether the run is not any more where it began."""
        return self.top != self._left

    def next_place(self, reason: Exception) -> Path:
        """The next folder to try, since the one before failed.

        Raises:
          OSError: there is none: names those that were tried, and why each failed.
        """
        self.reasons.append(f"{self.top} ({said(reason)})")
        place = next(self._places, None)
        if place is None:
            raise OSError(f"the run could be written nowhere: {'; '.join(self.reasons)}") from reason
        self.top = place
        return place

    def __str__(self) -> str:
        """How the run is found again."""
        return f"{self.reasons[0]} could not be written any more; it is in {self.top}, --run-dir {self.top} resumes it"


def said(reason: Exception) -> str:
    """An error in a few words."""
    number = getattr(reason, "errno", None)
    return os.strerror(number) if number else " ".join(str(reason).split())
