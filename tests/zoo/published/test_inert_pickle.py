"""Pickles read as data: plain ones as Python reads them, all in the memory and time of their bytes."""

import contextlib
import pickle
import time
import tracemalloc

import pytest

from zoo.published.inert_pickle import Inert, Named, read_pickle


def read(content):
    return read_pickle(content, call=lambda name, args: Inert(name), persistent=lambda pid: ("persistent", pid))


PLAIN = [
    None,
    [True, False, 0, -1, 255, 256, 65_536, 2**31, -(2**70), 1.5, float("inf")],
    {"a": [], "b": {}, 3: (), "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], True: "text \u2014 \U0001f600"},
    {"again": [text := "a text that comes twice", text], "bytes": b"\0\xff", "array": bytearray(b"xyz")},
    [["x"] * 300, list(range(2000)), {str(i): i for i in range(1500)}],
]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_that_python_reads(protocol):
    if protocol == 2:  # it names functions for what it has no instruction for
        plain = [*PLAIN[:3], PLAIN[4]]
    else:
        plain = PLAIN if protocol == 5 else [*PLAIN[:3], {"bytes": b"\0\xff"}, PLAIN[4]]
    for value in plain:
        assert read(pickle.dumps(value, protocol=protocol)) == value


def test_what_is_named_is_neither_imported_nor_called():
    assert read(pickle.dumps(print, protocol=4)).name == "builtins.print"
    for made in (read(pickle.dumps(complex(1, 2), protocol=2)), read(b"cposix\nsystem\n(S'true'\ntR.")):
        assert type(made) is Inert
        assert made.asked in ("builtins.complex", "__builtin__.complex", "posix.system")
    assert type(read(b"\x80\x02cnot\nthere\n.")) is Named


def nested_key(depth):
    """A dict whose key is a tuple of twice the same tuple, and so on: to hash it takes 2 ** depth steps."""
    doubled = b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02})q\x00" + doubled + b"K\x01s."


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\x00\x00\x00\x08.",  # a memo of 2 ** 27 places
        b"\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00.",  # a text of 2 ** 40 bytes
        b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 ** 31 bytes
        nested_key(120),
        b"\x80\x02" + b"(" * 20_000 + b".",
        b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",  # a frame of 2 ** 63 bytes
    ],
    ids=["memo", "text", "bytes", "number", "key", "marks", "deep", "frame"],
)
def test_memory_and_time_are_those_of_the_bytes(content):
    start = time.process_time()
    tracemalloc.start()
    with contextlib.suppress(ValueError, LookupError, TypeError, pickle.UnpicklingError):
        read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert time.process_time() - start < 20


def test_a_long_pickle_is_refused():
    with pytest.raises(ValueError, match="a pickle of 17,000,000 bytes, expected at most 16,777,216"):
        read(bytes(17_000_000))
