"""How time and memory of image classifiers grow with the image: attention, and what replaces it, in the same run.

    python -m experiments.bench vision                                     # 224 to 1024 pixels at the width of ViT-Ti
    python -m experiments.bench vision --sizes 224 512 --patterns attn/mlp vim --json out.json --plot out.png
    python -m experiments.bench vision --d-model 384 --parts block

Models differ in the pattern alone (`zoo.stack.pattern`), at the width and depth of ViT-Ti: without a class token, with
learned positions for the size that is timed and filters that reach over the whole image. Blocks without a channel mixer
are twice as many, as in Vision Mamba. `model` is from pixels to logits, `block` the first block alone, on as many
tokens. Where timm is installed, its VisionTransformer of the same shape is timed with the models: PyTorch's fused
attention, what a user would pick instead. All is float32, forward. Contenders take turns, round after round; each
figure is the median of its rounds, and the ratio is to the first pattern.

Memory, in MiB, is what a call takes beyond its inputs and parameters: the results and temporary buffers that the
compiler plans; of timm, the most that its allocator held. Numbers say little without the hardware and the commit.
Lines below the table say from which size on a pattern takes less than the first, and than timm.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.bench import record, turns
from experiments.bench.contenders import JaxCall, Missing, TorchCall, require
from experiments.bench.panels import draw
from experiments.loop import flags
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from ssm import SS2DConfig
from zoo.stack.pattern import parse_pattern

Part = Literal["model", "block"]
TIMM = "timm"
# What is measured -> its name in a figure.
MEASURES = {"ms": "ms", "MiB": "mib"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time, at which sizes, and how often."""

    patterns: tuple[str, ...] = ("attn/mlp", "m2/monarch", "m2[conv=2d]/monarch", "vim", "ss2d/mlp")
    """Mixers of the models; others are compared with the first."""
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024)
    """Pixels to a side of the images, multiples of patch_size."""
    parts: tuple[Part, ...] = ("model", "block")
    """What is timed."""
    batch: int = 1
    """Images in a call."""
    d_model: int = 192
    """Width of the residual stream, a multiple of 64, the width of a head, or less than that."""
    layers: int = 12
    """Blocks with a channel mixer, or half as many as those without."""
    patch_size: int = 16
    """Pixels to a side of a patch."""
    timm: bool = True
    """Whether timm's VisionTransformer is timed too, where it is installed."""
    rounds: int = 5
    """Timed calls of each contender, after two that are not counted (one where it takes 10 seconds or more); 3 at most
    for calls of 2 seconds and more."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: time and memory against the size, a row of panels for each part."""

    def __post_init__(self):
        for name in ("batch", "d_model", "layers", "patch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not self.sizes or not self.patterns or not self.parts:
            raise ValueError("expected at least one of sizes, of patterns and of parts")
        for size in self.sizes:
            for pattern in self.patterns:
                classifier(self, pattern, size)


def classifier(config: Config, pattern: str, size: int) -> zoo.ImageClassifierConfig:
    """The model of a pattern for images of a size."""
    words = parse_pattern(pattern, config.layers)
    halves = all(not word.mixers or word.channel is None for word in words)
    return zoo.ImageClassifierConfig(
        d_model=config.d_model,
        n_layers=config.layers * (2 if halves else 1),
        pattern=pattern,
        class_token="none",
        pool="mean",
        image_size=size,
        patch_size=config.patch_size,
        attn=zoo.AttentionConfig(n_heads=max(1, config.d_model // 64), position="none", bias=True),
        ss2d=SS2DConfig(d_state=1),
        m2=M2Config(l_max=(size // config.patch_size) ** 2, filter=HyenaFilterConfig(order=64)),
        monarch=MonarchMLPConfig(gated=False),
    )


def make_calls(config: Config, pattern: str, size: int) -> tuple[dict[Part, JaxCall | TorchCall], dict[Part, int]]:
    """The calls of a model and of its first block, and how many parameters both have."""
    model = zoo.ImageClassifier(classifier(config, pattern, size), rngs=nnx.Rngs(0))
    grid, random = model.config.grid, np.random.default_rng(0)
    images = random.standard_normal((config.batch, size, size, model.config.channels), dtype=np.float32)
    tokens = random.standard_normal((config.batch, grid[0] * grid[1], config.d_model), dtype=np.float32)
    (whole, params), (one, its) = nnx.split(model), nnx.split(model.backbone.layers[0])
    calls: dict[Part, JaxCall | TorchCall] = {
        "model": JaxCall(lambda params, images: nnx.merge(whole, params)(images), params, jax.device_put(images)),
        "block": JaxCall(lambda params, x: nnx.merge(one, params)(x, grid=grid), its, jax.device_put(tokens)),
    }
    return calls, {"model": _count(params), "block": _count(its)}


def make_timm(config: Config, size: int) -> tuple[TorchCall, int]:
    """The call of timm's VisionTransformer of the same shape, and how many parameters it has."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=size,
        patch_size=config.patch_size,
        embed_dim=config.d_model,
        depth=config.layers,
        num_heads=max(1, config.d_model // 64),
        class_token=False,
        global_pool="avg",
    ).eval()
    images = torch.randn(config.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return TorchCall(torch.no_grad()(lambda: model(images))), sum(x.numel() for x in model.parameters())


def _count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> int:
    """Times every pattern at every size and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench vision", description=__doc__)
    environment = record.read_environment()
    print(f"{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    print(f"float32, forward, b={config.batch} d_model={config.d_model} patches of {config.patch_size}")
    beside_timm = config.timm and "model" in config.parts
    try:
        require(*["torch", "timm"] * beside_timm)
    except Missing as missing:
        print(f"without timm: {missing}")
        beside_timm = False
    print(
        f"\n| {'part':<5} | {'pixels':>6} | {'tokens':>6} | {'pattern':<20} | {'parameters':>10} | {'ms':>8} "
        f"| {'ratio':>6} | {'MiB':>8} |"
    )
    print(f"| {'-' * 5} | {'-' * 5}: | {'-' * 5}: | {'-' * 20} | {'-' * 9}: | {'-' * 7}: | {'-' * 5}: | {'-' * 7}: |")
    figures: list[dict] = []
    for size in config.sizes:
        built = {pattern: make_calls(config, pattern, size) for pattern in config.patterns}
        if beside_timm:
            call, parameters = make_timm(config, size)
            built[TIMM] = {"model": call}, {"model": parameters}
        for part in config.parts:
            figures += _time_part(part, size, built, config)
    for line in thresholds(figures):
        print(f"\n{line}", end="")
    print()
    if config.plot:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def _time_part(part: Part, size: int, built, config: Config) -> list[dict]:
    """Times the patterns in turns, prints their rows and returns their figures."""
    calls = {pattern: calls[part] for pattern, (calls, _) in built.items() if part in calls}
    times = turns.time_in_turns(calls, config.rounds, label=f"{part} {size}")
    tokens, first = (size // config.patch_size) ** 2, statistics.median(times[config.patterns[0]])
    figures = []
    for pattern, rounds in times.items():
        ms, mib, parameters = statistics.median(rounds), calls[pattern].memory() / 2**20, built[pattern][1][part]
        print(
            f"| {part:<5} | {size:>6} | {tokens:>6} | {pattern:<20} | {parameters:>10,} | {ms:8.1f} "
            f"| {ms / first:6.2f} | {mib:8,.1f} |",
            flush=True,
        )
        row = {"part": part, "size": size, "tokens": tokens, "pattern": pattern, "parameters": parameters}
        figures.append({**row, "ms": ms, "mib": mib, "rounds": rounds})
    return figures


def _curves(figures: list[dict], part: str, measure: str) -> dict[str, dict[int, float]]:
    """A measure of a part by size, of each pattern."""
    curves: dict[str, dict[int, float]] = {}
    for figure in figures:
        if figure["part"] == part:
            curves.setdefault(figure["pattern"], {})[figure["size"]] = figure[measure]
    return curves


def thresholds(figures: list[dict]) -> list[str]:
    """A line for each pattern, part and measure: from which of the sizes on it takes less than the first, and timm."""
    lines = []
    for part in dict.fromkeys(figure["part"] for figure in figures):
        for unit, measure in MEASURES.items():
            curves = _curves(figures, part, measure)
            for first in dict.fromkeys((next(iter(curves)), *(name for name in curves if name == TIMM))):
                for pattern in [name for name in curves if name not in (first, TIMM)]:
                    its, values = curves[first], curves[pattern]
                    more = max((size for size in values if values[size] >= its[size]), default=0)
                    after = sorted(size for size in values if size > more)
                    where = f"from {after[0]} pixels on" if after else "at no size"
                    lines.append(f"{part}, {unit}: {pattern} takes less than {first} {where}")
    return lines


def plot(figures: list[dict], path: Path) -> None:
    """Draws time and memory against the size, a row of panels for each part."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    parts = list(dict.fromkeys(figure["part"] for figure in figures))
    picture = Figure(figsize=(5 * len(MEASURES), 3.6 * len(parts)), layout="constrained")
    panels = picture.subplots(len(parts), len(MEASURES), squeeze=False)
    for row, part in zip(panels, parts, strict=True):
        for axes, (unit, measure) in zip(row, MEASURES.items(), strict=True):
            draw(axes, _curves(figures, part, measure), title=part, xlabel="pixels to a side", ylabel=unit)
    picture.savefig(path, dpi=80)
