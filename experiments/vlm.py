"""A language model that reads pictures: captions and answers, with any image encoder, connector and mixers.

    python -m experiments.vlm tiny                                  # attention, drawn scenes: no download, two minutes
    python -m experiments.vlm tiny --model.text.pattern mamba2/mlp  # a state space; "mamba2/mlp attn/mlp": a hybrid
    python -m experiments.vlm tiny --model.connector.kind scan      # ML-Mamba's; linear, mlp, queries, vocabulary
    python -m experiments.vlm tiny --model.text.n-layers 4 --model.deepstack 2    # a quarter of the places
    python -m experiments.vlm scenes --seeds 0 1 2                  # Mamba-2 by answers alone; the mean of three runs
    python -m experiments.vlm distill runs/vlm/tiny                 # a student of linear attention (mmMamba)
    python -m experiments.vlm tiny --data.path pairs.jsonl          # yours: image, question, answer or caption

In stages, each a run that goes on from the one before:

    python -m experiments.vlm mamba2-130m --vision-init VIT --language-init state-spaces/mamba2-130m --trained connector
    python -m experiments.vlm mamba2-130m --init runs/vlm/THAT_RUN --trained all --data.path questions.jsonl

The first command first teaches its image encoder which caption is whose, in RUN/encoder (--encoder-steps), and then
answers 58.5 % of 700 held-out questions exactly (three seeds, give or take 4), where the most frequent answer of each
kind would be right in 21.6 %. The same command again resumes the run where it was. A run folder has
predictions.jsonl (each held-out question, whether its answer is right) and predictions.png. Asked later: `python -m
experiments.vlm ask RUN picture.png "what is it?"`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import numpy as np

import zoo
from experiments import clip
from experiments.data.augment import Preprocess, PreprocessConfig
from experiments.data.image_texts import load_image_texts
from experiments.data.pictures import open_picture
from experiments.data.tokenizers import restore_tokenizer, save_tokenizer
from experiments.loop import flags, runs, seeds
from experiments.loop.duration import make_way
from experiments.loop.mesh import meshed
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.seeds import Ended
from experiments.loop.summary import report, summarise
from experiments.vision.meaning import Meaning, read_preprocess, save_meaning
from experiments.vision_language import distilling
from experiments.vision_language.encoder import lesson
from experiments.vision_language.presets import FREE, PRESETS, Config
from experiments.vision_language.results import describe, said, write_results
from experiments.vision_language.rows import learned_from
from experiments.vision_language.task import Prepared, load_model, make_task, prepare


def save(prepared: Prepared, folder: Path) -> None:
    """Writes what the model of a run is, its tokenizer, and how images are prepared."""
    save_tokenizer(prepared.tokenizer, folder)
    runs.save_model_config(prepared.model, folder)
    save_meaning(Meaning(prepared.preprocess.config, prepared.preprocess.size, ()), folder)


EXPERIMENT = seeds.Experiment(
    prepare=prepare,
    make_task=make_task,
    save=save,
    describe=describe,
    record=lambda prepared: {"model": dataclasses.asdict(prepared.model)},
    free=FREE,
    inputs=lambda prepared: learned_from(prepared.data, prepared.tokenizer),
    save_once=lambda prepared, folder: save_tokenizer(prepared.tokenizer, folder),
)


def with_encoder(config: Config, folder: Path) -> Config | None:
    """The configuration with an image encoder that has had its lesson, in the run's folder encoder.

    None: the lesson was stopped.
    """
    if not config.encoder_steps or config.init or config.vision_init:
        return dataclasses.replace(config, encoder_steps=0)
    place = folder / "encoder"
    taught = dataclasses.replace(config, encoder_steps=0, vision_init=str(place / "images"))
    with flags.usage_errors():
        if not runs.holds_run(taught, folder, (*FREE, "seeds", "train.seed")):
            data = load_image_texts(lesson(config).data)
            if not any(example.kind == "caption" for example in data.train.examples):
                raise ValueError(
                    f"--encoder-steps {config.encoder_steps}: {data.where} has no captions to teach an encoder by; "
                    "expected some, or --encoder-steps 0 --trained all"
                )
            prepare(dataclasses.replace(config, encoder_steps=0))  # what it refuses is told before the lesson
            folder.mkdir(parents=True, exist_ok=True)
            flags.save_config(taught, folder / "config.json")
    if not (place / "images").is_dir():
        print("the image encoder first:", flush=True)
        if clip.fit(lesson(config), place).stopped:
            return None
    return taught


@locked
@meshed
def fit(config: Config, folder: Path, prepared: Prepared | None = None) -> Ended:
    """Trains with one seed in a folder, from its newest checkpoint where there is one; see `seeds.fit_one`."""
    taught = with_encoder(config, folder)
    if taught is None:
        return Ended(None, {}, stopped=True)
    config = taught
    prepared, finished = seeds.fit_one(EXPERIMENT, config, folder, prepared)
    if finished.stopped:
        return Ended(finished.model, {}, stopped=True)
    return Ended(finished.model, write_results(finished.model, folder, config, prepared), stopped=False)


def fit_seeds(config: Config, folder: Path) -> list[Ended]:
    """A run for each seed; see `seeds.fit_seeds`."""
    if len(config.seeds) == 1:
        config = seeds.with_seed(config, config.seeds[0])
    taught = with_encoder(config, folder)  # one lesson for all seeds
    if taught is None:
        return [Ended(None, {}, stopped=True)]
    return seeds.fit_seeds(EXPERIMENT, taught, folder, fit)


@dataclasses.dataclass(frozen=True)
class Ask:
    """Asks a model about pictures, all of them in one row in front of the question."""

    model: Annotated[str, flags.Positional]
    """A run of this command, or a folder with a tokenizer beside the model."""
    pictures: Annotated[tuple[str, ...], flags.Positional]
    """Image files, and the question last."""
    max_new_tokens: int = 64
    """Most tokens of the answer."""


def ask(config: Ask) -> str:
    """The answer to a question about pictures, the likeliest token at a time.

    Raises:
      ValueError, FileNotFoundError: no such model, or no picture and question.
    """
    if len(config.pictures) < 2:
        raise ValueError("ask RUN PICTURE ... QUESTION, expected a picture and a question")
    *files, question = config.pictures
    model, folder = load_model(config.model)
    tokenizer, shape = restore_tokenizer(folder), model.config.vision
    preprocess = Preprocess(read_preprocess(folder, PreprocessConfig()), shape.image_size, shape.channels)
    images = [preprocess(open_picture(file, file)) for file in files]
    places = [model.config.image_token_id] * model.config.image_tokens * len(images)
    prompt = [*places, *map(int, tokenizer.encode(question))]
    tokens = zoo.generate(model, prompt, config.max_new_tokens, images=images, eos_id=tokenizer.eot)
    return said(tokenizer, np.asarray(tokens)[0, len(prompt) :])


def main() -> int:
    """Trains, evaluates and shows a table; or asks, or distils."""
    if sys.argv[1:2] == ["distill"]:
        del sys.argv[1]
        return distilling.main()
    if sys.argv[1:2] == ["ask"]:
        del sys.argv[1]
        asked = flags.parse_one(Ask, prog="python -m experiments.vlm ask", description=Ask.__doc__ or "")
        with flags.usage_errors():
            print(ask(asked))
        return 0
    config = flags.parse(PRESETS, prog="python -m experiments.vlm", description=__doc__, make_way=make_way)
    folder = Path(config.run_dir) if config.run_dir else seeds.default_run_dir(config, PRESETS, "vlm", FREE)
    trained = fit_seeds(config, folder)
    if trained[-1].stopped:
        return 0
    scores = report(summarise([run.scores for run in trained]), len(trained))
    show_end(folder, scores.splitlines(), "results.json, predictions.jsonl, predictions.png, curves.png, checkpoints")
    return 0


if __name__ == "__main__":
    flags.run(main)
