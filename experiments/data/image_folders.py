"""Images in folders named after their class: which file is of which class, and of which split.

photos/cat/1.png  photos/cat/at-night/2.png            two cats: the top folder is the class
photos/train/cat/1.png  photos/val/cat/2.png           with splits
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.data.data_source import SPLITS
from experiments.data.inside import what_is_wrong, within
from experiments.data.left_out import LeftOut

log = logging.getLogger(__name__)

# Folder name -> split.
FOLDERS = SPLITS | {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"}
# What Pillow opens besides pictures.
_NO_PICTURES = {".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".fit", ".fits"}


class Files(NamedTuple):
    """One split."""

    paths: list[Path]
    """In the order of their names, folders included."""
    classes: list[str]
    """Of each."""


@functools.cache
def suffixes() -> frozenset[str]:
    """What files of pictures end with, in small letters."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN) - _NO_PICTURES


def find_images(root: Path, where: str) -> dict[str, Files]:
    """The images below a folder by split; all are to train on where no folder is called train.

    A folder "train" that has no folders in it, but images, is a class like any other.

    Raises:
      ValueError: there are none in folders of classes.
    """
    while len(inside := _folders(root)) == 1 and _folders(inside[0]) and inside[0].name not in FOLDERS:
        root = inside[0]  # a folder around the classes
    inside = _folders(root, LeftOut(functools.partial(log.warning, "%s: %s", where), "folders were"))
    splits = {folder: FOLDERS[folder.name] for folder in inside if folder.name in FOLDERS and _folders(folder)}
    if "train" not in splits.values():
        splits = {root: "train"}
    elif others := [folder.name for folder in inside if folder not in splits]:
        log.warning("%s: %s beside train is left out", where, ", ".join(others))
    found: dict[str, Files] = {}
    for folder, split in splits.items():
        if split in found:
            raise ValueError(f"{where}: several folders are {split}, expected one: {folder.name} and another")
        found[split] = _files(folder, where)
    if not any(files.paths for files in found.values()):
        raise ValueError(
            f"{where} holds no images in folders named after their class; images end in .png, .jpg, .webp, ..."
        )
    return found


def _folders(root: Path, say: Callable[[str], None] = lambda message: None) -> list[Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    return within(found, root, say)


def _files(root: Path, where: str) -> Files:
    named: list[str] = []
    stray: list[str] = []
    left_out = LeftOut(functools.partial(log.warning, "%s: %s", where), "images were")
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = [Path(folder) / name for name in subfolders if not name.startswith((".", "__"))]
        there = Path(folder).resolve()  # a link to what it lies in would be followed for ever
        subfolders[:] = [p.name for p in within(here, root, left_out) if not there.is_relative_to(p.resolve())]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes():
                path = Path(folder) / name
                if wrong := what_is_wrong(path, root):
                    left_out(f"'{path.relative_to(root).as_posix()}' {wrong}")
                    continue
                (named if Path(folder) != root else stray).append(path.relative_to(root).as_posix())
    if stray:
        log.warning(
            "%s: %d images lie in no folder of a class and are left out, such as %s", where, len(stray), stray[0]
        )
    named.sort()
    return Files([root / name for name in named], [name.partition("/")[0] for name in named])
