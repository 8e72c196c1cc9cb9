"""Images with classes: a folder, the hub, what `experiments.data` fetches, or scikit-learn's digits.

    config -> images of train, validation, test, decoded when they are asked for -> Labelled images

What the user can get wrong is one line that names the flag.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.data import data_source
from experiments.data.array_files import read_arrays
from experiments.data.data_source import SPLITS
from experiments.data.image_folders import Files, find_images
from experiments.data.inside import within
from experiments.data.left_out import LeftOut
from experiments.data.pictures import open_picture
from experiments.loop.flags import UsageError

log = logging.getLogger(__name__)

# The largest set of images has 21,841 classes.
_MOST_CLASSES = 1 << 20
_HINT = "; --data.skip-bad leaves such images out"


@dataclass(frozen=True)
class ImagesConfig:
    """Which images. Without path, hub and fetched: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

    path: str | None = None
    """A folder of images, a folder for each class (perhaps inside of train, validation and test; folders in one are of
    its class), or of train.npz, test.npz with arrays `images` (n x y, or n x y c, 0 to 255) and `labels` (n)."""
    hub: str | None = None
    """A data set of the Hugging Face hub, NAME or NAME:CONFIG (ILSVRC/imagenet-1k, uoft-cs/cifar10), or a folder laid
    out like one."""
    fetched: str | None = None
    """Images that `python -m experiments.data fetch` brings: mnist-5k."""
    image_column: str | None = None
    """The hub's column of images. None: the only one."""
    label_column: str | None = None
    """The hub's column of classes. None: "label", or the only one."""
    train_split: str = "train"
    """Name of the images to train on."""
    validation_split: str = "validation"
    """Name of the images to evaluate on."""
    test_splits: tuple[str, ...] = ("test",)
    """More images to evaluate on at the end, those of these that there are and that have labels."""
    validation_fraction: float = 0.1
    """Share of the training images that is held out, the same of each class, where there is no validation split."""
    train_images: int | None = None
    """Train on so many images only, as many of each class. None: all."""
    skip_bad: bool = False
    """Read every image at the start and leave out those that cannot be, named and counted, instead of ending at the
    first that is met."""

    def __post_init__(self):
        data_source.check(self, "train_images")


class Images(NamedTuple):
    """One split."""

    read: Callable[[int], Image.Image]
    """Image number i, decoded. Any thread may ask."""
    labels: np.ndarray
    """(n,) int32."""
    path: Callable[[int], str | None] | None = None
    """Where image number i lies, or what its data set calls it. None: nothing says so."""

    def take(self, rows: np.ndarray) -> "Images":
        """Some of them, in this order."""
        path = self.path and (lambda i: self.path(int(rows[i])))  # type: ignore[misc]
        return Images(lambda i: self.read(int(rows[i])), self.labels[rows], path)

    def content(self) -> list[Any]:
        """What tells these images from others, for a fingerprint: their labels, the sizes of their files and the pixels
        of 256 of them, evenly spread. To read all would take longer than an epoch."""
        n = len(self.labels)
        paths = [Path(path) for i in range(n) if self.path is not None and (path := self.path(i))]
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        some = np.unique(np.linspace(0, n - 1, min(n, 256)).astype(int))
        return [self.labels, sizes, [self._pixels(int(i)) for i in some]]

    def _pixels(self, i: int) -> np.ndarray | None:
        try:
            return np.asarray(self.read(i))
        except UsageError:  # said where it is met
            return None


class LabelledImages(NamedTuple):
    """A data set."""

    classes: tuple[str, ...]
    """Names of the classes, in their order."""
    splits: dict[str, Images]
    """Those to train on first, then those to evaluate on, then others."""
    where: str
    """What the user asked for, for messages."""


class _Found(NamedTuple):
    classes: tuple[str, ...]
    splits: dict[str, Images]


