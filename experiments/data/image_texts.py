"""Images with texts: captions, questions and answers. Tables with paths, folders, tar files, the hub, or drawn scenes.

    config -> splits of examples, images decoded when they are asked for -> ImageTexts

A row says `image`, a path (or the image itself, on the hub), and `caption`, or `question` and `answer`; other usual
names are known, too. What the user can get wrong is one line that names the flag.
"""

import functools
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.data import data_source, scenes
from experiments.data.data_source import SPLITS
from experiments.data.image_folders import suffixes
from experiments.data.inside import within
from experiments.data.pictures import from_array, open_picture
from experiments.data.scenes import KINDS
from experiments.data.tables import TABLES, Reading, read_rows
from experiments.data.text_files import BadFile, stem_and_suffix

# Columns by their usual names, the first that there is.
IMAGE = ("image", "image_path", "file_name", "filename", "path", "img")
CAPTION = ("caption", "captions", "text", "sentences_raw")
QUESTION = ("question", "query", "prompt")
# VQAv2's first: what most people answered, where `answers` has what each of ten did.
ANSWER = ("multiple_choice_answer", "answer", "answers", "label", "response")
# Most memory of pictures that were drawn, 4 bytes a pixel.
_DRAWN_BYTES = 256 << 20
# What is asked of an image that has a caption.
DESCRIBE = "describe the picture."


@dataclass(frozen=True)
class ImageTextsConfig:
    """Which images and texts. Without path and hub: scenes that are drawn, with questions about them."""

    path: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet whose rows name an image beside it and a caption, or question and answer;
    a .tar of webdataset's kind (KEY.jpg with KEY.txt, or KEY.json of such a row); or a folder with train.*,
    validation.* of them, or with images that each have a .txt of their name beside them."""
    hub: str | None = None
    """A data set of the Hugging Face hub, NAME or NAME:CONFIG, with an image column and such texts."""
    fetched: None = None
    scenes: int = 20_000
    """Scenes to train on that are drawn, where there is neither path nor hub."""
    held_out_scenes: int = 700
    """Scenes to evaluate on."""
    scene_size: int = 32
    """Pixels to a side of a scene."""
    scene_seed: int = 0
    """Of the scenes."""
    scene_kinds: tuple[str, ...] = KINDS
    """What is asked about scenes, in turn."""
    train_split: str = "train"
    """The hub's name of the rows to train on."""
    validation_split: str = "validation"
    """And of those to evaluate on."""
    validation_fraction: float = 0.05
    """Share of the images that is held out, chosen by their names, where there is no such split."""

    def __post_init__(self):
        data_source.check(self, "scenes")
        for kind in self.scene_kinds or ("nothing",):
            if kind not in KINDS:
                raise ValueError(f"--data.scene-kinds {kind}, expected some of {', '.join(KINDS)}")
        if self.held_out_scenes < 1:
            raise ValueError(f"--data.held-out-scenes {self.held_out_scenes}, expected at least 1")
        if self.scene_size < 16:
            raise ValueError(f"--data.scene-size {self.scene_size}, expected at least 16")


class Example(NamedTuple):
    """A question about an image."""

    image: int
    """Which."""
    kind: str
    """What is asked for: "caption", "answer", or of scenes one of `scenes.KINDS`."""
    question: str
    answer: str


class ImageTexts(NamedTuple):
    """One split."""

    read: Callable[[int], Image.Image]
    """Image number i, decoded. Any thread may ask."""
    examples: tuple[Example, ...]

    def content(self) -> list[Any]:
        """What tells these from others, for a fingerprint: all texts, and the pixels of 16 images."""
        some = np.unique(np.linspace(0, len(self.examples) - 1, 16).astype(int))
        return [list(map(list, self.examples)), [np.asarray(self.read(self.examples[i].image)) for i in some]]


class Found(NamedTuple):
    """A data set."""

    train: ImageTexts
    held_out: ImageTexts
    where: str
    """What the user asked for, for messages."""


