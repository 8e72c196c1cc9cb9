"""A save that goes on behind the training's back, and by several processes together: in all of them or in none."""

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

from experiments.loop import distributed

Value = TypeVar("Value")
Written = dict[str, list]
"""Size and digest of files, by their path."""


class Save:
    """A save that is on its way, in a thread of its own."""

    _numbers = itertools.count()

    def __init__(self, write: Callable[[str], None]):
        self._error: BaseException | None = None
        key = f"save/{next(self._numbers)}"
        # A second signal ends the process at once, and what is half written is cleared away at the next start.
        self._thread = threading.Thread(target=self._run, args=(write, key), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        return not self._thread.is_alive() and self._error is not None

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(1)  # a signal is heeded in between
        if self._error is not None:
            raise self._error

    def _run(self, write: Callable[[str], None], key: str) -> None:
        try:
            write(key)
        except BaseException as error:
            self._error = error


def together(
    key: str, prepare: Callable[[], None], write: Callable[[], Written], commit: Callable[[Written], None]
) -> None:
    """`prepare` in process 0, then `write` in all, then `commit` in process 0, of what all have written.

    Where one of it fails, nothing is committed, and it is an error in every process.
    """
    if not distributed.is_first():
        _raise(distributed.wait_for(f"{key}/prepared"))
        written, error = _attempt(write)
        distributed.tell(f"{key}/written/{distributed.index()}", [written, _said(error)])
        _raise(distributed.wait_for(f"{key}/committed"))
        return
    others = range(1, distributed.count())
    _, error = _attempt(prepare)
    if others:
        distributed.tell(f"{key}/prepared", _said(error))
    if error is not None:
        raise error
    written, error = _attempt(write)
    for process in others:
        more, failed = distributed.wait_for(f"{key}/written/{process}")
        written = (written or {}) | (more or {})
        error = error or _error(failed)
    if error is None:
        _, error = _attempt(lambda: commit(written or {}))
    if others:
        distributed.tell(f"{key}/committed", _said(error))
    if error is not None:
        raise error


def _attempt(act: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def _said(error: Exception | None) -> list | None:
    return None if error is None else [getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)]


def _error(said: list | None) -> OSError | None:
    return None if said is None else OSError(*said) if said[0] else OSError(said[1])


def _raise(said: list | None) -> None:
    if (error := _error(said)) is not None:
        raise error
