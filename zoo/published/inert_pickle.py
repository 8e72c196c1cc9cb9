"""Pickles read as data: what one builds is described, and nothing that it names is imported, called or set.

A pickle is a program for a machine with a stack, a memo and a few dozen instructions. Here is that machine, for all
protocols, over the instructions as `pickletools` cuts them. A class or function that is named becomes a `Named`; what
calling it gives is up to the caller, by default an `Inert`, which stays nothing whatever is done to it.

Memory and time are those of the pickle's bytes. Python's own machine takes what a pickle says: 231 bytes can make it
reserve 2 GiB for a memo, or hash a tuple of tuples of tuples for longer than anyone waits. Here the memo is a dict, and
only plain keys are hashed.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any

# Descriptions of tensors take a few hundred bytes each.
MAX_BYTES = 16 * 2**20


class Named:
    """Stands for a class or function that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Inert:
    """Stands for what a class or function of others would have given, or for a key that is not plain."""

    __slots__ = ("asked",)

    def __init__(self, asked: str):
        self.asked = asked

    def __repr__(self) -> str:
        return f"<of {self.asked}>"


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Of Python 2, whose strings are text here.
_OLD_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING")
_VALUES: tuple[str, ...] = (
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "UNICODE",
)
_VALUES += ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")


def read_pickle(
    content: bytes, *, call: Callable[[str, tuple], Any], persistent: Callable[[Any], Any], max_bytes: int = MAX_BYTES
) -> Any:
    """What a pickle builds.

    Args:
      content: the pickle.
      call: what calling something by its name with arguments gives, mostly `Inert(name)`.
      persistent: what a persistent id stands for.
      max_bytes: the longest pickle that is read.

    Raises:
      ValueError, LookupError, TypeError, pickle.UnpicklingError: damaged, too long, or something that only code could
        do. Callers name the file.
    """
    if len(content) > max_bytes:
        raise ValueError(f"a pickle of {len(content):,} bytes, expected at most {max_bytes:,}")
    machine = _Machine(call, persistent)
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise pickle.UnpicklingError("no end")


class _Machine:
    def __init__(self, call: Callable[[str, tuple], Any], persistent: Callable[[Any], Any]):
        self.call, self.persistent = call, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _VALUES:
            stack.append(argument)
        elif op in _OLD_STRINGS:
            stack.append(argument.encode("latin-1").decode("utf-8", "replace"))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else argument] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "MARK":
            stack.append(_MARK)
        elif op in ("POP", "DUP"):
            stack.append(stack[-1]) if op == "DUP" else stack.pop()
        elif op == "POP_MARK":
            self.marked()
        elif op in ("GLOBAL", "INST"):
            named = Named(argument.replace(" ", ".", 1))
            stack.append(named if op == "GLOBAL" else self.called(named, tuple(self.marked())))
        elif op == "STACK_GLOBAL":
            module, name = self.pop(2)
            stack.append(Named(f"{module!s:.200}.{name!s:.200}" if type(module) is type(name) is str else "nothing"))
        elif op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            self.make(op)
        elif op in ("PERSID", "BINPERSID"):
            stack.append(self.persistent(argument if op == "PERSID" else stack.pop()))
        elif op in ("PROTO", "FRAME"):
            pass
        elif not (self.build(op) or self.fill(op)):
            raise ValueError(f"uses {op}, which weights files do not")

    def build(self, op: str) -> bool:
        """Containers."""
        stack = self.stack
        if op in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"):
            n = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
            stack.append(tuple(self.marked() if op == "TUPLE" else self.pop(n[op])))
        elif op in ("EMPTY_LIST", "LIST"):
            stack.append([] if op == "EMPTY_LIST" else self.marked())
        elif op in ("EMPTY_DICT", "DICT"):
            made: dict = {}
            _put(made, [] if op == "EMPTY_DICT" else self.marked())
            stack.append(made)
        elif op in ("EMPTY_SET", "FROZENSET"):
            if op == "FROZENSET":
                self.marked()
            stack.append(Inert("a set"))
        else:
            return False
        return True

    def fill(self, op: str) -> bool:
        """What puts something into a container, or sets attributes: on nothing, to no effect, on all else refused."""
        stack = self.stack
        if op in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if op == "APPEND" else self.marked()
            if type(stack[-1]) is list:
                stack[-1].extend(values)
            elif type(stack[-1]) is not Inert:
                raise TypeError(f"extends a {type(stack[-1]).__name__}")
        elif op in ("SETITEM", "SETITEMS"):
            values = self.pop(2) if op == "SETITEM" else self.marked()
            if type(stack[-1]) is dict:
                _put(stack[-1], values)
            elif type(stack[-1]) is not Inert:
                raise TypeError(f"sets items of a {type(stack[-1]).__name__}")
        elif op == "BUILD":  # torch sets `_metadata` on a state dict
            stack.pop()
            if type(stack[-1]) not in (Inert, dict):
                raise TypeError(f"sets attributes of a {type(stack[-1]).__name__}")
        else:
            return False
        return True

    def make(self, op: str) -> None:
        """Calls, and objects made by a class."""
        if op == "OBJ":
            called, *values = self.marked()
            arguments = tuple(values)
        elif op == "NEWOBJ_EX":
            called, arguments, _ = self.pop(3)
        else:
            called, arguments = self.pop(2)
        self.stack.append(self.called(called, arguments))

    def called(self, called: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:  # to make one again and again could take long
            raise TypeError(f"calls with a {type(arguments).__name__}")
        if type(called) is Named:
            return self.call(called.name, arguments)
        if type(called) is Inert:
            return called
        raise TypeError(f"calls a {type(called).__name__}")

    def pop(self, n: int) -> list[Any]:
        if n > len(self.stack) or any(value is _MARK for value in self.stack[len(self.stack) - n :]):
            raise pickle.UnpicklingError("an empty stack")
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def marked(self) -> list[Any]:
        """Takes what lies above the last mark off the stack, and the mark."""
        values: list[Any] = []
        while self.stack:
            if (value := self.stack.pop()) is _MARK:
                return values[::-1]
            values.append(value)
        raise pickle.UnpicklingError("no mark")


def _put(target: dict, values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Of larger numbers, many can be made that have one hash.
        plain = type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 2**60)
        target[key if plain else Inert("a key")] = value
