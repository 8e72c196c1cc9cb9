"""How fast the operations and the models are, side by side with what one would pick instead, in the same run.

    python -m experiments.bench                                    # everything, some minutes on two cores
    python -m experiments.bench scan                               # selective_scan at (1, 2048, 1536, 16) alone
    python -m experiments.bench mamba2 mamba3 --lengths 1024 4096 --json out.json
    python -m experiments.bench mamba2 --only zoo mamba2-jax --passes decode
    python -m experiments.bench bert --lengths 128 512 2048 8192 --plot bert.png
    python -m experiments.bench vision                             # image classifiers; also decode, depth, recall
    python -m experiments.bench peers                              # all beside other packages; limits: the machine
    pip install torch transformers mambapy mamba2-jax mamba3-jax   # what stands beside ours; missing ones are left out

`scan` and `conv` time one operation, `mlp` one channel mixer; `mamba`, `mamba2` and `mamba3` (single-input, and mimo)
whole language models at the width of the 130m ones and `bert` masked language models at the width of BERT-base, with
few layers and a small vocabulary, so that the mixers are what counts; `mlm` small encoders of equal size on a batch of
masked tokens (`--d-model 128 --layers 4 --vocab-size 8192` is `pretrain small`). Passes: forward to the logits (`mlm`:
the loss); forward + backward, to the gradient in every parameter (`scan`, `conv`: in every input; `mlp`: in both);
decode, one token at a time after a prompt, in ms a token. All is float32, and contenders read the same tokens.

Memory, in MiB, is what a call takes beyond its inputs and parameters: for JAX the results and temporary buffers that
the compiler plans (on CPU that is all but what libraries take inside a product or an FFT), for PyTorch the peak that
its profiler sees its allocator reach in one more call. Decoding has none, nor have other things that cannot tell.

Contenders take turns, round after round, so that a machine that slows down slows all of them. Each figure is the median
of its rounds; what counts is the ratio to the first contender. Numbers say little without the hardware and the commit.
With several lengths, lines below the table say from which on the first contender is faster than each other one.
"""

import dataclasses
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from experiments.bench import masked_lm, models, monarch, record, scan, turns
from experiments.bench.contenders import PASSES, Contender, Missing, Pass, Sizes
from experiments.bench.panels import draw
from experiments.loop import flags

