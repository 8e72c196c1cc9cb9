"""What the operations of `ssm` and `m2` take on a TPU or GPU that is not here, forward and gradient.

    python -m experiments.aot.operations                                   # v5e, 8 rows of 2,048 positions
    python -m experiments.aot.operations --lengths 65536 --only ssd trapezoid
    python -m experiments.aot.operations --device h100
    python -m experiments.aot.operations --only scan                       # the selective scan's implementations
    python -m experiments.aot.operations --only convolution                # the long one's implementations
    python -m experiments.aot.operations --only images --batch-size 64 --lengths 196 3136

Widths of the 130M models (Mamba: e 1536, n 16; Mamba-2 and -3: 24 heads of 64, n 128; linear attention: 12 heads of
64; M2-BERT: width 768, 4 blocks), bfloat16 but for rates, steps, states and filters. A gradient is that of the sum of
all outputs in all floating inputs. Positions of images are their places. Temporaries are beside inputs and outputs.
"Schedule" is the time that issuing all instructions takes, without waits for memory and with both sides of branches
(`experiments.aot.schedule`): it compares forms of one operation. "At least" where a loop's trips could not be read.
Nothing runs on a TPU or GPU.
"""

import dataclasses
import functools
import math
import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import m2
import ssm
from experiments.aot.programs import compile_for
from experiments.aot.schedule import CLOCKS, Schedule, clear_dump, read_schedule, start_dump
from experiments.aot.targets import find_target, missing
from experiments.loop import flags

MIB = 2**20
BF16, F32 = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, and for what."""

    device: str = "v5e:2x2"
    """A TPU topology (one device of it is used) or h100."""
    lengths: tuple[int, ...] = (2048,)
    """Positions of a row."""
    batch_size: int = 8
    """Rows."""
    only: tuple[str, ...] = ()
    """Operations, by their names or a part of several. Empty takes all."""
    passes: tuple[str, ...] = ("forward", "gradient")
    """What is compiled of each."""
    schedule: bool = True
    """Whether to read a TPU's schedule, which takes compiling once more."""
    parts: int = 0
    """How many parts of the schedule to print below a row, those that issue most."""


class Operation(NamedTuple):
    """An operation at the widths of a model."""

    name: str
    call: Callable[..., Any]
    shapes: Callable[[int, int], dict[str, jax.ShapeDtypeStruct]]
    """Its arguments, from rows and positions."""
    step: bool = False
    """Whether it takes a single position."""


