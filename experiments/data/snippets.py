"""Labelled texts that come with Python: snippets of its standard library, and which package each is from."""

import re
import sysconfig
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Ten packages of the standard library that have files enough to hold some out.
PACKAGES: tuple[str, ...] = ("asyncio", "email", "http", "idlelib", "importlib")
PACKAGES += ("multiprocessing", "tkinter", "unittest", "urllib", "xml")
# Lines of a snippet.
LINES = 30


def standard_library() -> dict[str, list[Row]]:
    """Snippets of some thirty lines with the package that they are from, each file on one side of the split.

    Lines that import are left out, and the packages' own names, which would give it away.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)
    tables: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for package in PACKAGES:
        files = [
            file
            for file in sorted((root / package).rglob("*.py"))
            if not {"test", "tests", "idle_test", "__pycache__"} & set(file.relative_to(root).parts)
        ]
        files = [file for file in files if file.stat().st_size > 1000]
        files.sort(key=lambda file: (-file.stat().st_size, file.relative_to(root).as_posix()))
        for number, file in enumerate(files):
            split = ("train", "train", "test", "train", "validation")[number % 5]
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [line for line in lines if line.strip() and not re.match(r"\s*(import|from)\b", line)]
            for start in range(0, len(lines), LINES):
                snippet = lines[start : start + LINES]
                if len(snippet) >= LINES // 3:
                    tables[split].append({"text": names.sub("", "\n".join(snippet)), "label": package})
    return tables
