"""Curves of how well needles are found, over their depth: in files, in a plot of several runs, and as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.loop.figures import save_figure
from experiments.loop.json_files import write_json

RESULTS, PLOT = "needles.json", "needles.png"


def save_results(label: str, n_queries: int, points: Sequence[dict[str, float]], folder: Path) -> None:
    """Writes what `read_results` reads.

    Args:
      label: what the run is called in a plot.
      n_queries: how many each point is a mean of.
      points: {"length", "depth"} and the measures there.
    """
    write_json({"label": label, "queries": n_queries, "curves": points}, folder / RESULTS)


def read_results(folder: Path) -> dict[str, Any]:
    """What a run has written.

    Raises:
      FileNotFoundError: nothing yet.
      ValueError: it is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS}: it holds no finished run of experiments.needles")
    try:
        said = json.loads(path.read_text())
        if not said["curves"] or not isinstance(said["label"], str):
            raise ValueError("no curves")
        return said
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def plot(folders: Sequence[Path]) -> Path:
    """Draws the curves of runs, a panel for each length, into the first one's folder.

    Raises:
      FileNotFoundError, ValueError: a folder has none.
    """
    from matplotlib.figure import Figure

    said = [read_results(folder) for folder in folders]
    lengths = sorted({point["length"] for one in said for point in one["curves"]})
    figure = Figure(figsize=(3.2 * len(lengths) + 0.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        for folder, one in zip(folders, said, strict=True):
            points = [(p["depth"], p["ndcg@10"]) for p in one["curves"] if p["length"] == length]
            panel.plot(
                *zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=f"{folder.name}: {one['label']}"
            )
        panel.set(title=f"{length:,} tokens", xlabel="depth of the needle", ylim=(0, 1.02))
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nDCG@10")
    panels[-1].legend(frameon=False, fontsize=8)
    path = folders[0] / PLOT
    save_figure(figure, path, dpi=150)
    return path


def table(points: Sequence[dict[str, float]]) -> list[str]:
    """nDCG@10 and MRR@10, a line for each length, a column for each depth."""
    depths = sorted({point["depth"] for point in points})
    lines = [f"{'depth':>16}" + "".join(f"{depth:>8.2f}" for depth in depths) + f"{'mean':>8}"]
    for length in sorted({point["length"] for point in points}):
        for name, label in (("ndcg@10", "nDCG@10"), ("mrr@10", "MRR@10")):
            row = {point["depth"]: point[name] for point in points if point["length"] == length}
            numbers = "".join(f"{row[depth]:>8.3f}" for depth in depths) + f"{np.mean(list(row.values())):>8.3f}"
            lines.append(f"{length if label == 'nDCG@10' else '':>7}  {label:7}{numbers}")
    return lines
