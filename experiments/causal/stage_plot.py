"""How good a student was after each stage, as a picture."""

from collections.abc import Mapping
from pathlib import Path

from experiments.loop.figures import save_figure


def plot_stages(rows: Mapping[str, Mapping[str, float]], folder: Path) -> Path:
    """Draws the perplexity at each stage into stages.png, the teacher's as a line."""
    from matplotlib.figure import Figure

    names = [name for name in rows if name != "teacher"]
    values = [rows[name]["perplexity"] for name in names]
    figure = Figure(figsize=(1.5 + 1.1 * len(names), 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(names, values, color="tab:blue", marker="o", linestyle="none")
    for name, value in zip(names, values, strict=True):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the teacher's line stays off the numbers
        axes.annotate(f"{value:.3g}", (name, value), (0, 8), textcoords="offset points", ha="center", bbox=white)
    teacher = rows["teacher"]["perplexity"]
    axes.axhline(teacher, color="tab:orange", linewidth=1.5, label=f"teacher, {teacher:.3g}")
    axes.set(yscale="log", ylabel="perplexity on held-out text", title=f"Distillation of {folder.resolve().name}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.15)
    path = folder / "stages.png"
    save_figure(figure, path, dpi=150)
    return path
