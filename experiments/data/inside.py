"""What lies in a folder of others: regular files within it, and no link that leads elsewhere, no pipe, no device.

A link can name any file of the machine, and a pipe or a device can be read for ever. The hub's cache is folders of
links, too: what they lead to lies beside the snapshots, in blobs, and is within.
"""

import stat
from collections.abc import Callable, Iterable
from pathlib import Path


def what_is_wrong(path: Path, root: Path) -> str:
    """Why a path below a folder is no file or folder within it; "" where it is one."""
    try:
        kind = path.stat().st_mode
        real = path.resolve()
    except (OSError, RuntimeError):  # the second is a circle of links, to older Pythons
        return "leads nowhere"
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        return "is a pipe, a socket or a device"
    if not any(real.is_relative_to(place) for place in _places(root.resolve())):
        return "leads out of the folder"
    return ""


def within(paths: Iterable[Path], root: Path, say: Callable[[str], None]) -> list[Path]:
    """Those of some paths below a folder that are files or folders within it; of the others is said what they are."""
    kept = []
    for path in paths:
        if wrong := what_is_wrong(path, root):
            say(f"'{path.relative_to(root).as_posix()}' {wrong}")
        else:
            kept.append(path)
    return kept


def _places(root: Path) -> list[Path]:
    """The folder, and where the links of a snapshot in the hub's cache lead: .../models--x/{snapshots/y,blobs}."""
    snapshot = next((folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"), None)
    return [root, snapshot.parent.parent / "blobs"] if snapshot else [root]
