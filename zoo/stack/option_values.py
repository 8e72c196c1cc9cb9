"""Options as values: what may stand in a config's fields, from Python or from JSON."""

import dataclasses
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from zoo.layers.names import unknown_name

Config = TypeVar("Config")  # a dataclass


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds nested dataclasses from nested dicts; fields that are not given keep their defaults.

    Args:
      kind: a dataclass.
      values: its fields, as `dataclasses.asdict` or JSON has them: dicts for dataclasses, lists for tuples.

    Raises:
      ValueError: a field that there is not (names the nearest), or a value that it does not take.
    """
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise ValueError(unknown_name("field", name, hints))
    return kind(**{name: _from_json(hints[name], value) for name, value in values.items()})


def settle(config: Any) -> None:
    """Checks the kinds of a config's values, in its `__post_init__`, and puts dicts into the dataclasses they describe.

        BackboneConfig(mamba={"d_state": 4})  ==  BackboneConfig(mamba=ssm.MambaConfig(d_state=4))

    Args:
      config: a frozen dataclass; its options objects and tuples may have been given as dicts and lists.

    Raises:
      ValueError: an options object of another mixer, text where a number is expected, or whatever else does not fit:
        names the field, the value and what is expected.
    """
    for name, hint in _hints(type(config)).items():
        given = getattr(config, name)
        try:
            value = _from_json(hint, given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not _fits(hint, value):
            raise ValueError(f"{name}={given!r}, expected {_said(hint)}")
        if value is not given:
            object.__setattr__(config, name, value)
        if dataclasses.is_dataclass(value):  # one that does not check itself
            try:
                settle(value)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error


def with_values(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with other values in some of its fields; dicts change some fields of the options objects there.

        with_values(zoo.presets["mamba-130m"], {"n_layers": 2, "mamba": {"d_state": 4}})

    Raises:
      ValueError: as `from_dict`.
    """
    fields = _hints(type(config))
    values = {}
    for name, value in changes.items():
        if name not in fields:
            raise ValueError(unknown_name("config field", name, fields))
        options = getattr(config, name)
        nested = isinstance(value, Mapping) and dataclasses.is_dataclass(options)
        values[name] = with_values(options, value) if nested else value
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _hints(kind: type) -> dict[str, Any]:
    """The type of each field. A name that is known to type checkers alone has none, and its values are not checked."""
    if kind not in _HINTS:
        try:
            hints = typing.get_type_hints(kind)
        except NameError:
            hints = {}
        _HINTS[kind] = {field.name: hints.get(field.name, Any) for field in dataclasses.fields(kind) if field.init}
    return _HINTS[kind]


_HINTS: dict[type, dict[str, Any]] = {}


def _from_json(hint: Any, value: Any) -> Any:
    for kind in _kinds(hint):
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            return from_dict(kind, value)  # type: ignore[arg-type]
        if isinstance(value, list) and typing.get_origin(kind) is tuple:
            return tuple(value)
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    return any(_is_a(kind, value) for kind in _kinds(hint))


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind. Of texts and names the configs know better which they take, and say it."""
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, kind)  # type: ignore[arg-type]
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple)
    return not isinstance(value, bool | numbers.Number) or kind is Any or typing.get_origin(kind) is typing.Literal


def _said(hint: Any) -> str:
    """What a type is called in an error."""
    names = {type(None): "None", int: "an integer", float: "a number", bool: "True or False", str: "a text"}

    def said(kind: Any) -> str:
        if dataclasses.is_dataclass(kind):
            return f"{getattr(kind, '__name__', kind)} or a dict of its fields"
        if typing.get_origin(kind) is typing.Literal:
            return "one of " + ", ".join(map(repr, typing.get_args(kind)))
        return names.get(kind) or ("a tuple" if typing.get_origin(kind) is tuple else str(kind))

    return " or ".join(said(kind) for kind in _kinds(hint))
