"""What a long row costs: memory of a training step against its length, on one device and cut over several.

    python -m experiments.bench length                                       # 1k to 1M tokens, on one device
    python -m experiments.bench length --at-once 0 16384                     # whole rows, and 16,384 positions at once
    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m experiments.bench length --pieces 1 8 --plot out.png        # and on 8, here simulated ones
    python -m experiments.bench length --patterns mamba2/mlp --lengths 1048576 --at-once 16384 --run

Compiles the training step, gradient and optimiser, of the `tiny` language model with `remat`, for one row of bytes, and
with `--run` runs it once. MiB a device is what the compiler plans for a step beyond the state that it updates and the
batch; KiB a token is what it grows by from the row before. `--pieces` are sizes of the mesh's axis "sequence".
"""

import dataclasses
import itertools
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import zoo
from experiments import causal_lm
from experiments.aot.programs import placed
from experiments.bench import record
from experiments.causal.next_token import next_token_loss
from experiments.loop import flags
from experiments.loop.mesh import everywhere, sharding_of_batch
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import init_state, make_train_step
from zoo.models.build import abstract


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    patterns: tuple[str, ...] = ("mamba2/mlp", "mamba/mlp", "m2/monarch")
    """Patterns of the models."""
    lengths: tuple[int, ...] = (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)
    """Tokens of the row."""
    pieces: tuple[int, ...] = (1,)
    """Over how many devices its positions are cut."""
    at_once: tuple[int, ...] = (0,)
    """Positions that the backward pass recomputes at a time (`remat_positions`), on one device. 0: whole rows."""
    run: bool = False
    """Whether to run each step, too."""
    plot: Path | None = None
    """File to draw memory against length to."""
    json: Path | None = None
    """File to write all figures to, with the hardware and the versions."""

    def __post_init__(self):
        for name in ("patterns", "lengths", "pieces", "at_once"):
            if not getattr(self, name):
                raise ValueError(f"{name}=(), expected at least one")
        if max(self.pieces) > (devices := jax.device_count()) or min(self.pieces) < 1:
            raise ValueError(f"pieces={self.pieces}, expected 1 to {devices}, the devices there are")
        if min(self.at_once) < 0:
            raise ValueError(f"at_once={self.at_once}, expected numbers of positions, or 0 for whole rows")
        for length in self.lengths:
            if length < 1 or any(length % pieces for pieces in self.pieces):
                raise ValueError(f"lengths={self.lengths}, expected multiples of pieces={self.pieces}")


def model_config(pattern: str, length: int, at_once: int = 0) -> zoo.CausalLMConfig:
    """The tiny model with a pattern, for rows of a length."""
    tiny = causal_lm.PRESETS["tiny"][1].model
    m2 = dataclasses.replace(tiny.m2, l_max=length)
    return dataclasses.replace(
        tiny, pattern=pattern, m2=m2, vocab_size=256, remat=True, remat_positions=at_once or None, scan_layers=True
    )


