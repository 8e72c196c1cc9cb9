"""What works with what: each task with each family of models is trained, saved, loaded, exported, and asked.

    python -m experiments.bench coverage                            # all of it, some twenty minutes on two CPU cores
    python -m experiments.bench coverage --tasks masked classes     # some tasks
    python -m experiments.bench coverage --out table.md             # what RESULTS.md has

Every cell is the commands themselves, run one after the other on a small model: the training command for two steps;
`convert` into our own layout, which reads back what it wrote and compares it bit for bit; `convert` into each published
layout; and the command that uses a model, given the converted folder alone. Texts are this library's own sources,
images handwritten digits: what is shown is that the way is open, not how good a model is.
"""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

import m2
import ssm
import zoo
from experiments.loop import flags
from zoo.layers.names import unknown_name

LAYOUTS = ("transformers", "official")
# Family -> flags, besides the pattern of its name.
_BERT = "--model.norm-place post --model.norm layer --model.attn.position none --model.attn.bias --model.mlp.no-gated "
_BERT += "--model.mlp.activation gelu --model.mlp.bias --model.max-len 64 --model.type-vocab-size 2"
FAMILIES = dict.fromkeys(("mamba", "mamba2", "mamba3", "linear_attn", "m2/monarch", "mamba2 attn/mlp", "attn/mlp"), "")
ENCODERS = FAMILIES | {"attn/mlp, as BERT": _BERT}
IMAGES = dict.fromkeys(("mamba2", "m2/monarch", "attn/mlp"), "")
IMAGES |= dict.fromkeys(("vim", "ss2d/mlp"), "--model.class-token none --model.pool mean")
_SMALL = "--model.d-model 16 --model.n-layers 2 --model.mamba2.head-dim 8 --model.mamba3.head-dim 8 "
_SMALL += "--model.attn.n-heads 2 --model.attn.head-dim None --model.linear-attn.n-heads 2 --train.no-tensorboard "


class Task(NamedTuple):
    """What a model is trained for, and how it is used."""

    train: str
    """The training command, without pattern and folder."""
    use: str
    """The command that uses the model in a folder OUT."""
    families: Mapping[str, str] = ENCODERS
    """Name to flags; a name begins with the pattern."""


def _finetune(file: str, use: str) -> Task:
    train = f"bert finetune tiny --data.path {file} --data.tokenizer bytes --max-len 64 --steps 2 {_SMALL}"
    return Task(train, use)


