"""Comparisons over several seeds: the same measurements of each, as a table of means and standard deviations."""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from experiments import causal_lm
from experiments.causal.next_token import next_token_loss
from experiments.data.corpus import DataConfig, evaluation_batches, load_corpus
from experiments.loop.optim import OptimConfig
from experiments.loop.train import LossFunction, TrainConfig, mean_loss

ROWS = 8
"""Rows of a batch, in training and on held-out text."""
_BATCHES = 20


def trained(
    folder: Path,
    data: DataConfig,
    *,
    steps: int,
    seed: int,
    rate: float = 3e-3,
    warmup_steps: int = 10,
    **options: Any,
) -> Any:
    """The language model of a short run.

    Args:
      folder: of the run.
      data: its text.
      steps, seed: of it.
      rate: peak learning rate.
      warmup_steps: in which it is reached.
      **options: other fields of `causal_lm.Config`.
    """
    how: dict[str, Any] = {"steps": steps, "eval_every": steps, "save_every": steps, "seed": seed}
    config = causal_lm.Config(
        data=data,
        train=TrainConfig(**how, batch_size=ROWS, tensorboard=False),
        optim=OptimConfig(learning_rate=rate, warmup_steps=warmup_steps),
        eval_batches=1,
        **options,
    )
    causal_lm.fit(config, folder)
    return zoo.from_pretrained(folder, kind=zoo.CausalLM)


def held_out_bits(model: Any, data: DataConfig, loss: LossFunction = next_token_loss) -> float:
    """Bits per byte of what is held out of a text."""
    held_out = load_corpus(data).validation
    rows = evaluation_batches(held_out, batch_size=ROWS, seq_len=data.seq_len, max_batches=_BATCHES)
    return mean_loss(model, loss, rows) / 0.6931471805599453 * held_out.n_tokens / held_out.n_bytes


def print_over_seeds(seeds: Sequence[int], unit: str, measure: Callable[[int, Path], Mapping[str, float]]) -> None:
    """Measures for each seed, in a folder that is there as long, and prints a row for each name.

    Args:
      seeds: of the runs.
      unit: what the numbers are, for the head of the table.
      measure: measure(seed, folder) -> a number for each name.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in measure(seed, Path(folder)).items():
                found[name].append(value)
    print(f"\n| | {unit}, {len(seeds)} seeds |\n| --- | ---: |")
    for name, values in found.items():
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {name} | {statistics.mean(values):.3f}{deviation} |")
