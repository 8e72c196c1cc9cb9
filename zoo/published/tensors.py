"""Which tensor of a published file is which parameter."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

Json = dict[str, Any]
Kind = Literal["same", "linear", "conv", "image", "row", "block"]


Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern in our names, and what stands in its place in theirs."""


class Entry(NamedTuple):
    """One tensor of a file, and the parameters that it holds."""

    paths: tuple[tuple, ...]
    """Our parameters, as paths of `nnx.to_flat_state`."""
    kind: Kind
    """same: as it is. linear: matrices transposed (those of experts each), several one above the other, and vectors one
    behind the other. conv: with a middle axis of size 1. image: a kernel over rows and columns, its outputs and inputs
    first, not last. row: with a first axis of size 1. block: without our first axis, of size 1."""

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape, given those of the parameters."""
        first = shapes[0]
        if self.kind == "linear":
            outputs = sum(shape[-1] for shape in shapes)
            return (outputs,) if len(first) == 1 else (*first[:-2], outputs, first[-2])
        if self.kind == "image":
            return first[3], first[2], first[0], first[1]
        return {"same": first, "conv": (first[0], 1, *first[1:]), "row": (1, *first), "block": first[1:]}[self.kind]

    def split(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The parameters in a tensor, as views, given their shapes."""
        if self.kind == "linear":
            ends = np.cumsum([shape[-1] for shape in shapes])[:-1].tolist()
            return [_transposed(part) for part in np.split(tensor, ends, axis=0 if tensor.ndim == 1 else -2)]
        if self.kind == "image":
            return [tensor.transpose(2, 3, 1, 0)]
        index: Any = {"same": ..., "conv": np.s_[:, 0], "row": 0, "block": None}[self.kind]
        return [tensor[index]]

    def join(self, params: list[np.ndarray]) -> np.ndarray:
        """The tensor of some parameters."""
        if self.kind == "linear":
            return np.concatenate([_transposed(param) for param in params], axis=0 if params[0].ndim == 1 else -2)
        if self.kind == "image":
            return params[0].transpose(3, 2, 0, 1)
        index: Any = {"same": ..., "conv": np.s_[:, None], "row": None, "block": 0}[self.kind]
        return params[0][index]


def _transposed(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 1 else np.swapaxes(x, -1, -2)


def renamed(name: str, rules: Sequence[Rule]) -> str:
    """A name after (pattern, replacement) of each rule, one after the other."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


class Table(NamedTuple):
    """What a published file of a model holds."""

    entries: dict[str, Entry]
    """Name of each tensor to the parameters in it: every parameter is in exactly one."""
    copies: Mapping[str, str] = MappingProxyType({})
    """Names that a tensor is stored under besides its own, which they map to. A file may leave them out."""
    constants: Mapping[str, np.ndarray] = MappingProxyType({})
    """Tensors that follow from the config. A file may leave them out."""
    ignored: re.Pattern = re.compile(r"(?!)")
    """Names of tensors that mean nothing."""
    stacks: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Names among the entries that no file has, and those of the tensors that make them up along a new first axis."""
