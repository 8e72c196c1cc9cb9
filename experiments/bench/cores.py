"""The cores that a bench may use: as many for XLA as for PyTorch."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any


def use_cores(count: int) -> contextlib.AbstractContextManager[None]:
    """Keeps this process on its last `count` cores, and PyTorch to as many threads.

    XLA asks once how many cores there are, when JAX first needs a device: this comes before that. Where the system
    cannot bind a process to cores (macOS), XLA takes all of them.

    Raises:
      ValueError: the process has fewer cores.
    """
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if not 1 <= count <= len(before):
        raise ValueError(f"threads={count}, expected 1 to {len(before)}, the cores of this process")
    return _use(count, before)


@contextlib.contextmanager
def _use(count: int, before: set[int]) -> Iterator[None]:
    # Or PyTorch's threads wait for each other and for more by spinning, at the cost of whoever else needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    bound = hasattr(os, "sched_setaffinity")
    torch: Any = None
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        threads = torch.get_num_threads()
        torch.set_num_threads(count)
    if bound:
        os.sched_setaffinity(0, sorted(before)[-count:])  # interrupts tend to go to the first
    try:
        yield
    finally:
        if bound:
            os.sched_setaffinity(0, before)
        if torch is not None:
            torch.set_num_threads(threads)
