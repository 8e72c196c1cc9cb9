"""What depth costs: compile time and memory of a training step, with and without `scan_layers` and `remat`.

    python -m experiments.bench depth                                  # 8, 16, 32 blocks of a hybrid
    python -m experiments.bench depth --layers 8 --pattern mamba2 --json out.json

Compiles the training step of a language model, gradient and optimiser, at each depth with `scan_layers` (equal blocks
compiled once, in a loop) and `remat` (blocks recomputed in the backward pass) off and on, and runs none. Seconds are
the process's own, of all its threads together, from Python to machine code with no cache to help: other work on the
machine hardly changes them. Memory, in MiB, is what the compiler plans for a step beyond the state that it updates and
the batch.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import ssm
import zoo
from experiments.bench import record
from experiments.causal.next_token import next_token_loss
from experiments.loop import flags
from experiments.loop.compiled import without_cache
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    pattern: str = "mamba2*3 attn/mlp"
    """Mixers of the blocks."""
    layers: tuple[int, ...] = (8, 16, 32)
    """Depths, in blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    batch: int = 4
    """Rows of a step."""
    length: int = 512
    """Tokens of a row."""
    vocab_size: int = 256
    """Tokens of the models."""
    json: Path | None = None
    """File to write all figures to, with the hardware and the versions."""

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layers=(), expected at least one depth")
        for name in ("d_model", "batch", "length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for layers in self.layers:
            model_config(self, layers)


def model_config(config: Config, layers: int, *, scan_layers: bool = False, remat: bool = False) -> zoo.CausalLMConfig:
    """The model of a depth."""
    return zoo.CausalLMConfig(
        d_model=config.d_model,
        n_layers=layers,
        pattern=config.pattern,
        vocab_size=config.vocab_size,
        mamba2=ssm.Mamba2Config(d_state=16, head_dim=min(64, 2 * config.d_model)),
        attn=zoo.AttentionConfig(n_heads=2),
        scan_layers=scan_layers,
        remat=remat,
    )


def compile_step(config: Config, model: zoo.CausalLM) -> tuple[float, int]:
    """Compiles a training step of a model: (seconds of processor time, bytes a step takes beyond its arguments)."""
    optimizer = make_optimizer(OptimConfig(), 1000, model)
    step = make_train_step(model, next_token_loss, optimizer)
    state = init_state(model, optimizer, jax.random.key(0))
    ids = np.zeros((config.batch, config.length), np.int32)
    batch = {"tokens": ids, "targets": ids, "weights": np.ones(ids.shape, np.float32), "segment_ids": None}
    jax.clear_caches()  # what this process has traced and compiled before
    with without_cache():
        before = time.process_time()
        compiled: Any = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        seconds = time.process_time() - before
    return seconds, compiled.memory_analysis().temp_size_in_bytes


def main() -> int:
    """Compiles each step and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench depth", description=__doc__)
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    print(f"{config.pattern}, float32, b={config.batch} l={config.length} d_model={config.d_model}\n")
    print("| layers | scan_layers | remat | parameters | compile, s | step, MiB |")
    print("| --: | --- | --- | --: | --: | --: |")
    figures: list[dict] = []
    for layers, scan_layers, remat in itertools.product(config.layers, (False, True), (False, True)):
        switches = {"scan_layers": scan_layers, "remat": remat}
        shape = model_config(config, layers, **switches)
        seconds, memory = compile_step(config, zoo.CausalLM(shape, rngs=nnx.Rngs(0)))
        row = {"layers": layers, **switches, "parameters": count_params(shape)}
        figures.append({**row, "seconds": seconds, "memory_bytes": memory})
        on = ["on" if switch else "off" for switch in switches.values()]
        size = f"{row['parameters']:,} | {seconds:.1f} | {memory / 2**20:,.0f}"
        print(f"| {layers} | {' | '.join(on)} | {size} |", flush=True)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0