def load_image_texts(config: ImageTextsConfig) -> Found:
    """Finds what `config` names, and holds some of it out where nothing says what is for evaluation.

    Raises:
      ValueError, FileNotFoundError: one line that names the flag, its value and what was expected.
    """
    if config.hub is not None:
        where = f"--data.hub {config.hub}"
        splits = _hub(config, where)
    elif config.path is not None:
        where = f"--data.path {config.path}"
        splits = _files(Path(config.path).expanduser(), where)
    else:
        return Found(_drawn(config, config.scenes, False), _drawn(config, config.held_out_scenes, True), "drawn scenes")
    names = config.train_split, config.validation_split
    if names[0] not in splits:
        raise ValueError(f"{where}: nothing to train on, '{names[0]}'; there is {', '.join(splits) or 'nothing'}")
    train = splits[names[0]]
    if names[1] in splits:
        return Found(train, splits[names[1]], where)
    return Found(*_hold_out(train, config.validation_fraction, where), where)


def _drawn(config: ImageTextsConfig, n: int, held_out: bool) -> ImageTexts:
    seed, options = config.scene_seed, {"held_out": held_out}
    made = [scenes.make_scene(seed, i, **options) for i in range(n)]

    @functools.lru_cache(maxsize=_DRAWN_BYTES // (4 * config.scene_size**2))  # each is seen in every epoch
    def read(i: int) -> Image.Image:
        return from_array(scenes.draw_scene(made[i], config.scene_size, seed * n + i, **options))

    kinds = config.scene_kinds
    examples = (Example(i, *scenes.ask(seed, i, made[i], kinds=kinds, **options)) for i in range(n))
    return ImageTexts(read, tuple(examples))


def _files(path: Path, where: str) -> dict[str, ImageTexts]:
    if not path.exists():
        raise FileNotFoundError(f"{where} does not exist")
    if path.is_file():
        return {"train": _file(path, where)}
    found = {}
    for file in within(sorted(path.iterdir()), path, lambda message: None):
        stem, suffix = stem_and_suffix(file)
        if file.is_file() and stem in SPLITS and (suffix in TABLES or suffix == ".tar"):
            found[SPLITS[stem]] = _file(file, where)
    return found or {"train": _pairs(path, where)}


def _file(path: Path, where: str) -> ImageTexts:
    _, suffix = stem_and_suffix(path)
    if suffix == ".tar":
        return _tar(path, where)
    if suffix not in TABLES:
        raise ValueError(f"{where}: {path.name}, expected {', '.join(TABLES[:5])}, .tar, or a folder")
    try:
        rows = list(read_rows(path, path.name, Reading()))
    except BadFile as error:
        raise ValueError(f"{where}: {error}") from error
    root, named = path.parent, []
    for number, row in enumerate(rows, 1):
        image = _cell(row, IMAGE)
        if not isinstance(image, str):
            raise ValueError(f"{where}: row {number} of {path.name} names no image, expected a column {IMAGE[0]!r}")
        named.append(image)
    files = list(dict.fromkeys(named))
    for name in files:
        place = (root / name).resolve()
        if not place.is_relative_to(root.resolve()):
            raise ValueError(f"{where}: the image {name!r} lies outside of {root}")
        if not place.is_file():
            raise FileNotFoundError(f"{where}: {path.name} names the image {name!r}, which is not in {root}")
    number_of = {name: i for i, name in enumerate(files)}
    examples = [
        Example(number_of[name], *texts)
        for number, (name, row) in enumerate(zip(named, rows, strict=True), 1)
        for texts in _texts(row, f"{where}: row {number} of {path.name}")
    ]
    return ImageTexts(lambda i: open_picture(root / files[i], files[i]), tuple(examples))


def _pairs(path: Path, where: str) -> ImageTexts:
    """A folder of images, each with a text file of its name."""
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in suffixes() and f.with_suffix(".txt").is_file()]
    if not files:
        raise ValueError(f"{where} holds no train.jsonl or the like, and no image with a .txt of its name beside it")
    examples = [
        Example(i, *texts)
        for i, file in enumerate(files)
        for text in [file.with_suffix(".txt")]
        for texts in _texts({"caption": _decoded(text.read_bytes(), text.name, where)}, f"{where}: {text.name}")
    ]
    return ImageTexts(lambda i: open_picture(files[i], files[i].name), tuple(examples))