_LM = "--data.path texts.txt --data.seq-len 64 --train.batch-size 4 --steps 2 --eval-batches 1 --model.m2.l-max 64 "
TASKS = {
    "causal": Task(
        f"causal_lm tiny --prompt= {_LM}{_SMALL}", "sample --model OUT --prompt a --max-new-tokens 2", FAMILIES
    ),
    "masked": Task(f"bert pretrain tiny --data.tokenizer bytes {_LM}{_SMALL}", "bert embed OUT texts.txt out.npy"),
    "classes": _finetune("classes.csv", "bert predict OUT classes.csv out.csv"),
    "numbers": _finetune("numbers.csv --kind regression", "bert predict OUT numbers.csv out.csv"),
    "tags": _finetune("tags.jsonl", "bert predict OUT tags.jsonl out.jsonl"),
    "answers": _finetune("answers.jsonl", "bert predict OUT answers.jsonl out.jsonl --second-column context"),
    "search": Task(
        f"bert retrieve tiny --data.path search --tokenizer bytes --max-query-len 32 --max-doc-len 64 "
        f"--train.batch-size 4 --steps 2 {_SMALL}",
        "bert embed OUT texts.txt out.npy",
    ),
    "images": Task(
        f"vit tiny --model.patch-size 2 --train.batch-size 64 --steps 2 --threads 1 {_SMALL}",
        "vit predict OUT digit.png",
        IMAGES,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which tasks and families."""

    tasks: tuple[str, ...] = ()
    """Names of tasks. None given: all."""
    families: tuple[str, ...] = ()
    """Families of models. None given: all."""
    out: Path | None = None
    """File for the table, in Markdown. None: it is printed."""

    def __post_init__(self):
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(unknown_name("task", name, TASKS))
        known = {**ENCODERS, **IMAGES}
        for family in self.families:
            if family not in known:
                raise ValueError(unknown_name("family", family, known))


@dataclasses.dataclass
class Line:
    """What came of one task with one family: "yes", or why not."""

    task: str
    family: str
    cells: dict[str, str]


def write_data(folder: Path) -> None:
    """Small files for all tasks, made of the sources of this library."""
    sources = [
        (package.__name__, path.read_text(encoding="utf-8"))
        for package in (m2, ssm, zoo)
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py"))
    ]
    lines = [(name, line.strip()) for name, text in sources for line in text.splitlines() if len(line) > 40]
    (folder / "texts.txt").write_text("\n".join(line for _, line in lines) + "\n", encoding="utf-8")
    for file, label in (("classes.csv", None), ("numbers.csv", len)):
        with (folder / file).open("w", encoding="utf-8", newline="") as out:
            table = csv.writer(out)
            table.writerow(("text", "label"))
            table.writerows((line, label(line) if label else name) for name, line in lines[::4])
    tagged = [line.split() for _, line in lines[::4]]
    records = [
        {"words": words, "tags": ["name" if word.isidentifier() else "other" for word in words]} for words in tagged
    ]
    _write_lines(folder / "tags.jsonl", records)
    answers = [
        {
            "question": "What is returned?",
            "context": line,
            "answers": {"text": [line[start:]], "answer_start": [start]},
        }
        for _, line in lines
        if (start := line.find("return ") + 7) > 6
    ]
    _write_lines(folder / "answers.jsonl", answers)
    search = folder / "search"
    (search / "qrels").mkdir(parents=True)
    heads = [(str(i), text.split('"""')[1].split("\n")[0], text[:400]) for i, (_, text) in enumerate(sources)]
    _write_lines(search / "queries.jsonl", [{"_id": name, "text": query} for name, query, _ in heads])
    _write_lines(search / "corpus.jsonl", [{"_id": name, "text": text} for name, _, text in heads])
    for split, some in (("train", heads[::2]), ("dev", heads[1::4]), ("test", heads[3::4])):
        rows = ["query-id\tcorpus-id\tscore", *(f"{name}\t{name}\t1" for name, *_ in some)]
        (search / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(folder / "digit.png")


def _write_lines(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def call(command: str, *more: str) -> str:
    """Runs a command in this process: "yes", or the line that it ended with."""
    name, *rest = command.split()
    module = importlib.import_module(f"experiments.{name}")
    out, errors, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name, *rest, *more]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            flags.run(module.main)
    except SystemExit as ended:
        if not ended.code:
            return "yes"
        said = errors.getvalue().strip().splitlines()
        why = said[-1].removeprefix("error: ").removesuffix("; layout='native' holds every model") if said else ""
        return re.sub("^pattern='[^']*' has", "the pattern has", why) or f"exit status {ended.code}"
    finally:
        sys.argv = argv
    return "yes"


def try_out(task: str, family: str, call: Callable[..., str] = call) -> Line:
    """One line of the table. The current folder holds what `write_data` wrote.

    Args:
      call: call(command, *arguments) runs a command and says "yes", or why not.
    """
    jax.clear_caches()  # programs of other models
    for name in ("run", "out", *LAYOUTS):
        shutil.rmtree(name, ignore_errors=True)
    for old in Path().glob("out.*"):
        old.unlink()
    pattern, options = family.partition(",")[0], TASKS[task].families[family].split()
    cells = {"train": call(TASKS[task].train, "--model.pattern", pattern, *options, "--run-dir", "run")}
    if cells["train"] == "yes":
        cells["save, load"] = call("convert run out")
        for layout in LAYOUTS:
            cells[layout] = call(f"convert run {layout} --layout {layout}")
        cells["use"] = call(TASKS[task].use.replace("OUT", "out"))
    return Line(task, family, cells)


def format_table(lines: Sequence[Line]) -> str:
    """The table in Markdown; why a cell is empty stands below it, each reason once."""
    columns = list(dict.fromkeys(name for line in lines for name in line.cells))
    reasons: list[str] = []

    def show(text: str | None) -> str:
        if text in ("yes", None):
            return "✓" if text else ""
        if text not in reasons:
            reasons.append(str(text))
        return f"({reasons.index(str(text)) + 1})"

    rows = [[line.task, _quoted(line.family), *(show(line.cells.get(name)) for name in columns)] for line in lines]
    head = ["task", "family", *columns]
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*table, "", *(f"({i}) {reason}  " for i, reason in enumerate(reasons, start=1))]) + "\n"


def _quoted(family: str) -> str:
    pattern, comma, more = family.partition(",")
    return f"`{pattern}`{comma}{more}"


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    """Tries everything out, and writes the table."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench coverage", description=__doc__)
    asked = [
        (task, family)
        for task in config.tasks or TASKS
        for family in TASKS[task].families
        if not config.families or family in config.families
    ]
    lines = []
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        write_data(Path())
        for task, family in tqdm(asked, unit="line", dynamic_ncols=True, disable=not sys.stderr.isatty()):
            lines.append(try_out(task, family))
    text = format_table(lines)
    if config.out is None:
        print(text, end="")
    else:
        config.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    flags.run(main)