Group = Literal["scan", "mamba", "mamba2", "mamba3", "mamba3-mimo", "conv", "mlp", "bert", "mlm"]
GROUPS: dict[str, Mapping[str, Contender]] = {
    "scan": scan.CONTENDERS,
    **models.CONTENDERS,
    **monarch.CONTENDERS,
    **masked_lm.CONTENDERS,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time, at which sizes, and how often."""

    what: Annotated[tuple[Group, ...], flags.Positional] = ()
    """Operations and models to time; mamba3 includes mamba3-mimo. None given: all."""
    passes: tuple[Literal["forward", "backward", "decode"], ...] = ("forward", "backward", "decode")
    """Passes to time; backward is forward + backward."""
    lengths: tuple[int, ...] = (2048,)
    """Positions in a row. Decoding is timed once: its cost does not depend on the length."""
    batch: int = 1
    """Rows."""
    d_model: int = 768
    """Width of the residual stream; 768 is that of the 130m models. The inner width of Mamba-2 and 3 needs to be a
    multiple of 64, the width of a head, as is that of BERT."""
    d_inner: int | None = None
    """Inner width of `scan`. None: twice d_model, as in the models."""
    d_state: int | None = None
    """State size of a channel. None: that of the published models, 16 for scan and mamba, 128 for mamba2 and mamba3."""
    layers: int = 1
    """Layers of the models."""
    vocab_size: int = 256
    """Tokens of the models."""
    tokens: int = 64
    """Tokens of the prompt, and tokens decoded in one timed call."""
    rounds: int = 5
    """Timed calls of each contender, after two that are not counted (one where it takes 10 seconds or more); 3 at most
    for calls of 2 seconds and more."""
    only: tuple[str, ...] = ()
    """Contenders to time, by a part of their names. Empty times all that are installed."""
    json: Path | None = None
    """File to write all figures to: every time of every round, the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: tokens/s against length, a panel for each pass, a line for each contender."""

    def __post_init__(self):
        for name in ("batch", "d_model", "layers", "vocab_size", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}, expected at least one length, of at least 1")
        if self.plot and (len(set(self.lengths)) < 2 or set(self.passes) <= {"decode"}):
            raise ValueError(f"plot={self.plot}, expected more than one length, of a pass other than decode")


def main() -> int:
    """Times every contender and prints a table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench", description=__doc__)
    # Or PyTorch's threads wait for each other and for more by spinning, at the cost of whoever else needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    chosen = _chosen(config)
    environment = record.read_environment()
    print(record.machine_and_versions(environment))
    print(f"float32, b={config.batch} d_model={config.d_model} layers={config.layers}, commit {environment['commit']}")
    print(
        f"\n| {'what':<11} | {'l':>6} | {'contender':<38} | {'pass':<18} | {'ms':>8} | {'ratio':>6} | {'tokens/s':>9} "
        f"| {'MiB':>7} |"
    )
    print(f"| {'-' * 11} | {'-' * 5}: | {'-' * 38} | {'-' * 18} | {'-' * 7}: | {'-' * 5}: | {'-' * 8}: | {'-' * 6}: |")
    figures: list[dict] = []
    missing: dict[str, None] = {}
    for what, contenders in chosen.items():
        for length in config.lengths:
            passes = {p: label for p, label in PASSES.items() if p in config.passes}
            if length != config.lengths[0]:
                passes.pop("decode", None)
            figures += _time_group(what, contenders, config, length, passes, missing)
    for line in [*crossovers(figures), *(f"not timed: {line}" for line in missing)]:
        print(f"\n{line}", end="")
    print()
    if config.plot:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def _chosen(config: Config) -> dict[str, dict[str, Contender]]:
    """The contenders that the flags ask for, by what they are timed in."""
    groups = {what: GROUPS[what] for what in GROUPS if not config.what or {what, what.split("-")[0]} & {*config.what}}
    chosen = {
        what: {name: c for name, c in group.items() if not config.only or any(part in name for part in config.only)}
        for what, group in groups.items()
    }
    if not any(chosen.values()):
        names = ", ".join(name for group in groups.values() for name in group)
        raise flags.UsageError(f"--only {' '.join(config.only)} matches none of: {names}")
    return {what: group for what, group in chosen.items() if group}


def _time_group(what, contenders, config, length, passes: dict[Pass, str], missing) -> list[dict]:
    """Builds the contenders, times each pass, prints its rows and returns its figures."""
    d_state = config.d_state or (16 if what in ("scan", "mamba") else 128)
    sizes = Sizes(
        *(config.batch, length, config.d_model, config.d_inner or 2 * config.d_model, d_state),
        *(config.layers, config.vocab_size, config.tokens),
    )
    built = {}
    for name, contender in contenders.items():
        with flags.usage_errors():
            try:
                built[name] = contender(sizes)
            except Missing as reason:
                missing.setdefault(f"{name}: {reason}")
    figures = []
    for which, label in passes.items():
        calls = {name: pair[which] for name, pair in built.items() if which in pair}
        if not calls:
            continue
        tokens = config.batch * (1 if which == "decode" else length)
        divisor = config.tokens if which == "decode" else 1
        times = {
            name: [ms / divisor for ms in rounds]
            for name, rounds in turns.time_in_turns(calls, config.rounds, label=f"{what} {length} {label}").items()
        }
        first = statistics.median(times[next(iter(times))])
        place = "" if which == "decode" else length
        for name, rounds in times.items():
            ms, speed = statistics.median(rounds), 1e3 * tokens / statistics.median(rounds)
            figure = f"{ms:8.3f}" if ms < 10 else f"{ms:8.1f}"
            memory = getattr(calls[name], "memory", lambda: None)()
            print(
                f"| {what:<11} | {place:>6} | {name:<38} | {label:<18} | {figure} | {ms / first:6.2f} "
                f"| {speed:9,.0f} | {'' if memory is None else f'{memory / 2**20:,.1f}':>7} |",
                flush=True,
            )
            row = {"what": what, "length": length, "contender": name, "pass": label, "ms": rounds}
            figures.append({**row, "tokens_per_second": speed, "memory_bytes": memory})
    return figures


def _curves(figures: list[dict]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Tokens/s by length of each contender of each thing and pass that was timed at more than one length."""
    curves: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for figure in figures:
        panel = curves.setdefault((figure["what"], figure["pass"]), {})
        panel.setdefault(figure["contender"], {})[figure["length"]] = figure["tokens_per_second"]
    return {key: panel for key, panel in curves.items() if len(set().union(*panel.values())) > 1}


def crossovers(figures: list[dict]) -> list[str]:
    """A line for each other contender: from which of the lengths on the first one is faster."""
    lines = []
    for (what, label), panel in _curves(figures).items():
        (first, ours), *others = panel.items()
        for name, theirs in others:
            lengths = sorted(ours.keys() & theirs.keys())
            slower = [length for length in lengths if ours[length] <= theirs[length]]
            after = [length for length in lengths if length > max(slower, default=0)]
            where = f"is faster than {name} from {after[0]} on" if after else f"is slower than {name} at {slower[-1]}"
            lines.append(f"{what}, {label}: {first} {where}")
    return lines


def plot(figures: list[dict], path: Path) -> None:
    """Draws tokens/s against length, a panel for each pass of each thing that was timed at more than one."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    curves = _curves(figures)
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*curves, strict=True))
    picture = Figure(figsize=(5 * len(columns), 3.6 * len(rows)), layout="constrained")
    panels = picture.subplots(len(rows), len(columns), squeeze=False)
    for (what, label), panel in curves.items():
        axes = panels[rows.index(what), columns.index(label)]
        draw(axes, panel, title=f"{what}, {label}", xlabel="length", ylabel="tokens / s")
    picture.savefig(path, dpi=80)
