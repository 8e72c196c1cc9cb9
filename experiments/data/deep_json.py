"""JSON whose brackets are nested so deep that libraries which follow them end the process.

pyarrow, with which the library `datasets` reads JSON, goes one call deeper at each bracket and has no limit: 20,000 of
them are a segmentation fault, which no `try` catches.
"""

from pathlib import Path

import numpy as np

from experiments.data.text_files import OPENERS, BadFile, reading, stem_and_suffix

DEEPEST = 1000
_CHUNK = 1 << 20
_STEP = np.zeros(256, np.int64)
_STEP[[ord("["), ord("{")]] = 1
_STEP[[ord("]"), ord("}")]] = -1


def refuse_deep_json(folder: Path) -> None:
    """Raises a BadFile that names the file, where one of JSON below a folder has more brackets open than `DEEPEST`.

    Brackets in strings count as well: text in which a thousand more are opened than closed is rare.
    """
    for path in sorted(folder.rglob("*")):
        if stem_and_suffix(path)[1] in (".json", ".jsonl") and path.is_file():
            _check(path, lines=stem_and_suffix(path)[1] == ".jsonl")


def _check(path: Path, *, lines: bool) -> None:
    """`lines`: each is a value of its own."""
    depth = 0
    with reading(f"'{path.name}'"), OPENERS.get(path.suffix, lambda p: p.open("rb"))(path) as file:
        while chunk := file.read(_CHUNK):
            codes = np.frombuffer(chunk, np.uint8)
            depths = depth + np.cumsum(_STEP[codes])
            ends = np.flatnonzero(codes == ord("\n")) if lines else np.empty(0, int)
            before = np.concatenate([[0], depths[ends]])  # at the end of each line
            depths -= np.repeat(before, np.diff(ends + 1, prepend=0, append=len(codes)))
            if depths.max() > DEEPEST:
                raise BadFile(f"'{path.name}' nests brackets deeper than {DEEPEST:,}")
            depth = int(depths[-1])
