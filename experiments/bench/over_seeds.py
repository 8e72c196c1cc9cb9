"""Comparisons over several seeds: the same measurements of each, as a table of means and standard deviations."""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.causal.next_token import next_token_loss
from experiments.data.corpus import DataConfig, evaluation_batches, load_corpus
from experiments.loop.train import LossFunction, mean_loss

ROWS = 8
"""Rows of a batch, in training and on held-out text."""
_BATCHES = 20


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
