"""What a training run writes: metrics and checkpoints in its folder, or in another one when that cannot be written.

Of several processes the first writes metrics, and all write checkpoints. Where a folder cannot be written any more, the
first chooses the next, and all go on there; see `rescue`.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.loop import distributed
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.disk_space import said_of_space
from experiments.loop.flags import UsageError
from experiments.loop.kept_files import KeptFiles
from experiments.loop.metrics import Metrics, NoMetrics
from experiments.loop.rescue import Rescued, said
from experiments.loop.run_lock import lock_again, run_lock

Split = Literal["train", "validation"]


class RunFiles:
    """The files of a run that is going on.

    Args:
      folder: the run's; its lock is held.
      keep_last: as of `Checkpoints`.
      rescue: as of `Rescued`.
      print_line: where lines for the console go.
      loggers: options of `Metrics`.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, rescue: Path | None, print_line: Callable[[str], None], **loggers: Any
    ):
        self.folder, self._keep_last, self._rescue, self._print = folder, keep_last, rescue, print_line
        self.checkpoints = Checkpoints(folder, keep_last=keep_last)
        self.metrics = Metrics(folder, **loggers) if distributed.is_first() else NoMetrics(folder)
        self._locks = contextlib.ExitStack()
        self._size = 0
        self._saved: int | None = None
        self._unwritten: list[tuple[int, Mapping[str, Any], Split]] = []

    def begin(self, size: int, saved: int | None) -> None:
        """Remembers the small files that lie there, which a run that is moved takes along.

        Args:
          size: bytes of a checkpoint.
          saved: the step of the checkpoint that the run goes on from.
        """
        self._kept, self._size, self._saved = KeptFiles(self.folder), size, saved
        self.rescued = Rescued(self._kept.top, self._rescue)
        self._within = self.folder.relative_to(self._kept.top)

    @property
    def failed(self) -> bool:
        """Whether something could not be written in this process, which the next `save` finds out."""
        return bool(self._unwritten) or self.checkpoints.failed

    @property
    def unsaved(self) -> bool:
        """Whether nothing in the folder holds the run's state, or will."""
        return self.rescued.moved and not self.checkpoints.on_its_way and not self.checkpoints.steps()

    def write(self, step: int, values: Mapping[str, Any], split: Split) -> None:
        """Writes a record of metrics; one that cannot be is written at the next `save`, where there are others."""
        if distributed.count() == 1:
            self._somewhere(lambda: self.metrics.write(step, values, split=split))
            return
        try:
            self.metrics.write(step, values, split=split)
        except OSError:
            self._unwritten.append((step, values, split))

    def save(self, step: int, state: Any, *, data_state: dict, metrics: dict[str, float], last: bool) -> None:
        """Begins the checkpoint of a step, see `Checkpoints`; after a failure, and of the last, it waits for it."""

        def act() -> None:
            certain = last
            try:
                self.checkpoints.finish()
            except OSError:  # the folder may have been deleted in between, and is made again
                certain = True
            if reason := distributed.agreed(lambda: self._write_again(step)):
                raise OSError(*reason)
            save = self.checkpoints.save if certain else self.checkpoints.begin
            save(step, state, data_state=data_state, metrics=metrics)

        self._somewhere(act)
        self._saved = step

    def close(self) -> None:
        """Ends what is open; a save that is on its way is waited for."""
        with contextlib.suppress(OSError):
            self.checkpoints.close()
        self.metrics.close()
        self._locks.close()

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self.checkpoints.__exit__(kind, *exception)
        self.metrics.close()
        self._locks.close()

    def _write_again(self, step: int) -> list | None:
        """Writes what has been deleted from the folder since the run began, and what could not be written.

        Returns:
          number and text of the error where it cannot be.
        """
        try:
            self._write_what_is_gone(step)
        except (OSError, UsageError) as error:
            return [getattr(error, "errno", None) or 0, said(error)]
        return None

    def _write_what_is_gone(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_again(self.folder)
        gone = [str(path) for path in self._kept.restore()]
        gone += [str(self.folder / "metrics.jsonl")] if self.metrics.restore() else []
        if gone:
            self._print(f"deleted under the run and written again: {', '.join(gone)}")
        if self._saved and not (self.checkpoints.root / str(self._saved)).exists():
            self._print(f"the checkpoint of step {self._saved} was deleted under the run; step {step} is saved")
        while self._unwritten:
            self.metrics.write(*self._unwritten[0])
            self._unwritten.pop(0)

    def _somewhere(self, act: Callable[[], None]) -> None:
        """Does what writes to the folder, in another one if need be."""
        while True:
            try:
                return act()
            except (OSError, UsageError) as error:
                self._move(error)

    def _move(self, error: Exception) -> None:
        """Goes on in another folder."""
        left, why, self._saved = self.folder, said(error), None

        def choose() -> tuple[str, list[str]]:
            reason: Exception = error
            while True:
                top = self.rescued.next_place(reason)
                folder = top / self._within
                try:
                    self._kept.move(top)
                    folder.mkdir(parents=True, exist_ok=True)
                    said_of_space(folder, self._size, 1)
                    self.metrics.move(folder)
                except (OSError, UsageError) as another:
                    reason = another
                else:
                    return str(top), self.rescued.reasons

        top, self.rescued.reasons = distributed.agreed(choose)
        self.rescued.top = Path(top)
        self.folder = self.rescued.top / self._within
        self._locks.enter_context(run_lock(self.folder))
        self.checkpoints = Checkpoints(self.folder, keep_last=self._keep_last)
        self.metrics.folder = self.folder
        self._print(f"{left} cannot be written any more ({why}): the run goes on in {self.folder}")
