"""A configuration as the command that makes it: the nearest preset, and a flag for each field that differs."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")  # a dataclass


def command_line(
    prog: str, config: Config, presets: Mapping[str, tuple[str, Config]], *, without: tuple[str, ...] = ("run_dir",)
) -> str:
    """The command, as a shell takes it.

    Args:
      prog: "python -m experiments.causal_lm".
      config: what `flags.parse(presets)` has given.
      presets: name to (one line of help, config).
      without: fields that are left out.
    """
    changes = {name: _changes(preset, config) for name, (_, preset) in presets.items()}
    preset = min(changes, key=lambda name: len(changes[name]))
    words = [*prog.split(), preset]
    for name, value in changes[preset].items():
        if name not in without:
            words += _flag(name.replace("_", "-"), value)
    return shlex.join(words)


def _changes(before: Any, now: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of dataclasses in which two differ, by their dotted names, with what they are now."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(now):
        one, other = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            out |= _changes(one, other, f"{prefix}{field.name}.")
        elif one != other:
            out[prefix + field.name] = other
    return out


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{group}{'.' if group else ''}no-{last}"]
    if isinstance(value, tuple | list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
