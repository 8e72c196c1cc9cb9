"""How fast this is beside the packages that one would take instead, row by row, in the same run.

    python -m experiments.bench peers                                      # all rows, up to an hour on one core
    python -m experiments.bench peers --only attention generate --json out.json --plot out.png
    python -m experiments.bench peers --quick                              # tiny sizes: whether all of it runs
    pip install '.[peers]'                                                 # the peers; missing ones are named

A row is one thing of ours beside one of a peer's: attention (torch's scaled_dot_product_attention), ViT-Ti (timm),
reading a prompt and decoding (transformers: Llama, Mamba, Mamba-2), Mamba (mambapy, transformers), Mamba-2 (mamba2-jax,
transformers), fft_conv (torch.fft, with its own layout and with ours), Monarch products (batched products in torch, and
a dense product in JAX), ssd and selective_scan (written in torch), M2-BERT (transformers' BERT). Passes: forward;
forward + backward, to the gradient in every input or parameter; prefill; decode, in ms a token. All is float32.

Both sides have as many cores, one by default, and take turns, round after round. Times are medians; the ratio is the
peer's time over ours in the same round, its median and, behind it, the smallest and the largest: above 1 we are faster.
Where both have the same inputs and parameters, "error" is how far their results are from ours, RMS over RMS; more than
1e-3 ends the run with status 1, when all is printed. Numbers say little without the hardware and the commit.
"""

import dataclasses
import statistics
from pathlib import Path

from experiments.bench import peer_models, peer_operations, record, turns
from experiments.bench.contenders import Missing
from experiments.bench.cores import use_cores
from experiments.bench.pairs import Row, disagreement
from experiments.loop import flags

PASSES = {"forward": "forward", "backward": "forward + backward", "prefill": "prefill", "decode": "decode, a token"}
# Results that are farther from each other than this are not the same. In float32, deep models reach 1e-5.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows, and how often."""

    only: tuple[str, ...] = ()
    """Rows to time, by a part of their names, such as attention, "l=512" or timm. Empty times all."""
    passes: tuple[str, ...] = tuple(PASSES)
    """Passes to time: forward, backward, prefill, decode."""
    threads: int = 1
    """Cores that either side may use."""
    rounds: int = 5
    """Timed calls of each side, after two that are not counted (one where it takes 10 seconds or more); 3 at most for
    calls of 2 seconds and more."""
    quick: bool = False
    """Tiny sizes, to see whether everything runs; the times mean nothing."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: the ratio of each row, from the smallest to the largest of its rounds."""

    def __post_init__(self):
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if unknown := {*self.passes} - {*PASSES}:
            raise ValueError(f"passes={sorted(unknown)}, expected some of {', '.join(PASSES)}")


