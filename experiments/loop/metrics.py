"""Where the numbers of a run go: a JSON line each, TensorBoard, Weights & Biases, the console, a picture.

    run/metrics.jsonl       {"step": 120, "split": "train", "loss": 1.8312, ...}: everything below can be made from it
    run/tensorboard/        tensorboard --logdir run
    run/wandb_id.txt        the Weights & Biases run that goes on when this one does
    run/curves.png          `plot_metrics`

Names are spelled out and carry their unit: loss (nats), bits_per_byte, accuracy (0 to 1), grad_norm, learning_rate,
tokens_per_second (images_per_second), mfu (0 to 1), seconds_left.
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from experiments.loop.figures import save_figure

logger = logging.getLogger(__name__)


class Metrics:
    """Writes the numbers of one run to its folder, and on to TensorBoard and Weights & Biases.

    Args:
      folder: the run's folder; made if missing.
      tensorboard: also write TensorBoard event files.
      wandb: Weights & Biases project to write to as well, or None. A resumed run continues the same one there.
      config: what Weights & Biases should show as the run's configuration.

    Raises:
      ImportError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wandb = None if wandb is None else _open_wandb(wandb, self.folder, config)
        self._tensorboard_wanted = self._tensorboard_works = tensorboard
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._file: TextIO | None = None
        self._keep_until(math.inf)

    def write(self, step: int, scalars: Mapping[str, Any], split: Literal["train", "validation"] = "train") -> None:
        """Appends one record: numbers measured at a step, Python's or scalar arrays.

        Raises:
          OSError: it could not be written; `move` and write it again. TensorBoard's files are done without.
        """
        numbers = {name: getattr(value, "item", lambda value=value: value)() for name, value in scalars.items()}
        # JSON has no NaN: as text it stays readable for everything else.
        record = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        self.restore()
        assert self._file is not None
        self._file.write(json.dumps({"step": int(step), "split": split, **record}, allow_nan=False) + "\n")
        self._file.flush()
        tagged = {f"{split}/{name}": value for name, value in numbers.items()}
        if self._tensorboard_works:
            try:
                for tag, value in tagged.items():
                    if math.isfinite(value):  # tensorboardX would put a warning on the console for each
                        self._writer().add_scalar(tag, value, step)
            except OSError as error:
                self._tensorboard_works = False
                logger.warning("no more TensorBoard files in %s: %s", self.folder, error.strerror or error)
        if self._wandb is not None:
            self._wandb.log({"step": int(step), **tagged})

    def restore(self) -> bool:
        """Makes the file of the records be there, if need be again: what is deleted is kept as long as it is open.

        Returns:
          whether it had been deleted.
        """
        path, before = _path(self.folder), ""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                    return False
            self._file.seek(0)
            before = self._file.read()
            self._close_file()
            self._close_tensorboard()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        if before and not path.stat().st_size:
            self._file.write(before)
            self._file.flush()
        return bool(before)

    def move(self, folder: Path) -> None:
        """Goes on in another folder, with all whole records until now, also those of a file that has been deleted.

        Raises:
          OSError: it cannot be written. What there is stays as it was, to be moved elsewhere.
        """
        path, before = _path(self.folder), b""
        if self._file is not None:
            with contextlib.suppress(OSError):
                before = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        elif path.is_file():
            before = path.read_bytes()
        folder.mkdir(parents=True, exist_ok=True)
        with _path(folder).open("wb") as file:
            file.write(before[: before.rfind(b"\n") + 1])
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError, ValueError):  # what could not be written is still in its buffer
            self._close_file()
        self._file = None
        with contextlib.suppress(OSError, ValueError):
            self._close_tensorboard()
        self._tensorboard, self._tensorboard_works, self.folder = None, self._tensorboard_wanted, folder

    def rewind(self, step: int) -> None:
        """Forgets what was written after this step: a run that goes on from its checkpoint will write it again."""
        self._keep_until(step)
        self._close_tensorboard()
        self._purge_step = step + 1

    def close(self) -> None:
        """Writes out what TensorBoard and Weights & Biases hold back."""
        self._close_file()
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _keep_until(self, step: float) -> None:
        """Drops records after a step, and a last line that a killed process left half written."""
        self._close_file()
        path = _path(self.folder)
        if not path.exists():
            return
        kept = "".join(line + "\n" for line, record in _lines(path) if record["step"] <= step)
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def _writer(self) -> Any:
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter  # seconds, where torch is installed: it imports that too

            # The suffix because a file is named after the second it is opened in, and overwrites an older one.
            self._tensorboard = SummaryWriter(
                str(self.folder / "tensorboard"),
                purge_step=self._purge_step,
                flush_secs=10,
                filename_suffix=f".{time.time_ns()}",
            )
        return self._tensorboard

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


