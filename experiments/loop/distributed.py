"""Several processes that train one model: on several machines, or one for each device of a machine.

    srun python -m experiments.causal_lm mamba2-1.3b --distributed auto        # SLURM; alike on TPU pods and Open MPI
    python -m experiments.causal_lm tiny --distributed localhost:4321,2,0 &    # two processes on one machine
    python -m experiments.causal_lm tiny --distributed localhost:4321,2,1

Each runs the same command and sees the devices of all (`jax.distributed`). The first, process 0, alone prints and
writes; its files must be seen by the others. What they have to agree on goes through the service of process 0, not
through the devices. When one ends with an error or is killed, the others end within `SILENCE` seconds, each with a
line that says so.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Value = TypeVar("Value")  # what JSON holds
Function = TypeVar("Function", bound=Callable[..., None])

# Seconds without a sign of life after which a process counts as dead; and between two such signs.
SILENCE, BEAT = 60, 2
# Seconds without one where an operation over all processes has failed: one of them is dead, which one is the question.
SHORT_SILENCE = 8
# Seconds that processes wait for one another at the start.
START = 300
# Seconds that those that have done their work wait for one that still writes.
END = 86_400
# Variables of launchers that say how many processes there are; TPU's is a list of machines.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TPU_WORKER_HOSTNAMES")

_counter = itertools.count()
_watch: "_Watch | None" = None


class EndedElsewhere(SystemExit):
    """Process 0 has failed at what this one waited for, and has said why."""


def _client() -> Any:
    """The connection to the service; None of a lone process."""
    from jax._src.distributed import global_state  # JAX itself, orbax and flax have no other way to it

    return global_state.client


def index() -> int:
    """Which process this is. Unlike `jax.process_index` it starts no device."""
    from jax._src.distributed import global_state

    return global_state.process_id


def count() -> int:
    """How many processes there are."""
    from jax._src.distributed import global_state

    return global_state.num_processes


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return index() == 0


def prefix() -> str:
    """What goes before an error, to tell processes other than process 0 apart."""
    return "" if is_first() else f"process {index()} of {count()}: "


def start(spec: str | None, config: Mapping[str, Any]) -> None:
    """Joins the other processes, before any device is used.

    Args:
      spec: what --distributed says: "auto", "host:port,count,index", "off", or None.
      config: of this process, flat, for comparison with that of process 0.

    Raises:
      ValueError: a launcher has started several and --distributed is missing; nothing could be found out, or reached;
        or a flag differs from that of process 0.
    """
    global _watch
    if spec in (None, "off"):
        if spec is None and (said := _launched()):
            raise ValueError(
                f"{said} says that there are several processes, each of which would train by itself: add "
                "--distributed auto, or --distributed off where that is meant"
            )
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where: dict[str, Any] = {} if spec == "auto" else _parsed(spec)
    try:
        times: dict[str, Any] = {"initialization_timeout": START, "heartbeat_timeout_seconds": 2 * SILENCE}
        jax.distributed.initialize(**where, **times, shutdown_timeout_seconds=END)
        if not is_first():
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo prints past Python
        _watch = _Watch()
        jax.devices()  # all processes at the same time, or those that are late are waited for in vain
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        hint = "; no launcher was found: give host:port,count,index" if "should be defined" in why else ""
        raise ValueError(f"--distributed {spec}: the processes do not find one another ({why[:300]}){hint}") from error
    _say_if_aborted()
    mine = {name: value for name, value in config.items() if not name.endswith("distributed")}
    _compare({"jax": jax.__version__, "devices": len(jax.local_devices())} | mine)
    _connect()
    if is_first():
        print(f"{count()} processes, {jax.device_count()} devices", flush=True)


def agreed(make: Callable[[], Value]) -> Value:
    """What process 0 makes, in all of them: they wait for it. It must be plain JSON.

    All processes must come by here equally often.

    Raises:
      EndedElsewhere: process 0 has failed at it.
    """
    if count() == 1:
        return make()
    key = f"agreed/{next(_counter)}"
    if not is_first():
        said = wait_for(key)
        if "error" in said:
            raise EndedElsewhere(1)
        return said["value"]
    try:
        value = make()
    except BaseException:
        tell(key, {"error": True})
        raise
    tell(key, {"value": value})
    return value


def said_by_all(value: Value) -> list[Value]:
    """What each process says, in the order of their numbers. It must be plain JSON."""
    if count() == 1:
        return [value]
    key = f"said/{next(_counter)}"
    tell(f"{key}/{index()}", value)
    return [wait_for(f"{key}/{process}") for process in range(count())]


def meet() -> None:
    """Returns when all processes have come by here: as often as this one.

    On CPUs a group of devices connects when it first exchanges something, and waits for half a minute. So all of them
    begin together with what each has compiled at its own pace.
    """
    said_by_all(True)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """What is inside is done by process 0; then, where it has gone well, by the others: they find what it has kept.

    Nothing in it may compute with the devices of several processes.
    """
    if is_first():
        with contextlib.ExitStack() as stack:
            if count() > 1:
                key = f"first/{next(_counter)}"
                stack.push(lambda kind, *_: tell(key, {"error": True} if kind else {}))
            yield
        return
    if "error" in wait_for(f"first/{next(_counter)}"):
        raise EndedElsewhere(1)
    yield


def by_first(function: Function) -> Function:
    """Makes a function that writes do nothing but in process 0."""

    @functools.wraps(function)
    def alone(*args: Any, **options: Any) -> None:
        if is_first():
            function(*args, **options)

    return alone  # type: ignore[return-value]


def tell(key: str, value: Any) -> None:
    """Says something, once, to all processes."""
    _client().key_value_set(key, json.dumps(value))


def wait_for(key: str) -> Any:
    """What a process says by a key, as soon as it does. Where that process dies, this one ends."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, 1000))  # a signal is heeded in between
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """Around a command: where one of several processes fails, the others learn of it, and none waits for it."""
    try:
        yield
    except BaseException as error:
        if _watch is None:
            raise
        if isinstance(error, SystemExit) and not error.code:
            _watch.end("")
            raise
        if not isinstance(error, SystemExit):
            if "Gloo" in str(error) or isinstance(error, jax.errors.JaxRuntimeError):
                _watch.blame()
            traceback.print_exc()
        _watch.end(f"status {error.code}" if isinstance(error, SystemExit) else " ".join(str(error).split())[:300])
        _leave(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _leave(status: int) -> NoReturn:
    """Ends this process at once: what Python does at its end would wait for the others."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


class _Watch:
    """Says every few seconds that this process lives, and ends it where another does not."""

    def __init__(self):
        self._said = "alive"
        self._seen: dict[int, tuple[str, float]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def end(self, why: str) -> None:
        """Says that this process ends, and why if that is an error. Process 0 stays for others to hear it."""
        with self._lock:
            self._said = f"ended {why}" if why else "done"
        with contextlib.suppress(Exception):
            self._look(0)
            until = time.monotonic() + SHORT_SILENCE
            while why and is_first() and time.monotonic() < until and not self._all_over():
                time.sleep(0.2)
                self._look(0)

    def blame(self) -> None:
        """Finds out which process has died, for an operation over all of them has failed; ends this one where found."""
        until = time.monotonic() + 3 * SHORT_SILENCE
        while time.monotonic() < until:
            with contextlib.suppress(Exception):
                if line := self._lost(SHORT_SILENCE):
                    self._quit(line)
            time.sleep(0.5)

    def _run(self) -> None:
        for number in itertools.count():
            try:
                self._look(number)
                line = self._lost(SILENCE)
            except Exception:  # the service is gone, or JAX's connection to it has been closed at the end
                if self._said == "done":
                    return
                line = "process 0 cannot be reached any more"
            if self._said.startswith("ended"):
                return
            if line:  # also where this one has done its work, and waits for the others to have done theirs
                self._quit(line)
            time.sleep(BEAT)

    def _look(self, number: int) -> None:
        with self._lock:
            said = self._said
        _client().key_value_set(f"watch/{index()}", said if said != "alive" else f"alive {number}", True)
        now = time.monotonic()
        for key, said in _client().key_value_dir_get("watch/"):
            process = int(key.rpartition("/")[2])
            if self._seen.get(process, ("", 0.0))[0] != said:
                self._seen[process] = (said, now)

    def _lost(self, silence: float) -> str:
        now = time.monotonic()
        for process, (said, when) in sorted(self._seen.items()):
            if process == index() or said == "done":
                continue
            if said.startswith("ended"):
                return f"process {process} of {count()} has ended: {said.removeprefix('ended ')}"
            if now - when > silence:
                return f"process {process} of {count()} has given no sign of life for {now - when:.0f} s"
        return ""

    def _all_over(self) -> bool:
        over = [p for p, (said, _) in self._seen.items() if not said.startswith("alive")]
        return len(over) == count()

    def _quit(self, line: str) -> NoReturn:
        print(f"error: {line}; this one, {index()}, ends too: the same commands resume the run", file=sys.stderr)
        with self._lock:
            self._said = "done"
        if is_first():  # or its service would be gone before all others have looked
            time.sleep(2 * BEAT)
        _leave(1)


def _say_if_aborted() -> None:
    """Ends with a line where JAX aborts this process: it does so when that of the service, process 0, is gone."""
    text = f"error: process 0 of {count()} has ended; this one, {index()}, ends too: the same commands resume the run\n"

    def handler(_number: int) -> None:
        os.write(2, text.encode())
        os._exit(1)

    # Python's own handlers run between two of its instructions, and there is none after an abort.
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    _say_if_aborted.kept = kept  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.CFUNCTYPE(None, ctypes.c_int)]
        library.signal(int(signal.SIGABRT), kept)


def _launched() -> str:
    """A launcher's variable that says that there are several processes; empty where none does."""
    for name in LAUNCHERS:
        said = os.environ.get(name, "")
        if (said.isdecimal() and int(said) > 1) or "," in said:
            return f"{name}={said}"
    return ""


def _parsed(spec: str) -> dict[str, Any]:
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", spec)
    if not found or not int(found[3]) < int(found[2]):
        raise ValueError(
            f"--distributed {spec}, expected auto, off, or host:port,count,index with index from 0 to count - 1, such "
            "as gpu-1:4321,2,0 for the first of two processes"
        )
    return {
        "coordinator_address": found[1],
        "num_processes": int(found[2]),
        "process_id": int(found[3]),
        "cluster_detection_method": "deactivate",
    }


def _connect() -> None:
    """Lets all devices exchange something, while all processes are at the same place; see `meet`."""
    line = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    cut, whole = (jax.sharding.NamedSharding(line, jax.sharding.PartitionSpec(*axes)) for axes in (("all",), ()))
    numbers = jax.make_array_from_callback((line.size,), cut, lambda _: np.ones(1, np.int32))
    program = jax.jit(jnp.sum, out_shardings=whole).lower(numbers).compile()
    meet()
    program(numbers).block_until_ready()


def _compare(mine: Mapping[str, Any]) -> None:
    """Raises a ValueError in process 0, naming the first field in which a process's configuration differs from its."""
    written = {name: json.dumps(value, default=str) for name, value in mine.items()}
    tell(f"config/{index()}", written)

    def check() -> bool:
        for process in range(1, count()):
            theirs = wait_for(f"config/{process}")
            for name in {**written, **theirs}:
                if written.get(name) != theirs.get(name):
                    here, there = written.get(name, "nothing"), theirs.get(name, "nothing")
                    flag = name if name in ("jax", "devices") else "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} is {here} in process 0 and {there} in process {process}")
        return True

    agreed(check)
