"""Devices that are not here, to compile for: their names, their memory, and what compiling for them needs.

    pip install 'jax[tpu]'             # libtpu: the compiler for every TPU, no TPU needed
    pip install 'jax[cuda12-local]'    # the compiler for NVIDIA's cards, no driver and no CUDA needed

A topology stands for the devices: it has no memory and runs nothing. Numbers about the H100 are NVIDIA's own, as XLA's
`GpuTargetConfig` takes them (h100.txtpb).
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxlib.utils import absl_set_min_log_level

from experiments.aot.quiet import quiet
from zoo.layers.names import unknown_name

GIB = 2**30
# The name of a topology without its shape -> GiB of a device that a program can have, what libtpu 0.0.52 says in the
# error about a program that is too large; and bytes a second that it reads or writes there, from Google's Cloud TPU
# pages. A JAX device of a tpu7x is one of a chip's two cores, and so is one of a v4 in a topology.
_TPUS = {
    "v5e": (15.75, 819e9),
    "v5p": (95.73, 2765e9),
    "v6e": (31.24, 1640e9),
    "tpu7x": (94.74, 7380e9 / 2),
    "v4": (15.25, 1228e9 / 2),
}
_GPUS = {"h100": ("h100.txtpb", 84_942_979_072, 3352e9)}  # all of the card's memory: driver and XLA's own keep some
# Nothing is tuned without a card, and with tiles that are not tuned some of Triton's products do not compile (float32
# in full precision, jaxlib 0.10.1): cuBLAS's always do.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
EXAMPLES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100")


class Target(NamedTuple):
    """Devices to compile for."""

    name: str
    """As it was asked for, "v5e:2x2"."""
    platform: str
    """What `jax.jit(f).trace(...).lower(lowering_platforms=...)` calls it: "tpu" or "cuda"."""
    devices: tuple[Any, ...]
    """What stands for them in a sharding or a mesh."""
    memory: int
    """Bytes of each that a program can have."""
    bandwidth: float
    """Bytes a second between a device and that memory."""
    options: dict[str, Any]
    """Options of its compiler."""


def missing(name: str) -> str | None:
    """What has to be installed to compile for a device, in a line, or None: nothing.

    Raises:
      ValueError: an unknown device.
    """
    package, module = ("jax-cuda12-plugin", "jax_cuda12_plugin") if _is_gpu(name) else ("libtpu", "libtpu")
    if importlib.util.find_spec(module):
        return None
    return f"{name}: {package} is not installed here; pip install --constraint constraints.txt '.[aot]'"


@functools.cache
def find_target(name: str) -> Target:
    """The devices of a name.

    Where no backend of JAX has started yet, the CPU's will be the only one: a process that compiles for devices that
    are not here looks for none.

    Args:
      name: a TPU topology, "v5e:2x2" (v5p, v6e and tpu7x likewise; chips along each axis), or "h100" (one card).

    Raises:
      ValueError: an unknown device.
      RuntimeError: its compiler is not installed, or JAX has started without it.
    """
    if why := missing(name):
        raise RuntimeError(why)
    _settle()
    from jax.experimental import topologies  # slow, and only here

    if _is_gpu(name):
        file, memory, bandwidth = _GPUS[name]
        facts = (Path(__file__).parent / file).read_text(encoding="utf-8")
        try:
            found = topologies.get_topology_desc(name, "cuda", target_config=facts, topology="1x1x1")
        except NotImplementedError as error:  # JAX started another backend, and the plugin gave up without a card
            raise RuntimeError(f"{name}: JAX has looked for a card already; start with JAX_PLATFORMS=cpu") from error
        return Target(name, "cuda", tuple(found.devices), memory, bandwidth, _GPU_OPTIONS)
    try:
        found = topologies.get_topology_desc(name, "tpu")
    except Exception as error:  # of libtpu, about the shape
        raise ValueError(f"device={name!r}: {' '.join(str(error).split())}") from error
    gib, bandwidth = _TPUS[name.partition(":")[0]]
    return Target(name, "tpu", tuple(found.devices), int(gib * GIB), bandwidth, {})


def _is_gpu(name: str) -> bool:
    kind = name.partition(":")[0]
    if name not in _GPUS and not (kind in _TPUS and ":" in name):
        raise ValueError(f"{unknown_name('device', name, EXAMPLES)}; a TPU's name says its shape, as v5e:2x2 does")
    return name in _GPUS


def _settle() -> None:
    """Lets the compilers be loaded where there are no devices, by several processes, and silences them."""
    quiet()
    absl_set_min_log_level(3)
    if jax.config.values["jax_platforms"] is None:  # too late, and without effect, where backends have started
        jax.config.update("jax_platforms", "cpu")