def _tar(path: Path, where: str) -> ImageTexts:
    """webdataset's layout: files of one key one behind the other, the image and what is said of it.

    A key is a file's name up to its first dot, with the folder that it lies in; hidden files have none.
    """
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed: images are read from where they lie in it
            members = [m for m in archive if m.isfile()]
            keys: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in members:
                folder, slash, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if key:
                    keys.setdefault(f"{folder}{slash}{key}", {})[f".{kind.lower()}"] = member
            images: list[tarfile.TarInfo] = []
            examples: list[Example] = []
            for key, parts in keys.items():
                image = next((parts[s] for s in parts if s in suffixes()), None)
                if image is None:
                    continue
                row: dict[str, Any] = {}
                for suffix, member in parts.items():
                    content = archive.extractfile(member)
                    if content is None or suffix not in (".txt", ".caption", ".json"):
                        continue
                    text = _decoded(content.read(), member.name, where)
                    row |= _object(text, member.name, where) if suffix == ".json" else {"caption": text}
                examples += [Example(len(images), *texts) for texts in _texts(row, f"{where}: {key}")]
                images.append(image)
    except tarfile.TarError as error:
        raise ValueError(f"{where}: {path.name} cannot be read ({error}), expected a .tar, not compressed") from error
    if not images:
        raise ValueError(f"{where}: {path.name} holds no image with a text of its name")

    def read(i: int) -> Image.Image:
        with path.open("rb") as file:  # of its own: any thread may ask
            file.seek(images[i].offset_data)
            return open_picture(file.read(images[i].size), images[i].name)

    return ImageTexts(read, tuple(examples))


def _decoded(content: bytes, name: str, where: str) -> str:
    """The text of a file; a mark of its byte order is none of it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {name} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _object(text: str, name: str, where: str) -> dict[str, Any]:
    """The columns that a .json of webdataset's names."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {name} holds {text.strip()[:40]}, expected an object of columns")
    return row


def _hub(config: ImageTextsConfig, where: str) -> dict[str, ImageTexts]:
    import datasets

    found = {}
    for name, table in data_source.load_hub(config.hub or "").items():
        if name not in (config.train_split, config.validation_split):
            continue
        column = next((c for c, f in table.features.items() if isinstance(f, datasets.Image)), None)
        if column is None:
            raise ValueError(f"{where} has no column of images; there are {', '.join(table.features)}")
        encoded = table.cast_column(column, datasets.Image(decode=False))
        rows = table.remove_columns([column])
        examples = [Example(i, *texts) for i, row in enumerate(rows) for texts in _texts(row, where)]
        found[name] = ImageTexts(functools.partial(_cell_image, encoded, column, name), tuple(examples))
    return found


def _cell_image(table: Any, column: str, split: str, i: int) -> Image.Image:
    cell = table[int(i)][column]
    source = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    return open_picture(source, cell["path"] or f"{i} of {split}")


def _texts(row: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) of a row: of its question, or of each of its captions.

    Raises:
      ValueError: neither.
    """
    question, answer = _cell(row, QUESTION), _cell(row, ANSWER)
    if isinstance(question, str) and answer is not None:
        several = answer if isinstance(answer, list) else [answer]
        first = several[0] if several else ""  # of several people the first
        first = first.get("answer", "") if isinstance(first, dict) else first
        if str(first).strip():
            yield "answer", question.strip(), str(first).strip()
            return
    captions = _cell(row, CAPTION)
    several = captions if isinstance(captions, list) else [captions]
    said = [caption.strip() for caption in several if isinstance(caption, str) and caption.strip()]
    if not said:
        raise ValueError(
            f"{where}: a row with {', '.join(map(str, row)) or 'nothing'}, expected caption, or question and answer"
        )
    for caption in said:
        yield "caption", DESCRIBE, caption


def _cell(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _hold_out(data: ImageTexts, fraction: float, where: str) -> tuple[ImageTexts, ImageTexts]:
    """All examples of an image on one side, which its number decides: the same on every machine."""

    def aside(image: int) -> bool:
        digest = hashlib.blake2b(str(image).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < fraction * 2**64

    held = tuple(e for e in data.examples if aside(e.image))
    kept = tuple(e for e in data.examples if not aside(e.image))
    if not held and len({e.image for e in data.examples}) > 1:
        last = data.examples[-1].image
        held, kept = (tuple(e for e in data.examples if (e.image == last) == side) for side in (True, False))
    if not held or not kept:
        raise ValueError(f"{where}: {len(data.examples)} examples, too few to hold some out")
    return data._replace(examples=kept), data._replace(examples=held)
