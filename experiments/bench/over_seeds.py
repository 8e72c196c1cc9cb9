"""Comparisons over several seeds: the same measurements of each, as a table of means and standard deviations."""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


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
