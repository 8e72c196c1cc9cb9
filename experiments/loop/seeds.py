"""Several runs of one experiment that differ in their seed: a folder for each, the mean, the spread, and a table."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.loop import flags, runs

Scores = dict[str, float]  # of one run, on one split


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


def fit_several(
    config: Any,
    folder: Path,
    *,
    prepare: Callable[[Any, Path | None], Any],
    fit: Callable[[Any, Path, Any], Any],
    free: Collection[str] = (),
    keep: Callable[[Any], None] = lambda prepared: None,
) -> list[Any]:
    """A run for each of `config.seeds` in the folder's seed-0, seed-1, ...; ends at the first that is stopped.

    Args:
      config: an experiment's configuration, with fields `seeds` and `train`.
      folder: of all runs.
      prepare: prepare(config, folder of runs that go on or None) gives what the runs share.
      fit: fit(config of one run, its folder, what is shared) gives a run, with a field `stopped`.
      free: fields that may change between starts, besides those of every experiment.
      keep: keep(what is shared) writes in the folder what belongs to all runs.

    Raises:
      UsageError: what `prepare` says is wrong, or the folder holds something else; nothing has been written.
    """
    with flags.usage_errors():
        if (folder / runs.MODEL_FILE).is_file():
            raise ValueError(f"{folder} holds a run of one seed; choose another --run-dir for several")
        going_on = runs.holds_run(config, folder, (*free, "seeds", "train.seed"))
        prepared = prepare(config, folder if going_on else None)
        folder.mkdir(parents=True, exist_ok=True)
        keep(prepared)
        flags.save_config(config, folder / "config.json")
    done: list[Any] = []
    for seed in config.seeds:
        done.append(fit(with_seed(config, seed), folder / f"seed-{seed}", prepared))
        if done[-1].stopped:
            break
    return done


class Summary(NamedTuple):
    """The mean of some runs, and how far they are apart."""

    mean: float
    std: float | None
    """Sample standard deviation; None of one run."""


def summarise(scores: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, Summary]]:
    """Over runs, for every split and metric."""
    return {
        split: {
            name: Summary(
                float(np.mean([run[split][name] for run in scores])),
                float(np.std([run[split][name] for run in scores], ddof=1)) if len(scores) > 1 else None,
            )
            for name in scores[0][split]
        }
        for split in scores[0]
    }


def save_summary(folder: Path, seeds: Sequence[int], scores: Sequence[Mapping[str, Scores]], **beside: Any) -> None:
    """Writes results.json: the scores of each run, their summary, and what else is given."""
    summary = summarise(scores)
    content = {
        "runs": [{"seed": seed} | dict(run) for seed, run in zip(seeds, scores, strict=True)],
        "summary": {split: {n: value._asdict() for n, value in row.items()} for split, row in summary.items()},
        **beside,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")


def table(rows: Mapping[str, Mapping[str, Summary]], metrics: Sequence[str] = ()) -> list[str]:
    """Lines of a table: a row for each split, a column for each metric."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name != "loss"))
    unknown = [name for name in metrics if name not in names]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}, expected some of {', '.join(names)}")
    names = list(metrics or names)

    def cell(value: Summary | None) -> str:
        if value is None:
            return "-"
        return f"{value.mean:.4f}" + ("" if value.std is None else f" ± {value.std:.4f}")

    cells = [["", *names], *([split, *(cell(row.get(name)) for name in names)] for split, row in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
