"""Runs beside each other: a table of what differs and what came of it, and a picture of their metrics over steps."""

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.loop.history import Run, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
"""A dict for each run, by column."""

# What is said of a run in a picture or a table beside its metrics.
_NO_METRICS = ("step", "split")
# Metrics that are said first, where there is no room for all.
FIRST = ("loss", "bits_per_byte", "accuracy")
# More panels than these are no picture any more.
MOST_PANELS = 6


def overview(runs: Sequence[Run]) -> Rows:
    """What is there: a row a run."""
    return [
        {
            "run": str(run.folder),
            "command": run.command,
            "pattern": run.pattern,
            "steps": _steps(run),
            "last": _short(run.evaluations[-1] if run.evaluations else run.records[-1] if run.records else None),
            "best": _short(run.best, at=True),
            "when": datetime.fromtimestamp(run.when).strftime("%Y-%m-%d %H:%M") if run.when else "",
        }
        for run in runs
    ]


def differences(runs: Sequence[Run]) -> Rows:
    """What differs in the configurations of runs, then their steps and last evaluations: a row a run."""
    # Of different commands, what one has no field for is no difference; a damaged run may have none at all.
    configs = [run.config for run in runs if run.config]
    names = [n for n in (configs[0] if configs else ()) if n != "run_dir" and all(n in config for config in configs)]
    said = [{name: run.config.get(name, "-") for name in names} for run in runs]
    different = [name for name in names if any(one[name] != said[0][name] for one in said)]
    rows: Rows = []
    for run, label, one in zip(runs, labels(runs), said, strict=True):
        last = run.evaluations[-1] if run.evaluations else {}
        metrics = {name: value for name, value in last.items() if name not in _NO_METRICS}
        best = {} if run.best is None else {"lowest loss": run.best["loss"], "at step": run.best["step"]}
        differing = {name: one[name] for name in different}
        rows.append({"run": label, "command": run.command, **differing, "steps": run.steps, **metrics, **best})
    return rows


def labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs without the folders that all of them are in."""
    if len(runs) < 2:
        return [str(run.folder) for run in runs]
    absolute = [os.path.abspath(run.folder) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [os.path.relpath(path, common) for path in absolute]
    return [f"{name} (mean of {len(run.seeds)})" if run.seeds else name for name, run in zip(names, runs, strict=True)]


def table(rows: Rows, *, upright: bool = False) -> list[str]:
    """Lines of a table.

    Args:
      upright: whether each run is a column, for a few runs of which much is said.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([text_of(row.get(name, "")) for name in names] for row in rows)]
    if upright:
        cells = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def write_csv(rows: Rows, path: Path) -> None:
    """Writes a table, a line a run."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """The held-out metrics that runs have, the loss first and then those of the most runs; or the loss of training."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in dict.fromkeys(n for r in run.evaluations for n in r if n not in _NO_METRICS and is_number(r[n])):
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (name != "loss", -counts[name]))
    trained = any(is_number(record.get("loss")) for run in runs for record in run.records)
    return names or (["loss"] if trained else [])


def plot(runs: Sequence[Run], path: Path) -> Path:
    """Draws `figure` into a file.

    Raises:
      ValueError: there is nothing to draw.
    """
    figure(runs).savefig(path, dpi=150)
    return path


def figure(runs: Sequence[Run]) -> "Figure":
    """Each metric over steps, a line a run: held out, and the loss of training paler behind it.

    Raises:
      ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    names = metrics_of(runs)[:MOST_PANELS]
    if not names:
        raise ValueError("none of these runs has metrics to draw")
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    drawn = Figure(figsize=(6 * columns, 3.2 * rows + 0.3 * len(runs)), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        color = f"C{number % 10}"
        for name, panel in zip(names, axes, strict=False):
            if name == "loss":
                panel.plot(*_curve(run, name, "train"), color=color, linewidth=0.8, alpha=0.4)
            line = panel.plot(*_curve(run, name, "validation"), color=color, marker="o", markersize=3.5, label=label)
            line[0].set_linestyle(("-", "--", ":")[number // 10 % 3])
    for name, panel in zip(names, axes, strict=False):
        panel.set(title=name.replace("_", " "), xlabel="step")
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[len(names) :]:
        panel.remove()
    handles, texts = axes[0].get_legend_handles_labels()
    drawn.legend(handles, texts, loc="outside lower left", frameon=False)
    return drawn


def _curve(run: Run, name: str, split: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in run.records if r["split"] == split and is_number(r.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def _steps(run: Run) -> str:
    of = "" if run.asked is None else f"/{run.asked}"
    if run.asked is None and "epochs" in run.config:
        of = f" of {run.config['epochs']:g} epochs" if is_number(run.config["epochs"]) else ""
    return f"{run.steps}{of}" + (f" x {len(run.seeds)} seeds" if run.seeds else "")


def _short(record: Mapping[str, Any] | None, *, at: bool = False) -> str:
    """A record's loss and what comes next to it, in few letters."""
    if record is None:
        return ""
    numbers = {name: value for name, value in record.items() if name not in _NO_METRICS and is_number(value)}
    names = sorted(numbers, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))[: 1 if at else 2]
    text = ", ".join(f"{name} {numbers[name]:.4g}" for name in names)
    if record["split"] == "train":
        text += " (train)"
    return text + (f" at {record['step']}" if at else "")


def text_of(value: Any) -> str:
    """A value as tables show it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
