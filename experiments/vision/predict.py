"""What an image classifier says of images: files or folders of them in, a row of each out.

    python -m experiments.vit predict runs/vit/tiny digit.png another.png          # JSON lines to standard output
    python -m experiments.vit predict FOLDER photos/ out.csv                       # all images in a folder and below
    python -m experiments.vit predict FOLDER photos/ --out out.csv                 # the same
    find . -name "*.jpg" | python -m experiments.vit predict FOLDER -              # a file a line

MODEL is a run, a published folder, or a name on the hub. A row has the image's `path`, the `predicted` class, its
probability as `score`, and the `probabilities` of all classes by their names, in a CSV a column p(NAME) each.
"""

import dataclasses
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image

from experiments.data.inside import within
from experiments.data.left_out import LeftOut
from experiments.data.pictures import open_picture
from experiments.data.text_files import lines_of
from experiments.loop import flags
from experiments.loop.mesh import MeshConfig, on_mesh
from experiments.loop.row_files import STANDARD, SUFFIXES, check_out, one_out, write_rows
from experiments.vision.predictor import THREADS, Predictor

# Unreadable images that are named.
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, which images, and where predictions go."""

    model: Annotated[str, flags.Positional]
    """A run's folder, a published folder, or a name on the hub."""
    images: Annotated[tuple[str, ...], flags.Positional]
    """Files, or folders of them. -: a file a line of standard input. The last may be OUT, the same as --out."""
    out: str = STANDARD
    """.csv, .tsv or .jsonl. -: JSON lines to standard output."""
    probabilities: bool = True
    """Whether the probability of every class is written, or that of the predicted one alone."""
    batch_size: int = 32
    """Images in a batch."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    checkpoint: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: latest, best, or a step."""
    skip_bad: bool = False
    """Whether images that cannot be read are left out, the first named and all counted, rather than an error."""
    overwrite: bool = False
    """Whether OUT may exist already."""

    def __post_init__(self):
        *images, last = self.images or ("",)
        if images and Path(last).suffix in SUFFIXES and not Path(last).is_dir():  # a table: no image is called so
            object.__setattr__(self, "images", tuple(images))
            object.__setattr__(self, "out", one_out(last, None if self.out == STANDARD else self.out))
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}, expected at least 1")


def _warn(name: str) -> Callable[[str], None]:
    return lambda message: print(f"{name}: {message}", file=sys.stderr)


def find_images(given: tuple[str, ...]) -> list[Path]:
    """The files that are meant: those given, those in folders and below by name, those on standard input.

    Links in a folder that lead out of it, and pipes, are named and left out.

    Raises:
      FileNotFoundError: one that is not there, or a folder without any.
    """
    known, files = Image.registered_extensions(), []
    for name in given:
        if name == STANDARD:
            files += find_images(tuple(line for line in lines_of(sys.stdin.read()) if line))
        elif Path(name).is_dir():
            named = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in known)
            there = [path for path in within(named, Path(name), LeftOut(_warn(name), "files were")) if path.is_file()]
            if not there:
                raise FileNotFoundError(f"{name} holds no images")
            files += there
        elif Path(name).is_file():
            files.append(Path(name))
        else:
            raise FileNotFoundError(f"{name} does not exist; expected an image or a folder of them")
    return files


def readable(files: list[Path], *, skip: bool) -> list[Path]:
    """Those of some files that are images, decoded once to see.

    Args:
      skip: whether others are left out; else they are an error.

    Raises:
      UsageError: files that are no images, or damaged: the first are named, all are counted. With `skip`, none is left.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = [reason for reason in zip(files, pool.map(_reason, files), strict=True)]
    bad = [reason for _, reason in reasons if reason]
    good = [path for path, reason in reasons if not reason]
    if bad and not skip:
        more = f"; {len(bad)} of {len(files)} cannot be read" if len(bad) > 1 else ""
        raise flags.UsageError("; ".join(bad[:_NAMED]) + f"{more}; --skip-bad leaves such images out")
    for line in bad[:_NAMED]:
        print(f"{line}; left out", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(files)} images were left out, as --skip-bad asks", file=sys.stderr)
    if bad and not good:
        raise flags.UsageError("none of the images can be read")
    return good


def _reason(path: Path) -> str:
    """Why a file is no image; "" of one."""
    try:
        open_picture(path, str(path))
    except flags.UsageError as error:
        return str(error)
    return ""


def main() -> int:
    """Reads images, writes predictions."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.vit predict", description=__doc__)
    with flags.usage_errors(), on_mesh(config.mesh):
        check_out(config.out, overwrite=config.overwrite)
        files = find_images(config.images)
        ask = Predictor.from_pretrained(config.model, step=config.checkpoint)
        files = readable(files, skip=config.skip_bad)
        said = ask(files, batch_size=config.batch_size, progress=True)
        rows = []
        for path, (label, probabilities) in zip(files, said, strict=True):
            row = {"path": str(path), "predicted": label, "score": probabilities[label]}
            rows.append(row | ({"probabilities": probabilities} if config.probabilities else {}))
        write_rows(rows, config.out)
    if config.out != STANDARD:
        print(f"{len(rows):,} predictions in {config.out}")
    return 0


if __name__ == "__main__":
    flags.run(main)
