"""Images and texts in one space: contrastive training of any two encoders, for search and classes without labels.

    python -m experiments.clip tiny                                       # drawn scenes and their captions, two minutes
    python -m experiments.clip tiny --loss sigmoid                        # each pair by itself (SigLIP)
    python -m experiments.clip tiny --images.pattern ss2d/mlp --texts.pattern attn/mlp
    python -m experiments.clip tiny --train.batch-size 512 --mini-batch 128   # the memory of 128, the loss of 512
    python -m experiments.clip tiny --data.path pairs.jsonl               # yours: rows of image and caption
    python -m experiments.clip classify RUN photos/ cat dog               # which of these texts fits each picture

The same command again resumes the run where it was. In the run folder `images/` and `texts/` are the encoders in our
own layout: zoo.from_pretrained("RUN/images")(pixels) and zoo.from_pretrained("RUN/texts")(ids, mask) are vectors in one
space, whose cosines say what fits.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

import zoo
from experiments.data.augment import Preprocess, PreprocessConfig
from experiments.data.image_folders import suffixes
from experiments.data.pictures import open_picture
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import restore_tokenizer, save_tokenizer
from experiments.loop import distributed, flags, seeds
from experiments.loop.duration import make_way
from experiments.loop.json_files import write_json
from experiments.loop.mesh import meshed
from experiments.loop.model_size import count_params
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.seeds import Ended
from experiments.loop.summary import report, summarise
from experiments.vision.meaning import Meaning, read_preprocess, save_meaning
from experiments.vision_language.contrast import Towers
from experiments.vision_language.contrast_presets import FREE, PRESETS, Config
from experiments.vision_language.pairs import Prepared, evaluate, make_task, prepare
from experiments.vision_language.rows import learned_from


def save(prepared: Prepared, folder: Path) -> None:
    """Writes what the checkpoints of a run are read with."""
    save_tokenizer(prepared.tokenizer, folder)
    save_meaning(Meaning(prepared.preprocess.config, prepared.preprocess.size, ()), folder)


def describe(prepared: Prepared, folder: Path) -> str:
    """What is about to happen, in two lines."""
    shapes = prepared.images, prepared.texts
    train, held_out = prepared.pairs
    said = " and ".join(f"{shape.pattern} ({count_params(shape):,} parameters)" for shape in shapes)
    return f"{said}; {folder}\n{prepared.data.where}: {len(train):,} pairs, {len(held_out):,} held out"


EXPERIMENT = seeds.Experiment(
    prepare=prepare,
    make_task=make_task,
    save=save,
    describe=describe,
    record=lambda prepared: {
        "images": dataclasses.asdict(prepared.images),
        "texts": dataclasses.asdict(prepared.texts),
    },
    free=FREE,
    inputs=lambda prepared: learned_from(prepared.data, prepared.tokenizer),
    save_once=lambda prepared, folder: save_tokenizer(prepared.tokenizer, folder),
)


@locked
@meshed
def fit(config: Config, folder: Path, prepared: Prepared | None = None) -> Ended:
    """Trains with one seed in a folder, from its newest checkpoint where there is one; see `seeds.fit_one`."""
    prepared, finished = seeds.fit_one(EXPERIMENT, config, folder, prepared)
    towers: Any = finished.model
    if finished.stopped:
        return Ended(towers, {}, stopped=True)
    if distributed.is_first():
        zoo.save_pretrained(towers.images, folder / "images")
        zoo.save_pretrained(towers.texts, folder / "texts")
        write_json({"scale": float(towers.scale), "bias": float(towers.bias[...])}, folder / "scores.json")
    return Ended(towers, {"held out": evaluate(towers, prepared.pairs[1], config)}, stopped=False)


def fit_seeds(config: Config, folder: Path) -> list[Ended]:
    """A run for each seed; see `seeds.fit_seeds`."""
    if len(config.seeds) == 1:
        config = seeds.with_seed(config, config.seeds[0])
    return seeds.fit_seeds(EXPERIMENT, config, folder, fit)


@dataclasses.dataclass(frozen=True)
class Classify:
    """Says of each picture which of some texts fits it best."""

    run: Annotated[str, flags.Positional]
    """A run of this command."""
    pictures: Annotated[str, flags.Positional]
    """A picture, or a folder of them."""
    texts: Annotated[tuple[str, ...], flags.Positional]
    """A text for each class."""
    template: str = "{}"
    """What is put around each text, as in "a photo of a {}."."""


def classify(config: Classify) -> list[tuple[str, str, float]]:
    """(picture, text, cosine) of the text that fits each picture best.

    Raises:
      ValueError, FileNotFoundError: no such run, picture or text.
    """
    if not config.texts or "{}" not in config.template:
        raise ValueError(f"--template {config.template!r} of {len(config.texts)} texts, expected {{}} in it, and texts")
    run, place = Path(config.run), Path(config.pictures)
    if not (run / "images").is_dir():
        raise FileNotFoundError(f"{run} holds no encoders, expected a run of experiments.clip that has ended")
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in suffixes()) if place.is_dir() else [place]
    if not files:
        raise FileNotFoundError(f"{place} holds no pictures")
    images = zoo.from_pretrained(run / "images", kind=zoo.ImageClassifier)
    texts = zoo.from_pretrained(run / "texts", kind=zoo.SequenceClassifier)
    towers, tokenizer, shape = Towers(images, texts), restore_tokenizer(run), images.config
    preprocess = Preprocess(read_preprocess(run, PreprocessConfig()), shape.image_size, shape.channels)
    special = special_tokens(tokenizer)
    rows = [special.row(row) for row in tokenizer.encode_batch([config.template.format(t) for t in config.texts])]
    tokens = np.full((len(rows), max(map(len, rows))), special.pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    classes, _ = towers.of_texts(jnp.asarray(tokens), jnp.asarray(mask))
    found = []
    for file in files:
        picture = jnp.asarray(preprocess(open_picture(file, str(file))), jnp.float32)
        cosines = np.asarray(towers.of_images(picture[None])[0] @ classes.T)[0]
        best = int(np.argmax(cosines))
        found.append((str(file), config.texts[best], float(cosines[best])))
    return found


def main() -> int:
    """Trains, evaluates and shows a table; or classifies."""
    if sys.argv[1:2] == ["classify"]:
        del sys.argv[1]
        asked = flags.parse_one(
            Classify, prog="python -m experiments.clip classify", description=Classify.__doc__ or ""
        )
        with flags.usage_errors():
            for file, text, cosine in classify(asked):
                print(f"{file}\t{text}\t{cosine:.3f}")
        return 0
    config = flags.parse(PRESETS, prog="python -m experiments.clip", description=__doc__, make_way=make_way)
    folder = Path(config.run_dir) if config.run_dir else seeds.default_run_dir(config, PRESETS, "clip", FREE)
    trained = fit_seeds(config, folder)
    if trained[-1].stopped:
        return 0
    scores = report(summarise([run.scores for run in trained]), len(trained))
    show_end(folder, scores.splitlines(), "results.json, images, texts, curves.png, checkpoints")
    return 0


if __name__ == "__main__":
    flags.run(main)
