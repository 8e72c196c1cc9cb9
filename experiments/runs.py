"""What has been trained: a list of runs, and some of them beside each other.

    python -m experiments.runs                                       # the runs under runs/, those of last writing last
    python -m experiments.runs runs/causal_lm --csv runs.csv         # under another folder; the list as a file too
    python -m experiments.runs compare runs/causal_lm/tiny runs/causal_lm/tiny-*    # a table, and comparison.png
    python -m experiments.runs serve                                 # the same in a browser, at http://127.0.0.1:8000/
    python -m experiments.runs page runs/causal_lm/tiny              # writes the run's index.html once more

Runs are read as their folders say, of whatever command, whether they have ended or not; what is wrong with one is said
below it. Several seeds are one run, drawn as their mean; the stages of a distillation are drawn one behind another.
Every run that ends writes its index.html, which any browser opens from disk.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from experiments.loop import comparison, flags
from experiments.loop.history import find_runs, is_run, read_run
from experiments.loop.run_page import write_page
from experiments.loop.run_server import RunServer


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


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Shows runs in a browser, until Ctrl-C."""

    folder: Annotated[Path, flags.Positional] = Path("runs")
    """Where to look, also in folders inside it."""
    host: str = "127.0.0.1"
    """Address to listen at: this one can be reached from this machine alone, 0.0.0.0 from all that reach it."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free."""


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """Writes the index.html of runs."""

    runs: Annotated[tuple[Path, ...], flags.Positional]
    """Folders of runs."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("expected the folder of a run")


def main() -> int:
    """Lists runs, compares some, or shows them."""
    verbs = {"compare": compare, "serve": serve, "page": write_pages}
    if sys.argv[1:2] and sys.argv[1] in verbs:
        return verbs[sys.argv.pop(1)]()
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
        _check(config.runs)
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


def serve() -> int:
    """Serves pages of runs until it is interrupted."""
    with flags.usage_errors():
        config = flags.parse_one(ServeConfig, prog="python -m experiments.runs serve", description=__doc__)
        if not config.folder.is_dir():
            raise FileNotFoundError(f"{config.folder} is no folder")
        try:
            server = RunServer(config.folder, config.host, config.port)
        except OSError as error:
            raise ValueError(f"--host {config.host} --port {config.port}: {error.strerror}; choose another") from None
    print(f"the runs under {config.folder}: {server.address}  (Ctrl-C ends)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def write_pages() -> int:
    """Writes pages of runs into their folders."""
    with flags.usage_errors():
        config = flags.parse_one(PageConfig, prog="python -m experiments.runs page", description=__doc__)
        _check(config.runs)
        for folder in config.runs:
            print(f"page: {write_page(folder)}")
    return 0


def _check(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        if not is_run(folder):
            raise ValueError(f"{folder} holds no run")


if __name__ == "__main__":
    flags.run(main)
