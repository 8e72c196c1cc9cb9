"""What a model's step takes on TPUs and GPUs that are not here: it is compiled for them, and not run.

    python -m experiments.aot mamba2-130m --device v5e:2x2 --batch-size 16
    python -m experiments.aot mamba2-130m --device v5e:2x2 h100 --what decode --seq-len 4096
    python -m experiments.aot mamba2-1.3b --device v5p:2x2x1 --mesh.fsdp 4 --train.accumulate 4
    python -m experiments.aot m2-bert-80m-8k --device h100 --model.remat-keeps nothing
    python -m experiments.aot vim-small --device v6e:2x2 --schedule         # the compiler's schedule of its parts
    python -m experiments.aot m2-bert-80m --optimization-level O2           # as training compiles it
    python -m experiments.aot --report RESULTS.md                           # models x devices, as a table

The model is a published shape, in bfloat16, its layers looped and recomputed but for what linear maps give:
`--model.dtype bfloat16 --model.scan-layers --model.remat --model.remat-keeps matmuls` of the training commands. The
step is the training loop's own, on a mesh of all devices of the name. Memory is the compiler's plan, and operations are
our count; neither says how fast it will run. Needs the compilers: `pip install --constraint constraints.txt '.[aot]'`.

For a TPU it is compiled at O1, which takes less than half the time of O2 and plans some hundredths more memory, but
makes a slower program: training takes O2, and so does --schedule here. JAX_OPTIMIZATION_LEVEL tells all of them another
level.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax

import zoo
from experiments.aot.costs import step_flops
from experiments.aot.programs import Level, Program, compile_for
from experiments.aot.schedule import CLOCKS, Schedule, clear_dump, read_schedule, start_dump
from experiments.aot.steps import What, make_step
from experiments.aot.targets import Target, find_target, missing
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, make_mesh
from experiments.loop.metrics import peak_flops
from zoo.layers.names import unknown_name

KINDS = (zoo.CausalLMConfig, zoo.MaskedLMConfig, zoo.ImageClassifierConfig)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, and for what."""

    device: tuple[str, ...] = ("v5e:2x2",)
    """Devices: TPU topologies, v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, of any shape; h100."""
    what: What = "train"
    """train: the whole training step. decode: the next token of each row, from its state. forward: logits of a
    batch."""
    batch_size: int = 16
    """Rows, or images, over all devices and micro-batches."""
    seq_len: int = 2048
    """Tokens of a row; in decoding, those that attention's cache has room for. Image classifiers have their own."""
    accumulate: Annotated[int, flags.alias("--train.accumulate")] = 1
    """Micro-batches of a training step."""
    mesh: MeshConfig = MeshConfig()
    """How the devices stand; all along data where nothing is said."""
    optimization_level: Level | None = None
    """How hard the compiler tries. None: as JAX is told (JAX_OPTIMIZATION_LEVEL); where it is told nothing, O1 for a
    TPU, but O2, as in training, with --schedule."""
    schedule: bool = False
    """Whether to show the parts of a TPU's program that issue most instructions. For one device."""

    def __post_init__(self):
        if not self.device:
            raise ValueError("--device without a name, expected one at least")
        if self.schedule and len(self.device) > 1:
            raise ValueError("--schedule with several devices, expected one: the compiler writes down one program")


@dataclasses.dataclass(frozen=True)
class CausalConfig(Config):
    """Of a causal language model."""

    model: zoo.CausalLMConfig = zoo.CausalLMConfig()
    """Shape of the model."""


@dataclasses.dataclass(frozen=True)
class MaskedConfig(Config):
    """Of a masked language model."""

    model: zoo.MaskedLMConfig = zoo.MaskedLMConfig()
    """Shape of the model."""


@dataclasses.dataclass(frozen=True)
class ImageConfig(Config):
    """Of an image classifier."""

    model: zoo.ImageClassifierConfig = zoo.ImageClassifierConfig()
    """Shape of the model."""


