"""Dataclass to command line and back: the one file that knows tyro, and where errors become one clear line."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from experiments.loop import compiled, distributed
from experiments.loop.flatten import flatten
from experiments.loop.json_files import write_json
from experiments.loop.stopping import exit_statuses, status_of
from zoo.layers.names import unknown_name
from zoo.stack.option_values import from_dict

Config = TypeVar("Config")  # a dataclass
Positional = tyro.conf.Positional
Hidden = tyro.conf.Suppress  # a field without a flag
Repeated = tyro.conf.UseAppendAction  # a tuple whose flag is given once for each value
SCRIPTS = ("subq", "subq.exe")  # names of the installed command


def alias(flag: str) -> Any:
    """Marks a field, `Annotated[int, alias("--steps")]`, that is asked for so often that it goes without its group."""
    return tyro.conf.arg(aliases=(flag,))


def named(flag: str) -> Any:
    """Marks a field, `Annotated[str, named("out")]`, whose flag has another name than the field."""
    return tyro.conf.arg(name=flag)


class UsageError(ValueError):
    """Something that the person at the command line can mend. Its message is one line."""


@contextlib.contextmanager
def usage_errors():
    """Turns errors about values and files into `UsageError`, around code that reads what a person gave."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def as_called(text: str) -> str:
    """A text whose commands are as this process was started: `subq sample` for `python -m experiments.sample`."""
    return re.sub(r"python -m\s+experiments\.", "subq ", text) if Path(sys.argv[0]).name in SCRIPTS else text


def _with_cache(description: str) -> str:
    return f"{as_called(description)}\n\n{compiled.HELP}"


def parse(
    presets: Mapping[str, tuple[str, Config]],
    *,
    prog: str,
    description: str,
    make_way: Callable[[Config, Collection[str]], Config] = lambda preset, given: preset,
) -> Config:
    """Reads the command line: a preset's name, then flags that change its fields.

    Args:
      presets: name to (one line of help, config).
      prog: the command, for the help page.
      description: what the command does, for the help page.
      make_way: make_way(preset, fields that flags name) gives the preset without what contradicts them.
    """
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked and not asked.startswith("-") and asked not in presets:
        raise UsageError(unknown_name("preset", asked, presets))
    presets = {name: (line, make_way(preset, given(type(preset)))) for name, (line, preset) in presets.items()}
    prog, description = as_called(prog), _with_cache(description)
    with _errors_in_one_line(prog):
        config = tyro.extras.overridable_config_cli(presets, prog=prog, description=description)
    return _with_other_processes(config)


def _with_other_processes(config: Any) -> Any:
    """A configuration whose `train.distributed` has been heeded: what it says of this process is no part of a run."""
    train: Any = getattr(config, "train", None)
    if not hasattr(train, "distributed"):
        return config
    with usage_errors():
        distributed.start(train.distributed, flatten(dataclasses.asdict(config)))
    return dataclasses.replace(config, train=dataclasses.replace(train, distributed=None))


def given(kind: type) -> frozenset[str]:
    """The fields of a configuration that flags of the command line name, whatever they say: {"train.steps"}."""
    flags = {argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("--")}
    named = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    return frozenset(field for field, names in _flags_of(kind).items() if named & names)


def _flags_of(kind: type, prefix: str = "") -> dict[str, set[str]]:
    """Every field of nested dataclasses, with the names that it has as a flag, all in underscores."""
    found: dict[str, set[str]] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        hint, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        aliases = {alias for mark in marks for alias in getattr(mark, "aliases", None) or ()}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _flags_of(hint, f"{prefix}{name}.")
        else:
            names = {prefix + name, f"{prefix}no_{name}"}  # --train.no-tensorboard
            found[prefix + name] = names | {alias.removeprefix("--").replace("-", "_") for alias in aliases}
    return found


def parse_one(kind: type[Config], *, prog: str, description: str) -> Config:
    """Reads the command line of a command without presets."""
    prog, description = as_called(prog), _with_cache(description)
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


def hand_on_or_explain(commands: Mapping[str, str], description: str | None) -> int:
    """`hand_on`, and without an argument or with --help what the commands are.

    Args:
      commands: name to module.
      description: of all of them.
    """
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(as_called(description or ""))
        return 0
    return hand_on(commands)


def run(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: errors that a person can mend become one line on stderr and exit status 1.

    Programs that it compiles are kept, see `compiled`. With TRACEBACK=1 in the environment the whole traceback is
    shown. After a SIGINT or SIGTERM the status is 130 or 143, also where a training run was saved first; see
    `stopping`.
    """
    compiled.keep_compiled()
    with exit_statuses(), distributed.ends_together():
        try:
            sys.exit(main() or 0)
        except BrokenPipeError:  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (UsageError, FloatingPointError, OSError, ImportError) as error:
            if os.environ.get("TRACEBACK") == "1":
                raise
            print(f"error: {distributed.prefix()}{as_called(str(error))}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(status_of(signal.SIGINT))


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
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable {kind.__name__}: {error}") from error