def chosen_rows(config: Config) -> list[Row]:
    """The rows that the flags ask for.

    Raises:
      ValueError: there are none.
    """
    rows = [*peer_operations.rows(config.quick), *peer_models.rows(config.quick)]
    chosen = [row for row in rows if not config.only or any(part in row.name for part in config.only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(config.only)} matches none of: " + "; ".join(row.name for row in rows))
    return chosen


def main() -> int:
    """Times every row and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench peers", description=__doc__)
        rows = chosen_rows(config)
        cores = use_cores(config.threads)
    with cores:
        return _compare(rows, config)


def _compare(rows: list[Row], config: Config) -> int:
    environment = record.read_environment()
    print(record.machine_and_versions(environment))
    print(f"float32, {config.threads} threads, {config.rounds} rounds, commit {environment['commit']}")
    print(
        f"\n| {'what':<14} | {'shape':<28} | {'peer':<20} | {'pass':<18} | {'ms':>8} | {'peer ms':>8} | {'ratio':>6} "
        f"| {'from - to':>13} | {'error':>7} |"
    )
    print(
        f"| {'-' * 14} | {'-' * 28} | {'-' * 20} | {'-' * 18} | {'-' * 7}: | {'-' * 7}: | {'-' * 5}: | {'-' * 12}: "
        f"| {'-' * 6}: |"
    )
    figures: list[dict] = []
    missing: list[str] = []
    for row in rows:
        try:
            figures += _time_row(row, config)
        except Missing as reason:
            missing.append(f"{row.name}: {reason}")
    for line in [*_summary(figures), *(f"not timed: {line}" for line in missing)]:
        print(f"\n{line}", end="")
    print()
    if config.plot and figures:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return int(any(differs(figure) for figure in figures))


def differs(figure: dict) -> bool:
    """Whether results that should be the same are not."""
    return figure["error"] is not None and not figure["error"] < TOLERANCE


def _time_row(row: Row, config: Config) -> list[dict]:
    """Builds both sides, times each pass that they have, prints its line and returns its figures."""
    pair = row.build()
    figures = []
    for which in PASSES:
        if which not in config.passes or which not in pair.ours or which not in pair.theirs:
            continue
        calls = {"ours": pair.ours[which], row.peer: pair.theirs[which]}
        error = None
        if which in pair.alike:
            error = disagreement(calls["ours"](), pair.alike[which](calls[row.peer]()))
        times = turns.time_in_turns(calls, config.rounds, label=f"{row.what} {row.shape}, {PASSES[which]}")
        units = pair.units.get(which, 1)
        figure = figure_of(row, which, [[ms / units for ms in side] for side in times.values()], error)
        figures.append(figure)
        print(
            f"| {row.what:<14} | {row.shape:<28} | {row.peer:<20} | {PASSES[which]:<18} | {figure['ms']:8.3g} "
            f"| {figure['peer_ms']:8.3g} | {figure['ratio']:6.2f} | {figure['low']:5.2f} - {figure['high']:5.2f} "
            f"| {'' if error is None else f'{error:.0e}':>7} |",
            flush=True,
        )
    return figures


def figure_of(row: Row, which: str, times: list[list[float]], error: float | None) -> dict:
    """A pass of a row as it is recorded: medians, and ratios of the rounds that both sides took."""
    ours, theirs = times
    ratios = [peer / own for own, peer in zip(ours, theirs, strict=False)]
    return {
        **{"what": row.what, "shape": row.shape, "peer": row.peer, "pass": which, "error": error},
        **{"ms": statistics.median(ours), "peer_ms": statistics.median(theirs), "rounds": ours, "peer_rounds": theirs},
        **{"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def _summary(figures: list[dict]) -> list[str]:
    """Lines below the table: how many rows are below 1, and which results differ."""
    if not figures:
        return []
    slower = [figure for figure in figures if figure["ratio"] < 1]
    lines = [f"{len(figures) - len(slower)} of {len(figures)} are at least as fast as the peer"]
    for figure in figures:
        if differs(figure):
            name = f"{figure['what']} {figure['shape']}, {figure['peer']}, {PASSES[figure['pass']]}"
            lines.append(f"{name}: results differ by {figure['error']:.1e}")
    return lines


def plot(figures: list[dict], path: Path) -> None:
    """Draws the ratios on one logarithmic axis, a line for each row, a colour for each pass."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    names = list(dict.fromkeys(f"{figure['what']} {figure['shape']}, {figure['peer']}" for figure in figures))
    passes = [which for which in PASSES if which in {figure["pass"] for figure in figures}]
    picture = Figure(figsize=(9, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = picture.subplots()
    for number, which in enumerate(passes):
        mine = [figure for figure in figures if figure["pass"] == which]
        shift = 0.16 * (number - (len(passes) - 1) / 2)
        places = [names.index(f"{f['what']} {f['shape']}, {f['peer']}") + shift for f in mine]
        middle = [figure["ratio"] for figure in mine]
        spread = [[f["ratio"] - f["low"] for f in mine], [f["high"] - f["ratio"] for f in mine]]
        axes.errorbar(middle, places, xerr=spread, fmt="o", markersize=4, linewidth=1, label=PASSES[which])
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set(xscale="log", xlabel="the peer's time / ours (right of the line we are faster)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    picture.savefig(path, dpi=80)
