"""What has been trained: a list of runs, and some of them beside each other.

    python -m experiments.runs                                       # the runs under runs/, those of last writing last
    python -m experiments.runs runs/causal_lm --csv runs.csv         # under another folder; the list as a file too
    python -m experiments.runs compare runs/causal_lm/tiny runs/causal_lm/tiny-*    # a table, and comparison.png

Runs are read as their folders say, of whatever command, whether they have ended or not; what is wrong with one is said
below it. Several seeds are one run, drawn as their mean; the stages of a distillation are drawn one behind another.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from experiments.loop import comparison, flags
from experiments.loop.history import find_runs, is_run, read_run


@dataclasses.dataclass(frozen=True)
class Config:
    """Lists runs."""

    folder: Annotated[Path, flags.Positional] = Path("runs")
    """Where to look, also in folders inside it."""
    csv: Path | None = None
    """File to write the list to as well."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compares runs."""

    runs: Annotated[tuple[Path, ...], flags.Positional]
    """Folders of runs."""
    plot: Path = Path("comparison.png")
    """The picture, replaced where it is there."""
    csv: Path | None = None
    """File to write the table to as well, a line a run."""

    def __post_init__(self):
        if len(self.runs) < 2:
            raise ValueError("expected the folders of two runs or more")


def main() -> int:
    """Lists runs, or compares some."""
    if sys.argv[1:2] == ["compare"]:
        sys.argv.pop(1)
        return compare()
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.runs", description=__doc__)
        found = sorted(find_runs(config.folder), key=lambda run: run.when or 0)
        rows = comparison.overview(found)
        if not found:
            print(f"there are no runs under {config.folder}")
            return 0
        if config.csv:
            comparison.write_csv(rows, config.csv)
    heading, *lines = comparison.table(rows)
    print(heading)
    for run, line in zip(found, lines, strict=True):
        print(line)
        for problem in run.problems:
            print(f"    ! {problem}")
    return 0


def compare() -> int:
    """Draws runs into one picture, and prints what differs between them."""
    with flags.usage_errors():
        config = flags.parse_one(CompareConfig, prog="python -m experiments.runs compare", description=__doc__)
        for folder in config.runs:
            if not is_run(folder):
                raise ValueError(f"{folder} holds no run")
        found = [read_run(folder) for folder in config.runs]
        rows = comparison.differences(found)
        print("\n".join(comparison.table(rows, upright=True)))
        for run in found:
            for problem in run.problems:
                print(f"! {run.folder}: {problem}")
        if config.csv:
            comparison.write_csv(rows, config.csv)
        print(f"picture: {comparison.plot(found, config.plot)}")
    return 0


if __name__ == "__main__":
    flags.run(main)