def _shapes(axes: dict[str, str], sizes: dict[str, int], wide: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Arguments by their axes; those named in `wide` are float32, others bfloat16."""
    return {
        name: jax.ShapeDtypeStruct([sizes[axis] for axis in letters.split()], F32 if name in wide.split() else BF16)
        for name, letters in axes.items()
    }


def _scan_shapes(b: int, length: int, l: str = "l ") -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"u": f"b {l}e", "delta": f"b {l}e", "A": "e n", "B": f"b {l}n", "C": f"b {l}n"}
    axes |= {"D": "e", "z": f"b {l}e"} | ({} if l else {"state": "b e n"})
    return _shapes(axes, {"b": b, "l": length, "e": 1536, "n": 16}, "A D state")


def _ssd_shapes(b: int, length: int, l: str = "l ") -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"x": f"b {l}h p", "dt": f"b {l}h", "A": "h", "B": f"b {l}g n", "C": f"b {l}g n", "D": "h"}
    axes |= {} if l else {"state": "b h p n"}
    return _shapes(axes, {"b": b, "l": length, "h": 24, "p": 64, "g": 1, "n": 128}, "dt A D state")


def _trapezoid_shapes(b: int, length: int, l: str = "l ") -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"v": f"b {l}r h p", "k": f"b {l}r h n", "q": f"b {l}r h n", "dt": f"b {l}h", "A": f"b {l}h"}
    axes |= {"lam": f"b {l}h", "D": "h"} | ({} if l else {"h": "b h p n", "k_in": "b r h n", "v_in": "b r h p"})
    return _shapes(axes, {"b": b, "l": length, "r": 1, "h": 24, "p": 64, "n": 128}, "dt A lam D h")


def _attention_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"q": "b l h n", "k": "b l h n", "v": "b l h n", "log_decay": "b l h"}
    return _shapes(axes, {"b": b, "l": length, "h": 12, "n": 64}, "log_decay")


def _conv_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return _shapes({"x": "b l e", "weight": "e w", "bias": "e"}, {"b": b, "l": length, "e": 1536, "w": 4}, "")


def _long_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"u": "b l d", "k": "d l", "bias": "d", "input_gate": "b l d", "output_gate": "b l d"}
    return _shapes(axes, {"b": b, "l": length, "d": 768}, "k bias")


def _image_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"u": "b x x d", "k": "d m m", "bias": "d", "input_gate": "b x x d", "output_gate": "b x x d"}
    return _shapes(axes, {"b": b, "x": math.isqrt(length), "m": 2 * math.isqrt(length), "d": 768}, "k bias")


def _causal_monarch_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"u": "b l d", "k": "d l", "l_coefficients": "t t", "r_coefficients": "t s s"}
    t = math.isqrt(length - 1) + 1
    sizes = {"b": b, "l": length, "d": 768, "t": t, "s": -(-length // t)}
    return _shapes(axes, sizes, "k l_coefficients r_coefficients")


def _monarch_shapes(b: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    axes = {"x": "b l d", "w1": "k q p", "w2": "k q q"}
    return _shapes(axes, {"b": b, "l": length, "d": 768, "k": 4, "q": 768, "p": 192}, "")


def _monarch(x: Any, w1: Any, w2: Any) -> Any:
    return m2.monarch_matmul(x, w1, w2)


def _long(implementation: Any) -> Callable[..., Any]:
    return functools.partial(m2.fft_conv, implementation=implementation)


def _trapezoid_step(h: Any, k_in: Any, v_in: Any, **others: Any) -> Any:
    return ssm.trapezoid_step(ssm.TrapezoidState(h, k_in, v_in), **others)


def _in(implementation: Any) -> Callable[..., Any]:
    return functools.partial(ssm.selective_scan, implementation=implementation)


OPERATIONS = (
    Operation("selective scan", ssm.selective_scan, _scan_shapes),
    Operation("selective scan, sequential", _in("sequential"), _scan_shapes),
    Operation("selective scan, associative", _in("associative"), _scan_shapes),
    Operation("ssd", ssm.ssd, _ssd_shapes),
    Operation("trapezoid", ssm.trapezoid, _trapezoid_shapes),
    Operation("linear attention", ssm.linear_attention, _attention_shapes),
    Operation("short convolution", ssm.causal_conv1d, _conv_shapes),
    Operation("long convolution", m2.fft_conv, _long_shapes),
    Operation("long convolution, xla", _long("xla"), _long_shapes),
    Operation("long convolution, pallas", _long("pallas"), _long_shapes),
    Operation("images' convolution", m2.fft_conv2d, _image_shapes),
    Operation("causal Monarch", m2.causal_monarch, _causal_monarch_shapes),
    Operation("Monarch matrix, 768 to 3,072", _monarch, _monarch_shapes),
    Operation("selective step", ssm.selective_step, functools.partial(_scan_shapes, l=""), step=True),
    Operation("ssd step", ssm.ssd_step, functools.partial(_ssd_shapes, l=""), step=True),
    Operation("trapezoid step", _trapezoid_step, functools.partial(_trapezoid_shapes, l=""), step=True),
)


class Item(NamedTuple):
    """One program."""

    operation: int
    """Which of `OPERATIONS`."""
    kind: str
    length: int
    batch_size: int

    def build(self) -> tuple[Callable[..., Any], dict[str, jax.ShapeDtypeStruct]]:
        """The function and its arguments."""
        operation = OPERATIONS[self.operation]
        shapes = operation.shapes(self.batch_size, self.length)

        def forward(arguments):
            return operation.call(**arguments)

        def total(arguments):
            return sum(jnp.sum(x.astype(F32)) for x in jax.tree.leaves(forward(arguments)))

        return (forward if self.kind == "forward" else jax.grad(total)), shapes


def _read(item: Item, device: str, folder: str) -> Schedule:
    """In a process whose libtpu writes down schedules."""
    clear_dump(folder)
    compile_for(find_target(device), *item.build())
    return read_schedule(folder)


def main() -> int:
    """Compiles each, and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.aot.operations", description=__doc__)
        if unknown := set(config.passes) - {"forward", "gradient"}:
            raise ValueError(f"--passes {' '.join(unknown)}, expected forward or gradient")
        names = [op.name for op in OPERATIONS]
        chosen = [
            i
            for i, name in enumerate(names)
            if not config.only or name in config.only or any(part in name for part in config.only if part not in names)
        ]
        if not chosen:
            raise ValueError(f"--only {' '.join(config.only)} matches none of: {', '.join(names)}")
        if why := missing(config.device):
            raise ValueError(why)
    items = [
        Item(i, kind, length, config.batch_size)
        for length in config.lengths
        for i in chosen
        for kind in (("forward",) if OPERATIONS[i].step else config.passes)
        if not (OPERATIONS[i].step and length != config.lengths[0])
    ]
    print("| operation | pass | rows x positions | temporaries, MiB | schedule, ms | compiled, CPU s |")
    print("| --- | --- | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as folder:
        spawned = multiprocessing.get_context("spawn")
        with spawned.Pool(1, initializer=start_dump, initargs=(folder,)) as pool:
            for item in items:
                for line in _lines(item, config, lambda *args: pool.apply(_read, (*args, folder))):
                    print(line, flush=True)
    return 0


def _lines(item: Item, config: Config, read: Callable[[Item, str], Schedule]) -> list[str]:
    """The row of a program, and the largest parts of its schedule."""
    operation, kind = OPERATIONS[item.operation], config.device.partition(":")[0]
    size = f"{item.batch_size} x {1 if operation.step else item.length:,}"
    head = f"| {operation.name} | {item.kind} | {size}"
    try:
        program = compile_for(find_target(config.device), *item.build())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [f"{head} | too large | | |"]
    lines, milliseconds = [], ""
    if config.schedule and kind in CLOCKS:
        schedule = read(item, config.device)
        milliseconds = ("at least " if schedule.unknown else "") + f"{schedule.milliseconds(kind):.2f}"
        parts = list(schedule.parts.items())[: config.parts]
        lines = [f"    {bundles / schedule.bundles:5.1%}  {name}" for name, bundles in parts]
    return [f"{head} | {program.temporaries / MIB:,.0f} | {milliseconds} | {program.seconds:.1f} |", *lines]


if __name__ == "__main__":
    flags.run(main)