def load_images(config: ImagesConfig) -> LabelledImages:
    """Finds and splits what `config` names; images stay where they are until they are read.

    Raises:
      ValueError, FileNotFoundError: one line that names the flag, its value and what was expected.
    """
    (classes, found), where = _find(config)
    train, held_out = config.train_split, config.validation_split
    if train not in found:
        raise ValueError(f"{where}: there are no images '{train}' to train on; there are {', '.join(found) or 'none'}")
    wanted = dict.fromkeys((train, held_out, *config.test_splits))
    splits = {name: found[name] for name in wanted if name in found}
    for name in list(splits):
        if len(splits[name].labels) and (splits[name].labels >= 0).all():
            continue
        what = "are none" if not len(splits[name].labels) else "have no labels"
        if name in (train, held_out):
            raise ValueError(f"{where}: the images '{name}' {what}")
        del splits[name]  # labels that are kept secret
    if config.skip_bad:
        splits = {name: _readable(images, f"images of {name} were", where) for name, images in splits.items()}
    if len(seen := np.unique(splits[train].labels)) < 2:
        only = f"of the class {classes[seen[0]]!r}" if len(seen) else "unreadable"
        raise ValueError(f"{where}: all images of {train} are {only}, expected at least two classes")
    if held_out not in splits:
        kept, aside = _hold_out(splits[train], config.validation_fraction, where)
        splits = {train: kept, held_out: aside} | {name: splits[name] for name in splits if name != train}
    if config.train_images is not None:
        splits[train] = _few(splits[train], config.train_images)
    return LabelledImages(classes, splits, where)


def _find(config: ImagesConfig) -> tuple[_Found, str]:
    if config.hub is not None:
        where = f"--data.hub {config.hub}"
        return _tables(config, data_source.load_hub(config.hub), where), where
    here = data_source.local(config)
    if here is None:
        return digits(config), "scikit-learn's digits"
    path, where = here
    if not path.is_dir():
        raise FileNotFoundError(f"{where} is no folder; expected one of images, a folder for each class")
    if any(path.glob("*.npz")):
        return _from_arrays(path, where), where
    return _from_folder(path, where), where


