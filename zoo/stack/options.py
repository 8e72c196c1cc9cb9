"""Options as text, inside a pattern's word: `[window=64,position=none]`."""

import types
import typing
from typing import Any, Literal

from zoo.layers.names import unknown_name


def read_options(owner: str, config: type, text: str) -> dict[str, Any]:
    """Reads "window=64,position=none" into fields of a config.

    Args:
      owner: what has the options, for errors.
      config: the dataclass that has the fields. Those of numbers, names and yes or no can be read, or no value.
      text: name=value, separated by commas.

    Raises:
      ValueError: an unknown field (naming the nearest), a field given twice, or a value that it does not take.
    """
    hints = typing.get_type_hints(config)
    options: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"option {item!r} of {owner}, expected name=value")
        if name not in hints:
            raise ValueError(unknown_name(f"option of {owner}", name, hints))
        if name in options:
            raise ValueError(f"option {name} of {owner} is given twice")
        options[name] = _read(f"{owner}.{name}", hints[name], value)
    return options


def write_options(options: dict[str, Any]) -> str:
    """The one spelling of some options, brackets included: sorted, 160000 rather than 160000.0 or 1.6e5."""
    if not options:
        return ""
    return f"[{','.join(f'{name}={_write(value)}' for name, value in sorted(options.items()))}]"


def _write(value) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _read(name: str, hint: Any, text: str) -> Any:
    """A value of a type, out of its text."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    expected: list[str] = []
    for kind in kinds:
        if kind is type(None):
            values: dict[str, Any] = {"none": None}
        elif kind is bool:
            values = {"true": True, "false": False}
        elif typing.get_origin(kind) is Literal:
            values = {str(value): value for value in typing.get_args(kind)}
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                expected.append("an integer" if kind is int else "a number")
            continue
        else:
            continue
        if text in values or text.lower() in values:
            return values[text] if text in values else values[text.lower()]
        expected += values
    if not expected:
        raise ValueError(f"{name} cannot be set in a pattern, only in the config")
    raise ValueError(f"{name}={text}, expected {' or '.join(expected)}")
