"""The steps of several models, compiled for several devices, as a table in a document.

    python -m experiments.aot --report RESULTS.md                       # all
    python -m experiments.aot --report RESULTS.md --device h100         # the rows of one device; others stay
    python -m experiments.aot --report RESULTS.md --models m2-bert-80m --optimization-level O2    # in their place

The table stands between two marks in the document, and each row is written as soon as it is known.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.aot.command import Found, compile_step, preset
from experiments.aot.programs import Level
from experiments.aot.steps import What
from experiments.aot.targets import find_target, missing
from experiments.loop import flags
from zoo.layers.names import unknown_name

BEGIN, END = "<!-- python -m experiments.aot --report RESULTS.md -->", "<!-- end of the report -->"
HEAD = (
    "| model | step | rows a device | device | MiB a device | of its memory | temporaries | TFLOP | compiled, CPU s |"
)
RULE = "| --- | --- | --: | --- | --: | --: | --: | --: | --: |"


class Item(NamedTuple):
    """A step of a model."""

    preset: str
    what: What
    rows: int
    """On each device."""
    seq_len: int
    """0: images."""
    changes: tuple[tuple[str, str], ...] = ()
    """Of the model."""

    @property
    def name(self) -> str:
        """What the table calls the model."""
        return " ".join([self.preset, *(f"`{value}`" for _, value in self.changes)])


HYBRID = (("pattern", "mamba2*5 attn"),)
ITEMS = (
    Item("mamba-130m", "train", 8, 2048),
    Item("mamba2-130m", "train", 8, 2048),
    Item("mamba2-130m", "train", 8, 2048, HYBRID),
    Item("m2-bert-80m", "train", 128, 128),
    Item("m2-bert-80m-8k", "train", 2, 8192),
    Item("vit-small", "train", 64, 0),
    Item("vim-small", "train", 64, 0),
    Item("m2-vit-base", "train", 64, 0),
    Item("mamba-130m", "decode", 64, 2048),
    Item("mamba2-130m", "decode", 64, 2048),
    Item("mamba2-130m", "decode", 64, 2048, HYBRID),
)
DEVICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the table has."""

    report: Path
    """The document."""
    device: tuple[str, ...] = DEVICES
    """Devices to compile for."""
    models: tuple[str, ...] = ()
    """Names of models. None given: all."""
    optimization_level: Level | None = None
    """How hard the compiler tries. None: as `experiments.aot` has it, O1 for a TPU, which rows say."""

    def __post_init__(self):
        for name in self.models:
            if name not in (known := {item.preset for item in ITEMS}):
                raise ValueError(unknown_name("model of the report", name, known))


def compile_item(item: Item, device: str, optimization_level: Level | None = None) -> Found:
    """Compiles one for one target, data-parallel over its devices."""
    start = preset(item.preset)
    changes: dict[str, Any] = dict(item.changes)
    model = dataclasses.replace(start.model, **changes)
    size = item.rows * len(find_target(device).devices)
    sizes = {"batch_size": size, "seq_len": item.seq_len}
    options = {"what": item.what, "optimization_level": optimization_level, **sizes}
    return compile_step(dataclasses.replace(start, model=model, **options), device)


def row_of(item: Item, device: str, found: Found) -> str:
    """The row of a table. Its first four cells say what it is about."""
    rows = f"{item.rows} x {item.seq_len:,}" if item.seq_len else f"{item.rows} images"
    cells = [item.name, item.what, rows, device]
    flops = f"{found.flops / len(found.target.devices) / 1e12:.3g}"
    if found.program is None:
        return "| " + " | ".join([*cells, "does not fit", "", "", flops, ""]) + " |"
    program = found.program
    share = f"{program.memory / found.target.memory:.0%}"
    sizes = [f"{program.memory / 2**20:,.0f}", share, f"{program.temporaries / 2**20:,.0f}"]
    seconds = f"{program.seconds:.0f}" + (f" at {found.level}" if found.level else "")
    return "| " + " | ".join([*cells, *sizes, flops, seconds]) + " |"


def with_row(text: str, row: str) -> str:
    """A document with a row in its table: in place of the one about the same, or at its end.

    Raises:
      ValueError: the document has no place for the table.
    """
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    rows = [line for line in table.strip().splitlines() if line.startswith("|")][2:]
    about = _about(row)
    places = [i for i, old in enumerate(rows) if _about(old) == about]
    rows[places[0] if places else len(rows) :] = [row, *(rows[places[0] + 1 :] if places else [])]
    return f"{before}{BEGIN}\n\n" + "\n".join([HEAD, RULE, *rows]) + f"\n\n{END}{after}"


def _about(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")][1:5]


def main() -> int:
    """Compiles all, and writes each row."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.aot", description=__doc__)
        with_row(config.report.read_text(encoding="utf-8"), RULE)
        for device in config.device:
            if why := missing(device):
                raise flags.UsageError(why)
    items = [item for item in ITEMS if not config.models or item.preset in config.models]
    for item, device in tqdm([(item, device) for device in config.device for item in items], unit="step"):
        row = row_of(item, device, compile_item(item, device, config.optimization_level))
        config.report.write_text(with_row(config.report.read_text(encoding="utf-8"), row), encoding="utf-8")
        tqdm.write(row)
    return 0
