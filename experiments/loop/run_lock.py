"""One process at a time trains in a run's folder: a lock that lasts as long as the process, however it ends.

    run/.lock     whose lock it is: {"host": "gpu-7", "process": 4711}; of no meaning when nobody holds it

The operating system holds the lock (`flock`), so that a killed process leaves none behind. Readers take none. Of
several processes that train together, process 0 holds it for all.
"""

import contextlib
import errno
import functools
import inspect
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from experiments.loop import distributed
from experiments.loop.flags import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
Fit = TypeVar("Fit", bound=Callable[..., Any])
# What flock says where there are no locks: some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class _Held(NamedTuple):
    descriptor: int | None
    """None where process 0 holds it."""
    thread: int


# Locks of this process by the real path of their folder.
_held: dict[str, _Held] = {}


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which is made if missing; and is gone again if nothing was put into it.

    Within one thread it may be taken several times: the outermost holds it.

    Raises:
      UsageError: another process, or another thread, trains in this folder; or it cannot be written.
    """
    name = os.path.realpath(folder)
    held = _held.get(name)
    if held is not None:
        if held.thread != threading.get_ident():
            raise UsageError(f"{folder} is being trained in by another thread of this process")
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    _held[name] = _Held(_lock_for_all(folder), threading.get_ident())
    try:
        yield
    finally:
        if (descriptor := _held.pop(name).descriptor) is not None:
            _unlock(folder, descriptor, made)


def _lock_for_all(folder: Path) -> int | None:
    """Locks a folder in process 0; the others wait for that."""
    descriptors: list[int] = []
    distributed.agreed(lambda: descriptors.append(_lock(folder)))
    return descriptors[0] if descriptors else None


def _unlock(folder: Path, descriptor: int, made: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        if _is_at(folder / LOCK_FILE, descriptor):
            (folder / LOCK_FILE).unlink()
    os.close(descriptor)
    with contextlib.suppress(OSError):  # something is in it
        for path in made:
            path.rmdir()


def locked(fit: Fit) -> Fit:
    """Makes a function hold the lock of its argument `folder`."""
    signature = inspect.signature(fit)

    @functools.wraps(fit)
    def with_lock(*args: Any, **options: Any) -> Any:
        with run_lock(signature.bind(*args, **options).arguments["folder"]):
            return fit(*args, **options)

    return cast(Fit, with_lock)


def lock_again(folder: Path) -> None:
    """Locks a folder that was deleted while this process held its lock, and that is there again.

    Raises:
      UsageError: another process was faster.
    """
    name = os.path.realpath(folder)
    held = _held.get(name)
    if held is None or held.descriptor is None or _is_at(folder / LOCK_FILE, held.descriptor):
        return
    _held[name] = _Held(_lock(folder), held.thread)
    os.close(held.descriptor)


def _lock(folder: Path) -> int:
    """Opens the lock's file and locks it; where there are no locks, says so and opens it alone."""
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # who had the lock has just deleted the folder, in which it had put nothing
            continue
        except OSError as error:
            raise UsageError(f"--run-dir {folder} cannot be written: {error.strerror}") from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                whose = _whose(descriptor)
                os.close(descriptor)
                raise UsageError(f"{folder} is being trained in by {whose}; nothing was changed") from None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise UsageError(f"{folder} cannot be locked: {error.strerror}") from error
            print(f"{folder} cannot be locked ({error.strerror}): start no second run in it", flush=True)
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # who had the lock has deleted its file since
    with contextlib.suppress(OSError):  # a full disk is said where it matters
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path names the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _whose(descriptor: int) -> str:
    try:
        said = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {said['process']} on {said['host']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # it has only just begun
        return "another process"
