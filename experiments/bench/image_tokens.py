"""What an image of many tokens costs: speed and memory of a training step, attention beside state spaces.

    python -m experiments.bench image_tokens                              # 64 to 4,096 tokens of an image
    python -m experiments.bench image_tokens --json out.json --plot out.png
    python -m experiments.bench image_tokens --sides 8 16 --rounds 3      # a look

One image and a few words behind it go through a vision-language model, forward and backward. Encoder and connector look
at each patch alone, so that what differs is the language model. All of them have about as many parameters. MiB is what
the compiler plans for the gradient beside parameters and inputs, counted exactly; tokens/s, the image's and the text's,
is of the median round, all contenders in turns. Where something else runs on the machine, ratios say more than speeds.

The claim to be checked: state spaces win with many image tokens (Liao et al. 2025, arXiv:2502.13145; Huang & Hu 2024,
arXiv:2407.19832).
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ssm
import zoo
from experiments.bench import record, turns
from experiments.bench.contenders import Call
from experiments.bench.panels import draw
from experiments.loop import flags
from experiments.loop.model_size import count_params

PATTERNS = {
    "attention": "attn/mlp",
    "Mamba-2": "mamba2/mlp",
    "hybrid": "mamba2/mlp*3 attn/mlp",
}
PATCH = 4  # pixels to a side
# What is measured -> its name in a figure.
MEASURES = {"MiB of forward and backward": "mib", "tokens/s, forward and backward": "speed"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often."""

    sides: tuple[int, ...] = (8, 16, 24, 32, 48, 64)
    """Patches to a side of the square image: as many tokens as their square."""
    text: int = 64
    """Tokens of text behind the image."""
    batch: int = 1
    """Rows."""
    d_model: int = 256
    """Width of the language model."""
    layers: int = 4
    """Blocks of it."""
    remat: bool = False
    """Whether the backward pass computes each block again, instead of keeping what it needs."""
    rounds: int = 7
    """Timed calls of each contender, after two that are not counted. 0: memory alone."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: memory and speed against the number of tokens."""

    def __post_init__(self):
        if not self.sides or min(self.sides) < 1:
            raise ValueError(f"sides={self.sides}, expected at least one, of at least 1")
        for name in ("text", "batch", "d_model", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.layers < 4:
            raise ValueError(f"layers={self.layers}, expected at least 4, of which the hybrid has one of attention")
        if self.d_model % 256:
            raise ValueError(f"d_model={self.d_model}, expected a multiple of 256: five quarters of it are heads of 64")
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds}, expected at least 0")


def model_config(config: Config, pattern: str, side: int) -> zoo.VisionLanguageConfig:
    """A model for an image of side x side patches, each of which encoder and connector see alone."""
    vision = zoo.ImageClassifierConfig(
        d_model=64,
        n_layers=1,
        n_classes=0,
        pattern="-/mlp",
        image_size=side * PATCH,
        patch_size=PATCH,
        class_token="none",
        pool="mean",
        mlp=zoo.MLPConfig(d_ff=128),
    )
    text = zoo.CausalLMConfig(
        d_model=config.d_model,
        n_layers=config.layers,
        pattern=pattern,
        vocab_size=512,
        attn=zoo.AttentionConfig(n_heads=config.d_model // 64),
        mlp=zoo.MLPConfig(d_ff=2 * config.d_model),
        # With this width inside, as many parameters as attention: 4 d^2 and a little.
        mamba2=ssm.Mamba2Config(head_dim=64, d_state=64, expand=1.25),
        remat=config.remat,
    )
    return zoo.VisionLanguageConfig(vision=vision, text=text, image_token_id=511)


class Step:
    """The gradient of a model of one image and some text, compiled.

    Args:
      config: options.
      pattern: of the language model.
      side: patches to a side of the image.
    """

    def __init__(self, config: Config, pattern: str, side: int):
        shape = model_config(config, pattern, side)
        graphdef, self.variables = nnx.split(zoo.VisionLanguageModel(shape, rngs=0))
        random = np.random.default_rng(0)
        ids = random.integers(0, 511, (config.batch, side**2 + config.text))
        ids[:, : side**2] = shape.image_token_id
        pixels = random.normal(size=(config.batch, 1, side * PATCH, side * PATCH, 3))
        self.inputs = jnp.asarray(ids, jnp.int32), jnp.asarray(pixels, jnp.float32)

        def loss(variables, ids, images):
            # Logits of the text alone: of an image's places nothing is predicted.
            hidden = nnx.merge(graphdef, variables).hidden(ids, images=images)[:, -config.text - 1 : -1]
            logits = jax.nn.log_softmax(nnx.merge(graphdef, variables).head(hidden))
            return -jnp.mean(jnp.take_along_axis(logits, ids[:, -config.text :, None], axis=-1))

        self.compiled: Any = jax.jit(jax.grad(loss)).lower(self.variables, *self.inputs).compile()

    @property
    def bytes(self) -> int:
        """What the compiler plans for, beside parameters, inputs and the gradient."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def call(self) -> Call:
        """A call that runs it."""
        return lambda: jax.block_until_ready(self.compiled(self.variables, *self.inputs))


def main() -> int:
    """Measures every model at every size and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench image_tokens", description=__doc__)
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    sizes = ", ".join(f"{name} {count_params(model_config(config, p, 8).text):,}" for name, p in PATTERNS.items())
    print(f"float32, b={config.batch} d_model={config.d_model} layers={config.layers} text={config.text}; {sizes}\n")
    print("| tokens of the image | language model | pattern | MiB | ratio | tokens/s | ratio |")
    print("| --: | --- | --- | --: | --: | --: | --: |")
    figures: list[dict] = []
    for side in config.sides:
        figures += measure(config, side)
    if config.plot:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def measure(config: Config, side: int) -> list[dict]:
    """Compiles and times the models at one size, prints their rows and returns their figures."""
    steps = {name: Step(config, pattern, side) for name, pattern in PATTERNS.items()}
    calls = {name: step.call() for name, step in steps.items()}
    times = turns.time_in_turns(calls, config.rounds, label=f"{side**2} tokens") if config.rounds else {}
    shared = min(map(len, times.values()), default=0)
    tokens = config.batch * (side**2 + config.text)
    figures: list[dict] = []
    for name, step in steps.items():
        row: dict[str, Any] = {"tokens": side**2, "model": name, "bytes": step.bytes, "mib": step.bytes / 2**20}
        if shared:
            rounds = times[name][:shared]
            row |= {"rounds": rounds, "speed": 1e3 * tokens / statistics.median(rounds)}
        figures.append(row)
        first = figures[0]
        speed = f"{row['speed']:,.0f} | {row['speed'] / first['speed']:.2f}" if shared else " | "
        memory = f"{row['mib']:,.1f} | {row['mib'] / first['mib']:.2f}"
        print(f"| {side**2:,} | {name} | `{PATTERNS[name]}` | {memory} | {speed} |", flush=True)
    return figures


def plot(figures: list[dict], path: Path) -> None:
    """Draws memory, and speed where it was measured, against the number of tokens."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    measures = {label: key for label, key in MEASURES.items() if key in figures[0]}
    picture = Figure(figsize=(5 * len(measures), 3.6), layout="constrained")
    for axes, (label, key) in zip(picture.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True):
        curves: dict[str, dict[int, float]] = {}
        for figure in figures:
            curves.setdefault(figure["model"], {})[figure["tokens"]] = figure[key]
        draw(axes, curves, title="one image and its text", xlabel="tokens of the image", ylabel=label)
    picture.savefig(path, dpi=80)
