"""What runs have come to, read from their folders: of every experiment, finished or not, whole or damaged."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.loop.checkpoints import look
from experiments.loop.metrics import read_metrics, unreadable_lines
from experiments.loop.runs import MODEL_FILE, flatten

# A field that the configuration of a command has and that of no other: a run's folder does not say it otherwise.
COMMANDS = {
    "prompt": "causal_lm",
    "masking": "bert pretrain",
    "verbaliser": "bert finetune",
    "zero_shot": "bert retrieve",
    "needle_len": "needles",
    "augment": "vit",
    "eval_sequences": "synthetic",
    "teacher_steps": "distill",
    "vision_init": "vlm",
    "d_embed": "clip",
}
# The stages of a distillation, each a folder in the run's, in their order.
STAGES = ("layers", "qkv", "hidden", "logits")


class Run(NamedTuple):
    """What a folder says of a run."""

    folder: Path
    command: str
    """As it stands behind `python -m experiments.`; "?" where that is not known."""
    pattern: str
    """Its mixers; empty where they are not known."""
    steps: int
    """Steps done: those of the newest checkpoint."""
    asked: int | None
    """Steps of the whole run, None where they are not said (in epochs, say)."""
    config: dict[str, Any]
    """Its configuration, flat: {"optim.learning_rate": 0.001}."""
    records: list[dict[str, Any]]
    """Of its metrics, oldest first; of several seeds, their means at the steps that all have come to."""
    when: float | None
    """When it last wrote something, in seconds since the epoch."""
    seeds: tuple[int, ...]
    """Those of a run of several seeds."""
    problems: list[str]
    """What is wrong with it, a line each."""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of held-out metrics."""
        return [record for record in self.records if record["split"] == "validation"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss, which is the checkpoint that is kept as the best."""
        finite = [record for record in self.evaluations if is_number(record.get("loss"))]
        return min(finite, key=lambda record: record["loss"], default=None)


def find_runs(root: Path) -> list[Run]:
    """The runs below a folder, by path; what a run has inside it, its seeds or stages, is read as a part of it.

    Args:
      root: a folder of runs; or a run, of which those inside it are given too.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    found = []
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(place)
        if is_run(folder):
            found.append(read_run(folder))
            if folder != root:
                folders.clear()
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run, be it half written; one in a published layout does not."""
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "config.json.partial")):
        return True
    if not (folder / "config.json").is_file():
        return False
    config, problem = _read(folder / "config.json")
    return bool(problem) or "train" in config


def read_run(folder: Path) -> Run:
    """Reads what a folder says of a run. What cannot be read is among its `problems`."""
    config, problem = _read(folder / "config.json")
    problems = [problem] if problem else []
    model: Mapping[str, Any] = {}
    if (folder / MODEL_FILE).exists():
        said, problem = _read(folder / MODEL_FILE)
        problems += [problem] if problem else []
        model = said["config"] if isinstance(said.get("config"), dict) else {}
    command = next((command for field, command in COMMANDS.items() if field in config), "?")
    seeds = tuple(config["seeds"]) if isinstance(config.get("seeds"), list) and len(config["seeds"]) > 1 else ()
    names = [f"seed-{seed}" for seed in seeds] if seeds else [n for n in STAGES if command == "distill"]
    parts = [_read_part(folder / name, name) for name in names] or [_read_part(folder, "")]
    problems += [line for part in parts for line in part.problems]
    if not seeds and not any(part.steps for part in parts) and not config.get("zero_shot"):
        problems.append("there is no checkpoint")
    if missing := [name for name, part in zip(names, parts, strict=False) if seeds and part.when is None]:
        problems.append(f"not begun: {', '.join(missing)}")
    asked = _asked(config, command)
    if seeds:
        steps, records = min(part.steps for part in parts), _means([part.records for part in parts if part.records])
    else:
        steps, records = sum(part.steps for part in parts), _one_behind_another(parts)
    times = [time for time in (_time(folder / "config.json"), *(part.when for part in parts)) if time is not None]
    flat = flatten(config) | (flatten(model, "model.") if model else {})
    pattern = next((str(p) for p in (model.get("pattern"), config.get("pattern"), flat.get("model.pattern")) if p), "")
    when = max(times, default=None)
    return Run(folder, command, pattern, steps, asked, flat, records, when, seeds, problems)


class _Part(NamedTuple):
    """A folder with metrics and checkpoints: a run, one of its seeds or one of its stages."""

    name: str
    steps: int
    records: list[dict[str, Any]]
    when: float | None
    problems: list[str]


def _read_part(folder: Path, name: str) -> _Part:
    problems: list[str] = []
    records: list[dict[str, Any]] = []
    steps: list[int] = []
    try:
        records = read_metrics(folder)
        if cut := unreadable_lines(folder):
            problems.append(f"metrics.jsonl: line {', '.join(map(str, cut[:5]))} cannot be read")
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read: {error.strerror}")
    try:
        steps, complaints = look(folder)
        problems += complaints
    except OSError as error:
        problems.append(f"checkpoints cannot be read: {error.strerror}")
    times = [_time(folder / "metrics.jsonl"), _time(folder / "checkpoints")]
    done = steps[-1] if steps else 0
    where = f"{name}: " if name else ""
    return _Part(name, done, records, max((t for t in times if t), default=None), [where + line for line in problems])


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a JSON file, and what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, f"there is no {path.name}"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read: {' '.join(str(error).split())}"
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} holds no configuration")


def _asked(config: Mapping[str, Any], command: str) -> int | None:
    train = config.get("train")
    if command == "distill":
        stages = [config.get(name) for name in STAGES]
        return sum(
            stage["steps"] for stage in stages if isinstance(stage, dict) and isinstance(stage.get("steps"), int)
        )
    if config.get("epochs") is not None or not isinstance(train, dict) or not isinstance(train.get("steps"), int):
        return None
    return train["steps"]


def _one_behind_another(parts: Sequence[_Part]) -> list[dict[str, Any]]:
    records, before = [], 0
    for part in parts:
        records += [record | {"step": before + record["step"]} for record in part.records]
        before += part.steps
    return records


def _means(several: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records averaged over runs, at the steps of which each has a record."""
    if not several:
        return []
    tables = [{(record["step"], record["split"]): record for record in records} for records in several]
    means = []
    for key, first in tables[0].items():
        same = [table[key] for table in tables if key in table]
        if len(same) == len(tables):
            names = [n for n in first if n not in ("step", "split") and all(is_number(r.get(n)) for r in same)]
            means.append({"step": key[0], "split": key[1]} | {n: sum(r[n] for r in same) / len(same) for n in names})
    return means


def is_number(value: Any) -> bool:
    """Whether what a record holds is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