def preset(name: str) -> Any:
    """The configuration that a published shape starts from."""
    model = zoo.presets[name]
    options: dict[str, Any] = {"dtype": "bfloat16", "scan_layers": True, "remat": True, "remat_keeps": "matmuls"}
    if isinstance(model, zoo.CausalLMConfig):
        return CausalConfig(model=dataclasses.replace(model, **options))
    if isinstance(model, zoo.MaskedLMConfig):
        length = min(model.max_len or 2048, 8192)
        rows = max(4, 128 * 128 // length)
        return MaskedConfig(model=dataclasses.replace(model, **options), batch_size=rows, seq_len=length)
    assert isinstance(model, zoo.ImageClassifierConfig)
    return ImageConfig(model=dataclasses.replace(model, **options), batch_size=64)


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of compiling for one target."""

    target: Target
    tokens: int
    """Tokens, or images, a step."""
    flops: float
    """Operations a step, over all devices."""
    program: Program | None
    """None: it does not fit."""
    level: Level | None
    """How hard the compiler tried. None: as JAX is told."""
    refused: str = ""
    """The compiler's words, where it does not."""

    @property
    def fits(self) -> bool:
        """Whether each device has the memory."""
        return self.program is not None and self.program.memory <= self.target.memory


def level_of(config: Config, target: Target) -> Level | None:
    """How hard the compiler tries for a configuration's step, where something else is said than by JAX."""
    told = jax.config.values["jax_optimization_level"] != "UNKNOWN"
    if config.optimization_level or told or config.schedule or target.platform != "tpu":
        return config.optimization_level
    return "O1"


def compile_step(config: Any, device: str) -> Found:
    """Compiles a configuration's step for one of its devices."""
    target = find_target(device)
    level = level_of(config, target)
    mesh = make_mesh(config.mesh, target.devices)
    with jax.set_mesh(mesh):
        sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        step = make_step(config.model, mesh, config.what, accumulate=config.accumulate, **sizes)
        flops = step_flops(config.model, config.what, config.batch_size, config.seq_len)
        try:
            program = compile_for(target, step.program, *step.arguments, optimization_level=level)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Found(target, step.tokens, flops, None, level, str(error).splitlines()[0])
    return Found(target, step.tokens, flops, program, level)


def describe(name: str, config: Any, found: Found) -> str:
    """The page that is printed of one target."""
    target, program, n = found.target, found.program, len(found.target.devices)
    images = isinstance(config.model, zoo.ImageClassifierConfig)
    rows = f"{config.batch_size} " + ("images" if images else f"rows x {config.seq_len:,} tokens")
    lines = [f"{name} {config.what}, {rows}: {n} x {target.devices[0].device_kind} ({target.name})"]
    if program is None:
        return "\n".join([*lines, f"  does not fit: {found.refused}"])

    def line(what: str, text: str) -> None:
        lines.append(f"  {what:<12} {text}")

    sizes = {"arguments": program.arguments, "outputs": program.outputs - program.aliased}
    sizes |= {"temporaries": program.temporaries, "code": program.code}
    for what, size in sizes.items():
        line(what, f"{size / MIB:10,.0f} MiB" + (" besides those that lie in arguments" if what == "outputs" else ""))
    share = program.memory / target.memory
    verdict = "fits" if found.fits else "does not fit"
    line("a device", f"{program.memory / MIB:10,.0f} MiB, {share:.0%} of {target.memory / MIB:,.0f}: {verdict}")
    peak = peak_flops(target.devices[0])
    least = f", {found.flops / n / peak * 1e3:.3g} ms at {peak / 1e12:,.0f} TFLOP/s" if peak else ""
    line("operations", f"{found.flops / n / 1e12:10.3g} TFLOP a device{least}")
    moved = program.arguments + program.outputs
    line("bytes", f"{moved / MIB:10,.0f} MiB in and out once, {moved / target.bandwidth * 1e3:.3g} ms")
    line("compiled in", f"{program.seconds:10,.1f} s of CPU time" + (f" at {found.level}" if found.level else ""))
    return "\n".join(lines)


def describe_schedule(schedule: Schedule, program: Program, device: str) -> str:
    """The parts of a TPU's program that issue most bundles, with what they compute."""
    kind, text = device.partition(":")[0], program.compiled.as_text() or ""
    clock = f", {schedule.milliseconds(kind):.1f} ms without waits for memory" if kind in CLOCKS else ""
    lines = [f"  schedule     {schedule.bundles:,} bundles{clock}"]
    for part, bundles in list(schedule.parts.items())[:12]:
        lines.append(f"    {bundles / max(1, schedule.bundles):5.1%}  {part}  {_computes(text, part)}".rstrip())
    if schedule.unknown:
        lines.append(f"    (parts with a loop of unknown length, which is counted once: {len(schedule.unknown)})")
    return "\n".join(lines)


def _computes(text: str, part: str) -> str:
    """The operation of our code that a part of the program comes from."""
    for line in text.splitlines():
        if f"%{part} = " in line and 'op_name="' in line:
            return line.partition('op_name="')[2].partition('"')[0]
    return ""


def main() -> int:
    """Compiles, and prints what it takes; 1 where it does not fit somewhere."""
    if any(argument.partition("=")[0] == "--report" for argument in sys.argv[1:]):
        from experiments.aot import report

        return report.main()
    presets = {name: config for name, config in zoo.presets.items() if isinstance(config, KINDS)}
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked and not asked.startswith("-") and asked not in presets:
        raise flags.UsageError(unknown_name("preset", asked, presets))
    name = asked if asked in presets else "mamba2-130m"
    line = f"A published shape, as are {', '.join(presets)}."
    with flags.usage_errors():
        config: Any = flags.parse({name: (line, preset(name))}, prog="python -m experiments.aot", description=__doc__)
        for device in config.device:
            if why := missing(device):
                raise flags.UsageError(why)
    fits = True
    with tempfile.TemporaryDirectory() as folder:
        if config.schedule:
            start_dump(folder)
        for device in config.device:
            with flags.usage_errors():
                found = compile_step(config, device)
            print(describe(name, config, found), flush=True)
            if config.schedule and found.program is not None and found.target.platform == "tpu":
                print(describe_schedule(read_schedule(Path(folder)), found.program, device))
                clear_dump(folder)
            fits = fits and found.fits
    return 0 if fits else 1
