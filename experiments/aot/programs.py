"""A function compiled for devices that are not here, and what the program needs there.

    program = compile_for(find_target("v5e:2x2"), loss_and_gradient, params, batch)
    program.temporaries / 2**20     # MiB on each device

What is known ahead of time: that it compiles, its memory, its text with all collectives, and how long compiling took.
Not known: how fast it runs. `cost_analysis` counts a loop's body once, and says nothing of a GPU's programs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from experiments.aot.targets import Target
from experiments.loop.compiled import without_cache

Level = Literal["O0", "O1", "O2", "O3"]


class Program(NamedTuple):
    """A compiled program. Sizes are bytes on each device."""

    compiled: jax.stages.Compiled
    seconds: float
    """CPU seconds, of all threads, that lowering and compiling took."""
    arguments: int
    outputs: int
    temporaries: int
    code: int
    aliased: int
    """Bytes of outputs that lie where (donated) arguments lay."""

    @property
    def memory(self) -> int:
        """All that it needs on each device while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_for(target: Target, function: Callable, *args: Any, optimization_level: Level | None = None) -> Program:
    """Compiles a function for a target: never runs it, and never takes the program from a cache.

    Args:
      target: from `find_target`.
      function: a function of arrays; a jitted one keeps its options, such as donated arguments.
      *args: pytrees of arrays or of `jax.ShapeDtypeStruct`s, as large as you like. Those without a sharding over the
        target's devices lie on the first of them; see `placed` for several. Other leaves are refused by `jax.jit`.
      optimization_level: how hard the compiler tries, as `jax_optimization_level` says it. None: as JAX is set.

    Raises:
      jax.errors.JaxRuntimeError: the program cannot be compiled, "RESOURCE_EXHAUSTED" where it needs more memory than
        the device has.
    """
    here = SingleDeviceSharding(target.devices[0])
    known = set(target.devices)

    def shape(x):
        sharding = getattr(x, "sharding", None)
        ours = sharding is not None and set(sharding.device_set) <= known
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if ours else here)

    args = jax.tree.map(shape, args)
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with without_cache(), _at(optimization_level):
        start = time.process_time()
        compiled = jitted.trace(*args).lower(lowering_platforms=(target.platform,)).compile(target.options)
        seconds = time.process_time() - start
    found = compiled.memory_analysis()
    return Program(
        compiled,
        seconds,
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
        found.alias_size_in_bytes,
    )


@contextlib.contextmanager
def _at(level: Level | None) -> Iterator[None]:
    """Has JAX compile at a level."""
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", level or before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def placed(tree: Any, sharding: Sharding) -> Any:
    """The shapes and dtypes of a tree of arrays, all with one sharding: arguments of `compile_for`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
