"""Dataclass to command line and back: the one file that knows tyro, and where errors become one clear line."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from experiments.loop.json_files import write_json
from zoo.layers.names import unknown_name

Config = TypeVar("Config")  # a dataclass
Positional = tyro.conf.Positional
Hidden = tyro.conf.Suppress  # a field without a flag
Repeated = tyro.conf.UseAppendAction  # a tuple whose flag is given once for each value


def alias(flag: str) -> Any:
    """Marks a field, `Annotated[int, alias("--steps")]`, that is asked for so often that it goes without its group."""
    return tyro.conf.arg(aliases=(flag,))


class UsageError(ValueError):
    """Something that the person at the command line can mend. Its message is one line."""


@contextlib.contextmanager
def usage_errors():
    """Turns errors about values and files into `UsageError`, around code that reads what a person gave."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def parse(presets: Mapping[str, tuple[str, Config]], *, prog: str, description: str) -> Config:
    """Reads the command line: a preset's name, then flags that change its fields.

    Args:
      presets: name to (one line of help, config).
      prog: the command, for the help page.
      description: what the command does, for the help page.
    """
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked and not asked.startswith("-") and asked not in presets:
        raise UsageError(unknown_name("preset", asked, presets))
    with _errors_in_one_line(prog):
        return tyro.extras.overridable_config_cli(dict(presets), prog=prog, description=description)


def parse_one(kind: type[Config], *, prog: str, description: str) -> Config:
    """Reads the command line of a command without presets."""
    with _errors_in_one_line(prog):
        return tyro.cli(kind, prog=prog, description=description)


@contextlib.contextmanager
def _errors_in_one_line(prog: str):
    """tyro explains a mistake in a box of many lines on stderr; this keeps its first sentence and its suggestions."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as ended:
        if not ended.code:
            raise
        print(f"error: {_unboxed(box.getvalue())} (flags: {prog} --help)", file=sys.stderr)
        raise


def _unboxed(box: str) -> str:
    """The first paragraph of a box below its title, and the flags it suggests, in one line."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # a terminal's colours
    paragraphs: list[list[str]] = [[]]
    for line in (line.strip("│╭╮╰╯ ") for line in box.splitlines()):
        if line.startswith(("──", "─ ", "----")):  # a rule, or a title in the border; dashes where there is no Unicode
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    texts = [" ".join(paragraph) for paragraph in paragraphs if paragraph] or [box]
    message = texts[0] if "╭" in box else texts[min(1, len(texts) - 1)]
    perhaps = next((text for text in texts if text.startswith("Perhaps you meant")), "")
    suggested = dict.fromkeys(re.findall(r"(?<!\S)--[\w.-]+\w", perhaps.replace("--help", "")))
    hint = f"; did you mean {' or '.join(suggested)}?" if suggested else ""
    return message.replace("__tyro-dummy-inner__.", "--") + hint


def hand_on(commands: Mapping[str, str]) -> int:
    """Runs the `main` of the module that the first argument names, with the arguments behind it.

    Args:
      commands: name to module.

    Raises:
      UsageError: there is no such command.
    """
    if sys.argv[1] not in commands:
        raise UsageError(unknown_name("command", sys.argv[1], commands))
    return importlib.import_module(commands[sys.argv.pop(1)]).main()


def run(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: errors that a person can mend become one line on stderr and exit status 1.

    With TRACEBACK=1 in the environment the whole traceback is shown.
    """
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (UsageError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def save_config(config: Any, path: Path) -> None:
    """Writes a dataclass as JSON, whole or not at all."""
    write_json(dataclasses.asdict(config), path)


def load_config(kind: type[Config], path: Path) -> Config:
    """Reads a dataclass from JSON.

    Raises:
      ValueError: not JSON, a field that `kind` does not have, or a value that it rejects; the file is named.
      FileNotFoundError: there is no such file.
    """
    try:
        return from_dict(kind, json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable {kind.__name__}: {error}") from error


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds nested dataclasses from nested dicts; fields that are not given keep their defaults."""
    hints = typing.get_type_hints(kind)
    unknown = values.keys() - {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    return kind(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint, value):
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        nested = [h for h in typing.get_args(hint) if dataclasses.is_dataclass(h)]
        return from_dict(nested[0], value) if nested and isinstance(value, dict) else value
    return tuple(value) if typing.get_origin(hint) is tuple else value
