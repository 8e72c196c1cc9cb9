"""Runs of one experiment that differ in their seed: what they share is made once, and each has a folder."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.loop import flags, runs
from experiments.loop.adapting import AdaptConfig, adapted
from experiments.loop.few_bits import QuantizeConfig, in_few_bits
from experiments.loop.fingerprints import check_inputs
from experiments.loop.mesh import meshed
from experiments.loop.run_lock import locked
from experiments.loop.summary import Scores, save_summary
from experiments.loop.train import Finished, Task, train


class Experiment(NamedTuple):
    """What an experiment is to its runs. Its configuration has fields `seeds`, `train`, maybe `adapt`, `quantize`."""

    prepare: Callable[[Any, Path | None], Any]
    """prepare(config, folder of a run that goes on or None) gives what runs of all seeds share, with fields `train` and
    `optim` that count steps."""
    make_task: Callable[[Any, Any], Task]
    """make_task(config of one run, what is shared) gives the loop's task."""
    save: Callable[[Any, Path], None]
    """save(what is shared, folder of a run) writes what its checkpoints are read with."""
    describe: Callable[[Any, Path], str]
    """describe(what is shared, folder of a run) says what is about to happen."""
    record: Callable[[Any], dict[str, Any]]
    """record(what is shared) is what loggers keep besides the configuration."""
    free: Collection[str] = ()
    """Fields that may change between two starts of one run, besides those of every experiment."""
    inputs: Callable[[Any], Mapping[str, Any]] = lambda prepared: {}
    """inputs(what is shared) is what runs learn from, see `fingerprints.check_inputs`."""
    save_once: Callable[[Any, Path], None] = lambda prepared, folder: None
    """save_once(what is shared, folder of several runs) writes what `prepare` takes from there when they go on."""


class Ended(NamedTuple):
    """A run that has ended."""

    model: Any
    scores: dict[str, Scores]
    """Of the last step, by split and metric."""
    stopped: bool
    """Whether a signal ended it; there are no scores then."""


def check_different(seeds: Sequence[int]) -> None:
    """Raises a ValueError where a seed comes twice."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}, expected different ones")


def default_run_dir(
    config: Any, presets: Mapping[str, tuple[str, Any]], experiment: str, free: Collection[str] = ()
) -> Path:
    """`runs.default_run_dir`, with "-seeds" behind it where `config.seeds` are several."""
    several = len(config.seeds) > 1
    one = dataclasses.replace(config, seeds=()) if several else config
    folder = runs.default_run_dir(one, presets, experiment, free)
    return folder.with_name(folder.name + "-seeds") if several else folder


def with_seed(config: Any, seed: int) -> Any:
    """The configuration of one run."""
    return dataclasses.replace(config, seeds=(), train=dataclasses.replace(config.train, seed=seed))


def of_one(config: Any) -> Any:
    """The configuration of one run with the seed that `config.seeds` names, if it names one.

    Raises:
      ValueError: it names several.
    """
    if len(config.seeds) > 1:
        raise ValueError(f"seeds={config.seeds}, expected one at most: `fit_seeds` runs several")
    if not config.seeds:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=config.seeds[0]))


@locked
@meshed
def fit_one(experiment: Experiment, config: Any, folder: Path, prepared: Any = None) -> tuple[Any, Finished]:
    """Trains with one seed in a folder, from the run's newest checkpoint where there is one.

    Args:
      prepared: what `experiment.prepare` gives for this configuration, whatever the seed. None: made here.

    Returns:
      (what is shared, the end of the training).

    Raises:
      UsageError: the configuration or the folder is not what it should be; nothing has been written.
      FloatingPointError: see `train`.
    """
    config = of_one(config)
    with flags.usage_errors():
        going_on = runs.holds_run(config, folder, experiment.free)
        prepared = prepared or experiment.prepare(config, folder if going_on else None)
        length, optim = prepared.train.steps, prepared.optim
        task = experiment.make_task(config, prepared)
        adapt = getattr(config, "adapt", AdaptConfig())  # some experiments have no adapters
        task, save_base = adapted(task, adapt, folder, optim, steps=length, seed=config.train.seed)
        quantize = getattr(config, "quantize", QuantizeConfig())
        fresh = getattr(config, "init", None) is None
        task, save_bits = in_few_bits(task, quantize, folder, seed=config.train.seed, fresh=fresh)
        folder.mkdir(parents=True, exist_ok=True)
        check_inputs(folder, experiment.inputs(prepared), config.train.allow_changed)
        experiment.save(prepared, folder)
        flags.save_config(config, folder / "config.json")
    print(experiment.describe(prepared, folder), flush=True)
    save_base()
    save_bits()
    train_config = dataclasses.replace(prepared.train, seed=config.train.seed)
    record = dataclasses.asdict(config) | experiment.record(prepared)
    return prepared, train(task, train_config, prepared.optim, folder, record=record)


@locked
def fit_seeds(
    experiment: Experiment,
    config: Any,
    folder: Path,
    fit: Callable[..., Any],
    *,
    beside: Callable[[Sequence[Path]], dict[str, Any]] = lambda folders: {},
) -> list[Any]:
    """A run for each seed: in the folder itself where there is one, else in its seed-0, seed-1, ...

    Ends at the first run that is stopped. Their scores are in the folder's results.json.

    Args:
      fit: fit(config of one run, its folder[, what is shared]) gives a run, with fields `scores` and `stopped`.
      beside: beside(folders of the runs) is what results.json says besides.

    Raises:
      UsageError, FloatingPointError: as `fit_one`.
    """
    if len(config.seeds) > 1:
        folders = [folder / f"seed-{seed}" for seed in config.seeds]
        done = _fit_several(experiment, config, folder, folders, fit)
    else:
        folders, done = [folder], [fit(config, folder)]
    if not done[-1].stopped:
        numbers = config.seeds or (config.train.seed,)
        save_summary(folder, numbers, [run.scores for run in done], **beside(folders))
    return done


def _fit_several(
    experiment: Experiment, config: Any, folder: Path, folders: Sequence[Path], fit: Callable[..., Any]
) -> list[Any]:
    with flags.usage_errors():
        if (folder / runs.MODEL_FILE).is_file():
            raise ValueError(f"{folder} holds a run of one seed; choose another --run-dir for several")
        going_on = runs.holds_run(config, folder, (*experiment.free, "seeds", "train.seed"))
        prepared = experiment.prepare(config, folder if going_on else None)
        folder.mkdir(parents=True, exist_ok=True)
        experiment.save_once(prepared, folder)
        flags.save_config(config, folder / "config.json")
    done: list[Any] = []
    for seed, place in zip(config.seeds, folders, strict=True):
        done.append(fit(with_seed(config, seed), place, prepared))
        if done[-1].stopped:
            break
    return done
