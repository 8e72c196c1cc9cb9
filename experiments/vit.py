"""Image classification: any pattern of mixers over patches, any images.

    python -m experiments.vit tiny                                       # 8 x 8 digits, no download, a minute or two
    python -m experiments.vit mnist                                      # MNIST-5k: Monarch Mixer over 49 patches
    python -m experiments.vit mnist --model.pattern attn/mlp             # ViT; also vim, "ss2d/mlp[d_ff=64]"
    python -m experiments.vit mnist --seeds 0 1 2                        # the mean of three runs
    python -m experiments.vit sequential-mnist --model.pattern mamba     # 784 pixels, one a token
    python -m experiments.vit tiny --data.path photos/ --model.image-size 32 --model.channels 3
    python -m experiments.vit deit-small                                 # ImageNet from the hub, for accelerators
    python -m experiments.vit deit-small --init FOLDER --evaluate-only   # how good published weights are on it

`python -m experiments.data fetch mnist-5k` brings the digits of MNIST. The same command again resumes the run where it
was. `python -m experiments.vit predict RUN_DIR images/` asks what it has learned; in a notebook:
`Predictor.from_pretrained(RUN_DIR)([image, ...])`, see `experiments.vision.predictor`.
"""

import dataclasses
import functools
import sys
from collections.abc import Collection
from pathlib import Path

from experiments.loop import flags, runs, seeds
from experiments.loop.duration import make_way
from experiments.loop.mesh import meshed
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.seeds import Ended
from experiments.loop.summary import Scores, report, summarise, table
from experiments.vision.load import load_model
from experiments.vision.meaning import save_meaning
from experiments.vision.prediction import logits_of
from experiments.vision.predictor import predict as predict
from experiments.vision.presets import FREE, PRESETS, Config
from experiments.vision.results import describe, speed_and_memory, write_results
from experiments.vision.task import Prepared, make_task, prepare, score


def default_run_dir(config: Config) -> Path:
    """runs/vit/PRESET for a preset as it is, with a digest of the changes for a changed one, and "-seeds"."""
    return seeds.default_run_dir(config, PRESETS, "vit", FREE)


def save(prepared: Prepared, folder: Path) -> None:
    """Writes what the model of a run is, and what goes into it and comes out."""
    runs.save_model_config(prepared.model, folder)
    save_meaning(prepared.meaning, folder)


EXPERIMENT = seeds.Experiment(
    prepare=prepare,
    make_task=make_task,
    save=save,
    describe=describe,
    record=lambda prepared: {"model": dataclasses.asdict(prepared.model)},
    free=FREE,
    inputs=lambda prepared: {f"data {name}": images.content() for name, images in prepared.data.splits.items()},
)


def _experiment(given: Collection[str]) -> seeds.Experiment:
    return EXPERIMENT._replace(prepare=functools.partial(prepare, given=given))


@locked
@meshed
def fit(config: Config, folder: Path, prepared: Prepared | None = None, *, given: Collection[str] = ()) -> Ended:
    """Trains with one seed in a folder, from its newest checkpoint where there is one; see `seeds.fit_one`.

    Args:
      prepared: what `prepare` gives for this configuration, whatever the seed. None: made here.
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.
    """
    prepared, finished = seeds.fit_one(_experiment(given), config, folder, prepared)
    if finished.stopped:
        return Ended(finished.model, {}, stopped=True)
    return Ended(finished.model, write_results(finished.model, folder, config, prepared), stopped=False)


def fit_seeds(config: Config, folder: Path, *, given: Collection[str] = ()) -> list[Ended]:
    """A run for each seed; see `seeds.fit_seeds`. Their speed and their memory are in results.json too."""
    if len(config.seeds) == 1:
        config = seeds.with_seed(config, config.seeds[0])  # --seeds 3 goes on with a run of --train.seed 3
    return seeds.fit_seeds(
        _experiment(given), config, folder, functools.partial(fit, given=given), beside=speed_and_memory
    )


def evaluate_only(config: Config, *, given: Collection[str] = ()) -> dict[str, Scores]:
    """Scores of --init as it is, on every split but that of training."""
    with flags.usage_errors():
        prepared = prepare(config, given=given)
        model, _ = load_model(config.init or "")
    splits = list(prepared.data.splits.items())[1:]
    return {name: score(logits_of(model, each, prepared.preprocess, config), each.labels) for name, each in splits}


def main() -> int:
    """Trains, evaluates and shows a table; or hands on to `predict`."""
    if sys.argv[1:2] == ["predict"]:
        return flags.hand_on({"predict": "experiments.vision.predict"})
    config = flags.parse(PRESETS, prog="python -m experiments.vit", description=__doc__, make_way=make_way)
    if config.evaluate_only:
        print("\n".join(table(summarise([evaluate_only(config, given=flags.given(Config))]))))
        return 0
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    trained = fit_seeds(config, folder, given=flags.given(Config))
    if trained[-1].stopped:
        return 0
    scores = report(summarise([run.scores for run in trained]), len(trained))
    files = "results.json, predictions.jsonl, confusion.png, mistakes.png, curves.png, checkpoints"
    show_end(folder, scores.splitlines(), files)
    return 0


if __name__ == "__main__":
    flags.run(main)