def digits(config: ImagesConfig) -> _Found:
    """scikit-learn's digits, their last fifth for testing: other people wrote them."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images, labels = np.round(bunch.images * 255 / 16).astype(np.uint8), bunch.target.astype(np.int32)
    cut = len(labels) * 4 // 5
    parts = {
        config.train_split: slice(0, cut),
        config.test_splits[0] if config.test_splits else "test": slice(cut, None),
    }
    return _Found(tuple(map(str, range(10))), {name: _arrays(images[s], labels[s]) for name, s in parts.items()})


def _arrays(images: np.ndarray, labels: np.ndarray) -> Images:
    return Images(lambda i: Image.fromarray(images[i]), np.asarray(labels, np.int32))


def _from_arrays(path: Path, where: str) -> _Found:
    splits, names = {}, set()
    for file in within(sorted(path.glob("*.npz")), path, functools.partial(log.warning, "%s: %s; left out", where)):
        try:
            images, labels = read_arrays(file, ("images", "labels"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{where}: {file.name} holds images {images.dtype}{images.shape} and labels {labels.shape}, expected "
                "uint8 (n, x, y) or (n, x, y, c), and (n,)"
            )
        least, most = (labels.min(), labels.max()) if len(labels) else (0, 0)
        if labels.dtype.kind not in "iu" or least < 0 or most >= _MOST_CLASSES:
            raise ValueError(
                f"{where}: {file.name} holds labels {labels.dtype} from {least} to {most}, expected the numbers of "
                f"classes, whole and from 0 to below {_MOST_CLASSES:,}"
            )
        splits[SPLITS.get(file.stem, file.stem)] = _arrays(images, labels)
        names |= set(np.unique(labels).tolist())
    return _Found(tuple(str(i) for i in range(max(names, default=-1) + 1)), splits)


def _from_folder(path: Path, where: str) -> _Found:
    found = find_images(path, where)
    classes = tuple(sorted({name for files in found.values() for name in files.classes}))
    number = {name: i for i, name in enumerate(classes)}
    trained = set(found["train"].classes) if "train" in found else set(classes)
    for split, files in found.items():
        if unknown := sorted(set(files.classes) - trained):
            raise ValueError(f"{where}: the class {unknown[0]!r} of {split} is never in train")

    def images(files: Files) -> Images:
        def read(i: int) -> Image.Image:
            return _opened(files.paths[i], files.paths[i].relative_to(path).as_posix())

        labels = np.array([number[name] for name in files.classes], np.int32)
        return Images(read, labels, lambda i: str(files.paths[i]))

    return _Found(classes, {split: images(files) for split, files in found.items()})


def _tables(config: ImagesConfig, found: Mapping[str, Any], where: str) -> _Found:
    """The splits of a data set of the library `datasets`."""
    import datasets

    if not found:
        raise ValueError(f"{where} is empty")
    features = next(iter(found.values())).features
    image = _column(features, datasets.Image, config.image_column, "image", where)
    label = _column(features, datasets.ClassLabel, config.label_column, "label", where)

    mode = features[image].mode

    def images(split: str, table: Any) -> Images:
        encoded = table.cast_column(image, datasets.Image(decode=False))

        def read(i: int) -> Image.Image:
            cell = encoded[int(i)][image]
            source = cell["bytes"] if cell["bytes"] is not None else cell["path"]
            picture = _opened(source, cell["path"] or f"{i} of {split}")
            return picture.convert(mode) if mode else picture

        labels = np.asarray(table.with_format("numpy")[label][:], np.int32)
        return Images(read, labels, lambda i: encoded[int(i)][image].get("path"))

    return _Found(tuple(features[label].names), {name: images(name, table) for name, table in found.items()})


def _column(features: Mapping[str, Any], kind: type, given: str | None, usual: str, where: str) -> str:
    there = [name for name, feature in features.items() if isinstance(feature, kind)]
    chosen = given or (there[0] if len(there) == 1 else usual)
    if chosen not in there:
        raise ValueError(
            f"{where} has no column '{chosen}' of {usual}s; --data.{usual}-column must be one of "
            f"{', '.join(there) or 'none'}"
        )
    return chosen


def _opened(source: str | Path | bytes, name: str) -> Image.Image:
    try:
        return open_picture(source, name)
    except UsageError as error:
        raise UsageError(f"{error}{_HINT}") from error


def _readable(images: Images, what: str, where: str) -> Images:
    """Those that can be read; the others are named and counted."""

    def fault(i: int) -> str | None:
        try:
            images.read(i)
        except UsageError as error:
            return str(error).removesuffix(_HINT)
        return None

    left_out = LeftOut(lambda message: log.warning("%s: %s", where, message), what, limit=100)
    n = len(images.labels)
    with ThreadPoolExecutor() as pool:
        faults = list(tqdm(pool.map(fault, range(n)), total=n, desc="checking images", disable=None, delay=2))
    for message in filter(None, faults):
        left_out(message)
    left_out.summary(n - left_out.n)
    return images.take(np.flatnonzero([message is None for message in faults])) if left_out.n else images


def _hold_out(images: Images, fraction: float, where: str) -> tuple[Images, Images]:
    """Images to train on, and about a `fraction` of each class that is held out."""
    aside = _of_each_class(images.labels, fraction)
    if not aside.any() or aside.all():
        raise ValueError(f"{where}: {len(images.labels)} images, too few to hold some out")
    return images.take(np.flatnonzero(~aside)), images.take(np.flatnonzero(aside))


def _few(images: Images, n: int) -> Images:
    """About n images, as many of each class as there are in proportion; more are these and others."""
    if n >= len(images.labels):
        return images
    ranks = _ranks(images.labels)
    return images.take(np.sort(np.argsort(ranks, kind="stable")[:n]))


def _of_each_class(labels: np.ndarray, fraction: float) -> np.ndarray:
    return _ranks(labels) < fraction


def _ranks(labels: np.ndarray) -> np.ndarray:
    """For each image its place in an order of its class, 0 to 1: the same on every machine."""
    ranks = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        seed = int.from_bytes(hashlib.blake2b(str(label).encode(), digest_size=8).digest(), "big")
        ranks[np.random.default_rng(seed).permutation(rows)] = np.arange(len(rows)) / len(rows)
    return ranks
