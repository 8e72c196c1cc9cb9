"""Text files as they come: compressed or not, in any encoding. What cannot be read is named with its reason.

pyarrow reads .zst, which Python's own library does from 3.14 on.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import logging
import lzma
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from experiments.data.tokenizers import first_line

log = logging.getLogger(__name__)


def _open_zst(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
# What a damaged file makes the libraries raise.
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Of these the likeliest is told where a text is not UTF-8; the Latin ones can hardly be told apart.
_USUAL: tuple[str, ...] = (
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "shift_jis",
    "euc_jp",
)
_USUAL += ("gb18030", "big5", "euc_kr")
_LATIN = ("cp1252", "cp1250", "cp1254")


class BadFile(ValueError):
    """A file, or a row of one, that is not what it should be."""


def lines_of(text: str) -> list[str]:
    r"""Lines that end at \n, \r\n or \r alone: `str.splitlines` cuts at U+0085, U+2028 and others in names, too."""
    return re.split(r"\r\n|\n|\r", text.removesuffix("\n").removesuffix("\r")) if text else []


def check_encoding(encoding: str, flag: str = "--data.encoding") -> None:
    """Raises a ValueError where Python knows no such encoding of text."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"{flag} {encoding}, expected one that Python knows, such as utf-8, utf-16, cp1252 or latin-1"
        ) from error


def stem_and_suffix(path: Path) -> tuple[str, str]:
    """Name and format of a file that may be compressed: ("train", ".csv") of train.csv.gz."""
    inner = Path(path.stem) if path.suffix in OPENERS else path
    return inner.stem, inner.suffix


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what a damaged file makes the libraries raise into a `BadFile`."""
    try:
        yield
    except _DAMAGE as error:
        raise BadFile(f"{name} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from error


def read_bytes(path: Path, name: str) -> bytes:
    """What is in a file, decompressed.

    Raises:
      BadFile: it cannot be read, or ends too early.
    """
    with reading(name), OPENERS.get(path.suffix, _open)(path) as file:
        return file.read()


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


@contextlib.contextmanager
def open_text(
    path: Path, name: str, encoding: str = "utf-8", *, newline: str = "", flag: str = "--data.encoding"
) -> Iterator[IO[str]]:
    """A file to read text from, decompressed; a mark of its encoding at its beginning is not part of the text.

    Args:
      encoding: strict, unless the file begins with a mark of UTF-16.
      newline: as `open` takes it.
      flag: what names the encoding at the command line, for messages.

    Raises:
      BadFile: it cannot be read, ends too early, or is of another encoding, and of which.
    """
    try:
        with reading(name), OPENERS.get(path.suffix, _open)(path) as raw:
            buffered = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
            codec = _marked(encoding, buffered.peek(2)[:2])
            with io.TextIOWrapper(buffered, encoding=codec, newline=newline) as file:
                yield file
    except UnicodeDecodeError as error:
        raise BadFile(
            f"{name} is not {encoding} text{encoding_hint(read_bytes(path, name), encoding, flag)}"
        ) from error


def _marked(encoding: str, head: bytes) -> str:
    """UTF-8 as it may begin with a mark, or UTF-16 where it does."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return encoding
    return "utf-16" if head.startswith(_UTF16) else "utf-8-sig"


def encoding_hint(raw: bytes, encoding: str, flag: str) -> str:
    """Which encoding text may have that is not of this one, and the flag to name it with."""
    likely = _likely_encoding(raw[: 1 << 16])
    if codecs.lookup(likely).name == codecs.lookup(encoding).name:
        return f"; name its encoding with {flag}"
    return f"; {flag} {likely} may be its encoding"


def _likely_encoding(sample: bytes) -> str:
    half = max(1, len(sample) // 2)
    for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):  # most characters of most texts end, or begin, with 0
        if sample[first::2].count(0) > 0.4 * half and sample[1 - first :: 2].count(0) < 0.1 * half:
            return encoding
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", sample)]
    if runs and sum(runs) < 1.5 * len(runs):  # accents stand alone among plain letters
        return "cp1252"
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample, cp_isolation=list(_USUAL)).best()
    return "cp1252" if best is None or best.encoding in _LATIN else best.encoding.replace("_", "-")


def read_text(
    path: Path, name: str, encoding: str = "utf-8", *, strict: bool = True, flag: str = "--data.encoding"
) -> str:
    """A file's text as it stands, line ends included; up to 1 % of it may be undecodable, which is warned of.

    Args:
      strict: whether to refuse what looks like something else than text.
      flag: what names the encoding at the command line, for messages.

    Raises:
      BadFile: it cannot be read, or is not text.
    """
    raw = read_bytes(path, name)
    codec = _marked(encoding, raw[:2])
    wide = codecs.lookup(codec).name.startswith(("utf-16", "utf-32"))
    if strict and not wide and (zero := raw[:8192].find(b"\0")) >= 0:
        likely = _likely_encoding(raw[: 1 << 16])
        advice = "pick text files with a glob such as '**/*.txt', or leave others out with --data.skip-bad"
        if likely.startswith("utf-16"):
            advice = f"{flag} {likely} may be its encoding"
        raise BadFile(f"{name} is not text (zero byte at offset {zero}); {advice}")
    if stem_and_suffix(path)[1] == ".py" and codec == "utf-8-sig":
        with contextlib.suppress(SyntaxError):  # it declares none, or one that Python does not know
            codec, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(codec, errors="replace")
    said = codec.removesuffix("-sig")
    try:
        junk = text.count("\ufffd") - raw.count("\ufffd".encode(codec))
    except UnicodeEncodeError:
        junk = text.count("\ufffd")
    if strict and junk > len(text) / 100:
        hint = encoding_hint(raw, codec, flag)
        raise BadFile(f"{name} is not {said} text ({junk} of {len(text)} characters undecodable){hint}")
    if strict and junk > 0:
        hint = encoding_hint(raw, codec, flag)
        log.warning("%d characters of %s are not %s and read as U+FFFD%s", junk, name, said, hint)
    return text
