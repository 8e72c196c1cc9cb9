"""Panels of a bench's picture: curves against sizes, on logarithmic axes."""

from collections.abc import Sequence


def draw(axes, curves: dict[str, dict[int, float]], **labels: str) -> None:
    """Draws a panel: a line for each curve, both axes logarithmic, with a tick at each size."""
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3.5, label=name)
    axes.set_yscale("log")
    tidy(axes, sorted(set().union(*curves.values())), **labels)


def tidy(axes, sizes: Sequence[int], **labels: str) -> None:
    """Labels a panel whose horizontal axis is logarithmic, with a tick at each size."""
    axes.set(**labels)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
