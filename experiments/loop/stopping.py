"""What SIGINT (Ctrl-C) and SIGTERM do to a command, and the exit status that says so.

A training run is saved after the step at hand and ends; a second signal ends it at once. Everything else ends at once.
The exit status is 128 and the signal's number in every case, 130 or 143, as of a process that dies of it: in
`python -m experiments.causal_lm tiny && python -m experiments.sample ...` the second command is not begun.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The signal that ended a training run of this command, 0 for none: what is left to do after it returns as ever.
_ended_by = 0


class Stop:
    """Whether a run is asked to end."""

    number = 0
    """The signal that asks for it; 0 for none."""

    @property
    def requested(self) -> bool:
        return self.number != 0


class AgreedStop:
    """What a signal asks of one of several processes, all do, after the same step; likewise what has failed in one.

    A reduction over all devices runs behind each step, and what it says is read a step later, so that none waits.

    Args:
      stop: of this process.
      mesh: the devices of all.
    """

    def __init__(self, stop: Stop, mesh: Mesh):
        self.stop, self._several = stop, jax.process_count() > 1
        self._pending: jax.Array | None = None
        line = Mesh(mesh.devices.reshape(-1), ("all",))
        self._shape, self._sharding = (mesh.size, 2), NamedSharding(line, PartitionSpec("all"))
        self._largest = jax.jit(lambda said: said.max(axis=0), out_shardings=NamedSharding(line, PartitionSpec()))

    def after_step(self, failed: bool) -> tuple[bool, bool]:
        """Whether the run is to end, and whether something has failed; all processes ask after each step.

        Args:
          failed: whether it has in this one.
        """
        if not self._several:
            return self.stop.requested, failed
        before, self._pending = self._pending, self._ask(failed)
        return (False, False) if before is None else self._read(before)

    def settle(self) -> bool:
        """Whether the run is to end, as all say at this moment: waits for them."""
        if self._several:
            self._read(self._ask(False))
        return self.stop.requested

    def _ask(self, failed: bool) -> jax.Array:
        mine = np.array([[self.stop.number, failed]], np.int32)
        return self._largest(jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine))

    def _read(self, said: jax.Array) -> tuple[bool, bool]:
        number, failed = np.asarray(said)
        if number:
            _ended(self.stop, int(number))
        return bool(number), bool(failed)


def _ended(stop: Stop, number: int) -> None:
    global _ended_by
    stop.number = _ended_by = number


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes the first SIGINT or SIGTERM instead of dying of it; the second one kills as usual."""
    stop = Stop()
    before: dict[int, Any] = {}

    def handle(number, frame):
        _ended(stop, number)
        signal.signal(number, before[number])
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to quit at once", flush=True)

    with contextlib.suppress(ValueError):  # only the main thread may; elsewhere a run just cannot be interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Around a command: a SIGTERM unwinds it like a Ctrl-C, and what a stopped run returned as success is none.

    Raises:
      SystemExit: with 143 after a SIGTERM; with 130 or 143 where the command exits with 0 after its run was stopped.
    """
    global _ended_by
    _ended_by = 0
    before: Any = None

    def terminate(number, frame):
        print("terminated", file=sys.stderr)
        raise SystemExit(status_of(number))

    with contextlib.suppress(ValueError):  # as above
        before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SystemExit as ended:
        if not ended.code and _ended_by:
            raise SystemExit(status_of(_ended_by)) from None
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def status_of(number: int) -> int:
    """The exit status of a process that a signal ended."""
    return 128 + number
