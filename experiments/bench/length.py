"""What a long row costs: memory of a training step against its length, on one device and cut over several.

    python -m experiments.bench length                                       # 4k to 1M tokens, on one device
    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m experiments.bench length --pieces 1 8 --plot out.png        # and on 8, here simulated ones
    python -m experiments.bench length --patterns mamba2/mlp --lengths 1048576 --run

Compiles the training step, gradient and optimiser, of the `tiny` language model with `remat`, for one row of bytes, and
with `--run` runs it once. MiB a device is what the compiler plans for a step beyond the state that it updates and the
batch; KiB a token is what it grows by from the row before. `--pieces` are sizes of the mesh's axis "sequence".
"""

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zoo
from experiments import causal_lm
from experiments.bench import record
from experiments.causal.next_token import next_token_loss
from experiments.loop import flags
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    patterns: tuple[str, ...] = ("mamba2/mlp", "mamba/mlp", "m2/monarch")
    """Patterns of the models."""
    lengths: tuple[int, ...] = (2**12, 2**14, 2**16, 2**18, 2**20)
    """Tokens of the row."""
    pieces: tuple[int, ...] = (1,)
    """Over how many devices its positions are cut."""
    at_once: int | None = None
    """Positions that the backward pass recomputes at a time (`remat_positions`). None: whole rows."""
    run: bool = False
    """Whether to run each step, too."""
    plot: Path | None = None
    """File to draw memory against length to."""
    json: Path | None = None
    """File to write all figures to, with the hardware and the versions."""

    def __post_init__(self):
        for name in ("patterns", "lengths", "pieces"):
            if not getattr(self, name):
                raise ValueError(f"{name}=(), expected at least one")
        if max(self.pieces) > (devices := jax.device_count()) or min(self.pieces) < 1:
            raise ValueError(f"pieces={self.pieces}, expected 1 to {devices}, the devices there are")
        for length in self.lengths:
            if length < 1 or any(length % pieces for pieces in self.pieces):
                raise ValueError(f"lengths={self.lengths}, expected multiples of pieces={self.pieces}")


def model_config(pattern: str, length: int, at_once: int | None = None) -> zoo.CausalLMConfig:
    """The tiny model with a pattern, for rows of a length."""
    tiny = causal_lm.PRESETS["tiny"][1].model
    m2 = dataclasses.replace(tiny.m2, l_max=length)
    return dataclasses.replace(
        tiny, pattern=pattern, m2=m2, vocab_size=256, remat=True, remat_positions=at_once, scan_layers=True
    )


def measure(pattern: str, length: int, pieces: int, config: Config) -> dict[str, Any]:
    """Compiles a step, and runs it where asked to: its memory, seconds and loss."""
    axes = ("data", "fsdp", "sequence", "tensor", "expert")
    devices = jax.devices()[:pieces]
    mesh = jax.make_mesh((1, 1, pieces, 1, 1), axes, axis_types=(AxisType.Auto,) * 5, devices=devices)
    with jax.set_mesh(mesh):
        model = zoo.CausalLM(model_config(pattern, length, config.at_once), rngs=nnx.Rngs(0))
        optimizer = make_optimizer(OptimConfig(), 1000, model)
        state = jax.device_put(init_state(model, optimizer, jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
        ids = np.random.default_rng(0).integers(0, 256, (1, length + 1)).astype(np.int32)
        batch: Any = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((1, length), np.float32)}
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence")))
        batch["segment_ids"] = None
        step = make_train_step(model, next_token_loss, optimizer)
        compiled: Any = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        figures = {"pattern": pattern, "length": length, "pieces": pieces}
        figures["memory_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        if config.run:
            before = time.perf_counter()
            _, values = jax.block_until_ready(compiled(state, batch))
            figures |= {"seconds": time.perf_counter() - before, "loss": float(values["loss"])}
            figures["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return figures


def draw(figures: list[dict], path: Path) -> None:
    """Memory against length, a line for each pattern and number of pieces."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    colors: dict[str, str] = {}
    for pattern, pieces in dict.fromkeys((f["pattern"], f["pieces"]) for f in figures):
        line = [
            (f["length"], f["memory_bytes"] / 2**20)
            for f in figures
            if (f["pattern"], f["pieces"]) == (pattern, pieces)
        ]
        color = colors.setdefault(pattern, f"C{len(colors)}")
        label = pattern if pieces == 1 else f"{pattern}, over {pieces} devices"
        axes.plot(*zip(*line, strict=True), color=color, marker="o", ls="-" if pieces == 1 else "--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the row", ylabel="MiB a device beyond the state")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    plt.savefig(path, dpi=120)
    plt.close()


def main() -> int:
    """Compiles each step and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench length", description=__doc__)
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    print("the tiny language model, one row, float32, remat\n")
    print(
        "| pattern | devices | tokens | step, MiB a device | KiB a token more |"
        + (" s | peak, MiB |" if config.run else "")
    )
    print("| --- | --: | --: | --: | --: |" + (" --: | --: |" if config.run else ""))
    figures: list[dict] = []
    for pattern in config.patterns:
        for pieces in config.pieces:
            last = None
            for length in config.lengths:
                row = measure(pattern, length, pieces, config)
                figures.append(row)
                more = (
                    ""
                    if last is None
                    else f"{(row['memory_bytes'] - last['memory_bytes']) / (length - last['length']) / 1024:.2f}"
                )
                ran = f" {row['seconds']:.1f} | {row['peak_bytes'] / 2**20:,.0f} |" if config.run else ""
                memory = f"{row['memory_bytes'] / 2**20:,.0f}"
                print(f"| {pattern} | {pieces} | {length:,} | {memory} | {more} |{ran}", flush=True)
                last = row
    if config.plot:
        draw(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0
