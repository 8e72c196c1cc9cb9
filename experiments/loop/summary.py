"""What runs that differ in their seed reached: the mean, the spread, their results.json, and a table of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.loop.json_files import write_json

Scores = dict[str, float]  # of one run, on one split


class Summary(NamedTuple):
    """The mean of some runs, and how far they are apart."""

    mean: float
    std: float | None
    """Sample standard deviation; None of one run."""


def summarise(scores: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, Summary]]:
    """Over runs, for every split and metric."""
    return {
        split: {
            name: Summary(
                float(np.mean([run[split][name] for run in scores])),
                float(np.std([run[split][name] for run in scores], ddof=1)) if len(scores) > 1 else None,
            )
            for name in scores[0][split]
        }
        for split in scores[0]
    }


def save_summary(folder: Path, seeds: Sequence[int], scores: Sequence[Mapping[str, Scores]], **beside: Any) -> None:
    """Writes results.json: the scores of each run, their summary, and what else is given."""
    summary = summarise(scores)
    content = {
        "runs": [{"seed": seed} | dict(run) for seed, run in zip(seeds, scores, strict=True)],
        "summary": {split: {n: value._asdict() for n, value in row.items()} for split, row in summary.items()},
        **beside,
    }
    write_json(content, folder / "results.json")


def table(rows: Mapping[str, Mapping[str, Summary]], metrics: Sequence[str] = ()) -> list[str]:
    """Lines of a table: a row for each split, a column for each metric."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name != "loss"))
    unknown = [name for name in metrics if name not in names]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}, expected some of {', '.join(names)}")
    names = list(metrics or names)

    def cell(value: Summary | None) -> str:
        if value is None:
            return "-"
        return f"{value.mean:.4f}" + ("" if value.std is None else f" ± {value.std:.4f}")

    cells = [["", *names], *([split, *(cell(row.get(name)) for name in names)] for split, row in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


def report(rows: Mapping[str, Mapping[str, Summary]], n_runs: int, metrics: Sequence[str] = ()) -> str:
    """What a command prints of `n_runs` that have ended: a heading, and the `table` under it."""
    several = f", mean of {n_runs} seeds ± their standard deviation" if n_runs > 1 else ""
    return "\n".join([f"after the last step{several}:", *(f"  {line}" for line in table(rows, metrics))])