class NoMetrics(Metrics):
    """In the place of `Metrics` in processes that do not write."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def write(self, step: int, scalars: Mapping[str, Any], split: Literal["train", "validation"] = "train") -> None:
        pass

    def restore(self) -> bool:
        return False

    def move(self, folder: Path) -> None:
        self.folder = folder

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; empty where there are none. A half-written last line is left out."""
    path = _path(folder)
    records = [record for _, record in _lines(path)] if path.exists() else []
    return [
        {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in record.items()}
        for record in records
    ]


def set_metrics_aside(folder: Path) -> Path | None:
    """Renames the records of a run that begins once more, to metrics.before-1.jsonl; None where there are none."""
    if not read_metrics(folder):
        return None
    aside = next(path for n in range(1, 10**6) if not (path := folder / f"metrics.before-{n}.jsonl").exists())
    return _path(folder).rename(aside)


def unreadable_lines(folder: Path) -> list[int]:
    """The numbers, from 1, of the lines of a run's metrics that hold no record: `read_metrics` leaves them out."""
    path = _path(folder)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [number for number, line in enumerate(lines, 1) if _record(line) is None]


def last_evaluation(folder: Path) -> dict[str, Any] | None:
    """The newest record of a run's held-out metrics; None before the first."""
    return next((record for record in reversed(read_metrics(folder)) if record["split"] == "validation"), None)


def plot_metrics(folder: Path) -> Path | None:
    """Draws the loss (or bits per byte) of a run over its steps, above its learning rate, into curves.png.

    Returns:
      The picture's path; None of a run that was stopped before it had a loss to draw.
    """
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    records = read_metrics(folder)

    def curve(name: str, split: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record[name]) for record in records if record["split"] == split and name in record]
        return [step for step, _ in points], [value for _, value in points]

    names = {"bits_per_byte": "bits per byte", "loss": "loss (nats)"}
    # What both splits have, bits per byte first; else what one has.
    name = max(names, key=lambda name: sum(bool(curve(name, split)[0]) for split in ("train", "validation")))
    if not any(name in record for record in records):
        return None
    below = {"learning_rate": "learning rate", "tokens_per_second": "tokens / s", "images_per_second": "images / s"}
    below_name = next((name for name in below if any(name in record for record in records)), None)

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    rows = 1 if below_name is None else 2
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[3, 1][:rows])[:, 0]
    if curve(name, "train")[0]:
        axes[0].plot(*curve(name, "train"), color="tab:blue", linewidth=1, alpha=0.8, label="train")
    steps, values = curve(name, "validation")
    if finite := [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]:
        label = "validation, lowest {:.3f} at step {}".format(*min(finite))
        axes[0].plot(steps, values, color="tab:orange", linewidth=1.5, marker="o", markersize=3.5, label=label)
    axes[0].set(title=f"{names[name].split(' (')[0].capitalize()} of {Path(folder).resolve().name}", ylabel=names[name])
    axes[0].legend(frameon=False)
    if below_name is not None:
        axes[1].plot(*curve(below_name, "train"), color="tab:gray", linewidth=1)
        axes[1].set(ylabel=below[below_name], ylim=(0, None))
    for panel in axes:
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    axes[-1].set_xlabel("step")
    path = Path(folder) / "curves.png"
    save_figure(figure, path, dpi=150)
    return path


def _path(folder: Path) -> Path:
    return Path(folder) / "metrics.jsonl"


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a metrics file, each with its record."""
    lines = [(line, _record(line)) for line in path.read_text(errors="replace").splitlines()]
    return [(line, record) for line, record in lines if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    """The record of a line; None where it was half written when the process was killed, or is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("split"), str):
        return None
    return record if all(_is_number(value) for name, value in record.items() if name != "split") else None


def _is_number(value: Any) -> bool:
    """Whether `write` may have written it."""
    return value in ("nan", "inf", "-inf") if isinstance(value, str) else type(value) in (int, float)


