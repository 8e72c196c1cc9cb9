"""How long a model's channel mixers take here, by their hidden channels: what `reuse prune --speedup` goes by.

    python -m experiments.reuse latency MODEL latency.json --batch-size 1 --seq-len 512
    python -m experiments.reuse prune MODEL small --speedup 1.3 --latency latency.json --data.path my.txt

Each size runs alone, forward, in turns with all others; the median of the turns counts. What the rest of the model
takes is the time of the whole without that of its channel mixers. The table is of this device, batch and length.

Source: Kurtic et al. 2023, arXiv:2302.04089 (ZipLM).
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import zoo
from experiments.loop import flags
from experiments.model_folders import load_model
from zoo.published.json_files import read_json


class Latency(NamedTuple):
    """A table of times, in milliseconds."""

    times: Mapping[int, float]
    """Of a channel mixer, by its hidden channels; of 0 channels there is none."""
    rest: float
    """Of the model without channel mixers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a table of times."""

    source: Annotated[str, flags.Positional]
    """The folder of a run, a folder in our own or a published layout, or a name on the Hugging Face hub."""
    target: Annotated[Path, flags.Positional]
    """JSON file to write."""
    sizes: int = 8
    """How many sizes there are, equal shares of the model's, rounded to whole channels; and none."""
    batch_size: int = 1
    """Rows."""
    seq_len: int = 512
    """Positions of a row."""
    turns: int = 20
    """How often each runs."""

    def __post_init__(self):
        for name in ("sizes", "batch_size", "seq_len", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")


def measure(model: zoo.CausalLM, config: Config) -> Latency:
    """The times of a model's channel mixers, and of the rest.

    Raises:
      ValueError: a model without dense channel mixers, or of several sizes.
    """
    mixers = [module for _, module in nnx.iter_modules(model) if type(module) is zoo.MLP]
    widths = {mlp.d_ff for mlp in mixers}
    if len(widths) != 1:
        there = f"those of {sorted(widths)} hidden channels" if widths else "none"
        raise ValueError(f"expected a model with dense channel mixers of one size, there are {there}")
    (d_ff,), d_model, options = widths, model.config.d_model, model.config.mlp
    x = jnp.ones((config.batch_size, config.seq_len, d_model), mixers[0].up_proj.kernel.dtype)
    ids = jnp.zeros((config.batch_size, config.seq_len), jnp.int32)
    sizes = sorted({max(1, round(d_ff * share / config.sizes)) for share in range(1, config.sizes + 1)})
    runs = [_compiled(zoo.MLP(d_model, dataclasses.replace(options, d_ff=n), rngs=nnx.Rngs(0)), x) for n in sizes]
    *found, whole = _medians([*runs, _compiled(model, ids)], config.turns)
    times = {0: 0.0} | dict(zip(sizes, found, strict=True))
    return Latency(times, max(0.0, whole - len(mixers) * times[d_ff]))


def read_latency(path: Path) -> Latency:
    """What `main` wrote.

    Raises:
      ValueError: a file that holds no such table.
      FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--latency {path}, expected a file that `python -m experiments.reuse latency` writes")
    said = read_json(path)
    try:
        times = {int(size): float(ms) for size, ms in said["times"].items()}
        return Latency(times, float(said["rest"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no table of times, as `reuse latency` writes it") from error


def sizes_for(
    model: zoo.CausalLM, batches: Sequence[Mapping[str, Any]], latency: Latency, speedup: float
) -> tuple[int, ...]:
    """How many hidden channels each layer keeps in a model so many times as fast, as `zoo.prune` takes them.

    Raises:
      ValueError: a model that is not faster, or cannot be; a table of another model.
    """
    mixers = [module for _, module in nnx.iter_modules(model) if type(module) is zoo.MLP]
    if missing := {mlp.d_ff for mlp in mixers} - latency.times.keys():
        raise ValueError(
            f"the table has no time of {min(missing)} hidden channels, the model's: measure it on this model"
        )
    whole = latency.rest + sum(latency.times[mlp.d_ff] for mlp in mixers)
    left = whole / speedup - latency.rest
    if speedup <= 1 or left <= 0:
        most = whole / latency.rest if latency.rest else float("inf")
        raise ValueError(
            f"--speedup {speedup:g}, expected more than 1, and less than the {most:.4g} of no channel mixers"
        )
    return zoo.layer_sizes(model, batches, times=latency.times, budget=left)


def _compiled(model: nnx.Module, x: jax.Array) -> Any:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile()
    return lambda: jax.block_until_ready(run(state, x))


def _medians(runs: list[Any], turns: int) -> list[float]:
    """Milliseconds of each, the median of its turns; the first turn does not count."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(turns + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            found[i].append((time.perf_counter() - start) * 1000)
    return [statistics.median(each[1:]) for each in found]


def main() -> int:
    """Loads, measures, writes."""
    config = flags.parse_one(Config, prog="python -m experiments.reuse latency", description=__doc__)
    with flags.usage_errors():
        if config.target.is_dir() or not config.target.parent.is_dir():
            raise ValueError(f"{config.target}, expected a file in a folder that exists")
        model = load_model(config.source).model
        if not isinstance(model, zoo.CausalLM):
            raise ValueError(f"{config.source} is a {type(model).__name__}, expected a causal language model")
        found = measure(model, config)
    device = jax.devices()[0]
    said = {"device": f"{device.platform} {device.device_kind}", "model": config.source, "rest": found.rest}
    said |= {"batch_size": config.batch_size, "seq_len": config.seq_len, "unit": "ms", "times": dict(found.times)}
    config.target.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    lines = [f"{n:6} hidden channels  {ms:8.3f} ms" for n, ms in found.times.items()]
    print("\n".join([*lines, f"   the rest             {found.rest:8.3f} ms", f"{config.source} -> {config.target}"]))
    return 0


if __name__ == "__main__":
    flags.run(main)
