"""What a run needs in its folder besides checkpoints and metrics, kept in memory in case the folder is deleted.

A run whose folder disappears has everything that matters still in its memory. Its next save writes all of it again.
"""

from pathlib import Path

# A tokenizer takes tens of MB at most; larger files are not what a run is read with.
_LARGEST = 1 << 26


class KeptFiles:
    """The small files of a run's folder, and of the folder of several runs around it, as they are now.

    Args:
      folder: the run's.
      without: names of files that are somebody else's to keep.
    """

    def __init__(self, folder: Path, *, without: tuple[str, ...] = ()):
        around = [folder.parent] if (folder.parent / "config.json").is_file() else []  # several seeds, or stages
        self.top = around[0] if around else folder
        """The outer folder, or the run's where there is none around it."""
        self._files = {
            path: path.read_bytes()
            for place in (folder, *around)
            for path in sorted(place.iterdir())
            if path.is_file() and path.suffix == ".json" and path.name not in without
            if path.stat().st_size <= _LARGEST
        }

    def move(self, top: Path) -> None:
        """Writes them into another folder, as they lay in the outer one, and keeps them there from now on."""
        self._files = {top / path.relative_to(self.top): content for path, content in self._files.items()}
        self.top = top
        self.restore()

    def restore(self) -> list[Path]:
        """Writes those that are gone again.

        Returns:
          their paths.
        """
        gone = [path for path in self._files if not path.exists()]
        for path in gone:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._files[path])
        return gone