def measure(pattern: str, length: int, pieces: int, at_once: int, run: bool) -> dict[str, Any]:
    """Compiles a step, and runs it where asked to: its memory, seconds and loss."""
    axes = ("data", "fsdp", "sequence", "tensor", "expert")
    devices = jax.devices()[:pieces]
    mesh = jax.make_mesh((1, 1, pieces, 1, 1), axes, axis_types=(AxisType.Auto,) * 5, devices=devices)
    config = model_config(pattern, length, at_once)
    with jax.set_mesh(mesh):
        model = zoo.CausalLM(config, rngs=nnx.Rngs(0)) if run else abstract(config)
        optimizer = make_optimizer(OptimConfig(), 1000, model)
        step = make_train_step(model, next_token_loss, optimizer)
        graphdef, variables = nnx.split(model)

        def start(variables):
            return init_state(nnx.merge(graphdef, variables), optimizer, jax.random.key(0))

        given: Any = jax.eval_shape(start, variables), step.rest, batch_of(length)
        if run:
            ids = np.random.default_rng(0).integers(0, 256, (1, length + 1)).astype(np.int32)
            batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((1, length), np.float32)}
            given = start(variables), step.rest, batch
            del model, variables
        whole, cut = everywhere(mesh), sharding_of_batch(mesh, (1, length))
        place = jax.device_put if run else placed
        state, rest, batch = (place(tree, where) for tree, where in zip(given, (whole, whole, cut), strict=True))
        batch = batch | {"segment_ids": None}
        compiled: Any = step.program.lower(state, rest, batch).compile()
        figures = {"pattern": pattern, "length": length, "pieces": pieces, "at_once": at_once}
        figures["memory_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        if run:
            before = time.perf_counter()
            _, values = jax.block_until_ready(compiled(state, rest, batch))
            figures |= {"seconds": time.perf_counter() - before, "loss": float(values["loss"])}
            figures["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return figures


def batch_of(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One row of tokens, as shapes."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((1, length), dtype) for name, dtype in dtypes.items()}


def per_token(row: dict, last: dict) -> float:
    """KiB that memory grows by with each token from one row to the next."""
    return (row["memory_bytes"] - last["memory_bytes"]) / (row["length"] - last["length"]) / 1024


def draw(figures: list[dict], path: Path) -> None:
    """Memory against length: a panel for each way to run a row, a line for each pattern."""
    import matplotlib.pyplot as plt

    ways = list(dict.fromkeys((f["pieces"], f["at_once"]) for f in figures))
    _, panels = plt.subplots(
        1, len(ways), figsize=(4.4 * len(ways), 4), layout="constrained", sharey=True, squeeze=False
    )
    colors = {pattern: f"C{i}" for i, pattern in enumerate(dict.fromkeys(f["pattern"] for f in figures))}
    for axes, (pieces, at_once) in zip(panels[0], ways, strict=True):
        for pattern, color in colors.items():
            rows = [f for f in figures if (f["pattern"], f["pieces"], f["at_once"]) == (pattern, pieces, at_once)]
            if not rows:
                continue
            slope = f", {per_token(rows[-1], rows[-2]):.1f} KiB a token" if len(rows) > 1 else ""
            lengths, memory = [f["length"] for f in rows], [f["memory_bytes"] / 2**20 for f in rows]
            axes.plot(lengths, memory, color=color, marker="o", ms=4, label=f"{pattern}{slope}")
        title = "whole rows" if not at_once else f"{at_once:,} positions at once"
        axes.set(title=title if pieces == 1 else f"each of {pieces} devices", xlabel="tokens of the row")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
    panels[0, 0].set_ylabel("MiB beyond the state, forward and backward")
    plt.savefig(path, dpi=120)
    plt.close()


def main() -> int:
    """Compiles each step and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench length", description=__doc__)
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    print("the tiny language model, one row, float32, remat\n")
    head = "| pattern | devices | at once | tokens | step, MiB a device | KiB a token more |"
    print(head + (" s | peak, MiB |" if config.run else ""))
    print("| --- | --: | --: | --: | --: | --: |" + (" --: | --: |" if config.run else ""))
    figures: list[dict] = []
    ways = [(pieces, at_once) for at_once in config.at_once for pieces in config.pieces if pieces == 1 or not at_once]
    for pattern, (pieces, at_once) in itertools.product(config.patterns, ways):
        last = None
        for length in config.lengths:
            row = measure(pattern, length, pieces, at_once, config.run)
            figures.append(row)
            more = "" if last is None else f"{per_token(row, last):.2f}"
            ran = f" {row['seconds']:.1f} | {row['peak_bytes'] / 2**20:,.0f} |" if config.run else ""
            memory, said = f"{row['memory_bytes'] / 2**20:,.0f}", f"{at_once:,}" if at_once else "all"
            print(f"| {pattern} | {pieces} | {said} | {length:,} | {memory} | {more} |{ran}", flush=True)
            last = row
    if config.plot:
        draw(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0