def _open_wandb(project: str, folder: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError(f"wandb={project!r} asks for Weights & Biases, which is missing: pip install wandb") from None
    path = folder / "wandb_id.txt"
    identifier = path.read_text().strip() if path.exists() else ""
    if not identifier:
        identifier = secrets.token_hex(4)
        path.write_text(identifier)
    run = wandb.init(project=project, id=identifier, resume="allow", dir=str(folder), config=dict(config or {}))
    # Its own step only grows, so records written again after `rewind` would be refused.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class Progress:
    """A bar on stderr with the time left, or nothing where stderr is no terminal; and lines on stdout between.

    In a notebook there is one line, which each next one takes the place of.

    Args:
      steps: where the run ends.
      start: where it begins, not 0 when it goes on from a checkpoint.
      silent: nothing of it at all.
    """

    def __init__(self, steps: int, *, start: int = 0, silent: bool = False):
        self._silent, self._terminal = silent, sys.stderr.isatty() and not silent
        self._show = None if silent else _line_of_a_notebook()
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self._terminal)

    def update(self, step: int, *, loss: float | None = None) -> None:
        """Moves the bar to a step."""
        if self._terminal:
            if loss is not None:
                self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def restart_clock(self) -> None:
        """Leaves the time until now out of the time that a step is said to take."""
        if self._terminal:
            self._bar.unpause()

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._terminal:
            self._bar.write(line)
        elif self._show is not None:
            self._show(line)
        elif not self._silent:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _line_of_a_notebook() -> Callable[[str], None] | None:
    """What shows a line in a notebook in the place of the line before; None where this is no notebook."""
    ipython = sys.modules.get("IPython")
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return None
    shown = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
    return lambda line: shown.update({"text/plain": line}, raw=True)


def format_line(step: int, steps: int, metrics: Mapping[str, Any]) -> str:
    """One line for the console: `step   120/600  loss 1.8312  lr 1.0e-03  31.2k tokens/s  left 1:05`."""
    known = [form(float(metrics[name])) for name, form in _CONSOLE.items() if name in metrics]
    others = [
        f"{name.replace('_', ' ')} {float(metrics[name]):.4g}"
        for name in metrics
        if name not in (*_CONSOLE, "seconds_left")
    ]
    left = [f"left {_clock(float(metrics['seconds_left']))}"] if "seconds_left" in metrics else []
    return "  ".join([f"step {step:>5}/{steps}", *known, *others, *left])


def _short(value: float) -> str:
    """Three digits and a unit: 950, 31.2k, 1.25M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{value / scale:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    """1:05, 2:01:05."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# How metrics read on the console, in this order.
_CONSOLE: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "bits_per_byte": "bits/byte {:.3f}".format,
    "accuracy": "accuracy {:.1%}".format,
    "grad_norm": "grad norm {:.2f}".format,
    "learning_rate": "lr {:.1e}".format,
    "tokens_per_second": lambda value: f"{_short(value)} tokens/s",
    "images_per_second": lambda value: f"{_short(value)} images/s",
    "mfu": "mfu {:.1%}".format,
}


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 (where there is none, float16) matrix FLOP/s of a JAX device, None where unknown.

    Sources: NVIDIA's data sheets, halved where they state the number with sparsity, and for GeForce the "peak tensor
    FLOPS with float32 accumulate" of the GA102 and Ada white papers; Google's Cloud TPU pages, per chip.
    """
    for pattern, flops in _PEAK_FLOPS.items():
        if re.fullmatch(pattern, device.device_kind):
            return flops
    return None


# Whole names, so that a slice of a card, a laptop's or a cut-down one is unknown rather than wrong.
_PEAK_FLOPS = {
    r"NVIDIA GB200": 2500e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 480GB": 989e12,  # SXM
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": 835e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA A100-(SXM4|PCIE)-[0-9]+GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA A10": 125e12,
    r"Tesla T4": 65e12,  # float16
    r"Tesla V100-SXM2-[0-9]+GB": 125e12,  # float16
    r"Tesla V100-PCIE-[0-9]+GB": 112e12,  # float16
    r"NVIDIA GeForce RTX 4090": 165.2e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"TPU v2": 45e12 / 2,  # a JAX device is one of a chip's two cores
    r"TPU v3": 123e12 / 2,
    r"TPU v4": 275e12,
    r"TPU v5 lite|TPU v5e": 197e12,
    r"TPU v5|TPU v5p": 459e12,
    r"TPU v6 lite|TPU v6e": 918e12,
    r"TPU7x": 2307e12 / 2,  # two devices a chip
}
