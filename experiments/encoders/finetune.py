"""Fine-tuning: an encoder learns classes, numbers, tags of words or answers in a text, from labelled examples.

What labels are follows from their column: text and integers are classes, lists of them several classes at once, lists
beside lists of words tags, floats numbers, SQuAD's answers spans. Files are tables, SQuAD's JSON or CoNLL's sentences.

    python -m experiments.bert finetune tiny                                  # from which package of Python is this?
    python -m experiments.bert finetune tiny --init runs/bert/tiny            # the same, pre-trained on text
    python -m experiments.bert finetune tiny --init runs/bert/tiny --scratch  # its shape and tokenizer, not its weights
    python -m experiments.bert finetune tiny --init runs/bert/tiny --head mlm # the head of pre-training as classifier
    python -m experiments.bert finetune 20newsgroups --init runs/bert/small --seeds 0 1 2 --baseline
    python -m experiments.bert finetune tiny --data.path reviews.csv --data.text-column review --data.label-column stars
    python -m experiments.bert finetune tiny --data.path topics.csv --data.label-separator "|" --class-weights balanced
    python -m experiments.bert finetune mnli --init FOLDER                    # GLUE, see `glue`; for accelerators

The first names the right package, of ten, for 75 % of the snippets of files that it has not seen (72 ± 3 % over three
seeds); counting words, which --baseline does on the same rows, for 84 %. The same command again resumes the run where
it was. `python -m experiments.bert predict RUN_DIR texts.csv out.csv` asks what it has learned; in a notebook:
`Predictor.from_pretrained(RUN_DIR)(["some text"])`, see `experiments.encoders.predictor`.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.labelled import load_labelled
from experiments.data.tokenizers import save_tokenizer
from experiments.encoders import baselines
from experiments.encoders.finetune_presets import FREE, PRESETS, Config
from experiments.encoders.finetune_results import describe, write_results
from experiments.encoders.finetune_task import Prepared, evaluate, make_task, prepare
from experiments.encoders.objectives import Predictions, save_target
from experiments.encoders.predictor import predict as predict
from experiments.loop import flags, runs, seeds
from experiments.loop.duration import make_way
from experiments.loop.mesh import meshed
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.summary import Scores, Summary, report, summarise


class Tuned(NamedTuple):
    """A run that has ended."""

    model: Any
    scores: dict[str, Scores]
    """Of the last step, by split: "loss" and the metrics."""
    predictions: dict[str, Predictions]
    """The same."""
    stopped: bool
    """Whether a signal ended it; there are no scores then."""


def default_run_dir(config: Config) -> Path:
    """runs/finetune/PRESET for a preset as it is, with a digest of the changes for a changed one, and "-seeds"."""
    return seeds.default_run_dir(config, PRESETS, "finetune", FREE)


def save(prepared: Prepared, folder: Path) -> None:
    """Writes what the model of a run is, what it reads and what its outputs stand for."""
    save_tokenizer(prepared.objective.tokenizer, folder)
    runs.save_model_config(prepared.encoder, folder)
    save_target(prepared.objective.target, folder)


EXPERIMENT = seeds.Experiment(
    prepare=prepare,
    make_task=make_task,
    save=save,
    describe=describe,
    record=lambda prepared: {"encoder": dataclasses.asdict(prepared.encoder)},
    free=FREE,
    inputs=lambda prepared: (
        {"tokenizer": prepared.objective.tokenizer.to_json()}
        | {f"data {name}": examples for name, examples in prepared.data.splits.items()}
    ),
    save_once=lambda prepared, folder: save_tokenizer(prepared.objective.tokenizer, folder),
)


def _experiment(given: Collection[str]) -> seeds.Experiment:
    return EXPERIMENT._replace(prepare=functools.partial(prepare, given=given))


@locked
@meshed
def fit(config: Config, folder: Path, prepared: Prepared | None = None, *, given: Collection[str] = ()) -> Tuned:
    """Tunes a model with one seed in a folder, from its newest checkpoint where there is one; see `seeds.fit_one`.

    Args:
      prepared: what `prepare` gives for this configuration, whatever the seed. None: made here.
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.
    """
    prepared, finished = seeds.fit_one(_experiment(given), config, folder, prepared)
    if finished.stopped:
        return Tuned(finished.model, {}, {}, stopped=True)
    results = {
        name: evaluate(finished.model, prepared, name, config.train.batch_size) for name in list(prepared.rows)[1:]
    }
    scores = {name: scores for name, (scores, _) in results.items() if scores}
    predictions = {name: predicted for name, (_, predicted) in results.items()}
    write_results(folder, prepared, predictions)
    return Tuned(finished.model, scores, predictions, stopped=False)


def fit_seeds(config: Config, folder: Path, *, given: Collection[str] = ()) -> list[Tuned]:
    """A run for each seed; see `seeds.fit_seeds`."""
    return seeds.fit_seeds(_experiment(given), config, folder, functools.partial(fit, given=given))


def main() -> int:
    """Tunes, evaluates and shows a table."""
    config = flags.parse(PRESETS, prog="python -m experiments.bert finetune", description=__doc__, make_way=make_way)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    tuned = fit_seeds(config, folder, given=flags.given(Config))
    if tuned[-1].stopped:
        return 0
    rows: dict[str, Mapping[str, Summary]] = dict(summarise([run.scores for run in tuned]))
    with flags.usage_errors():
        if config.baseline:
            counted = baselines.bag_of_words(load_labelled(config.data, config.kind))
            rows |= {
                f"{split}, counting words": {name: Summary(value, None) for name, value in scores.items()}
                for split, scores in counted.items()
            }
        said = report(rows, len(tuned), config.metrics)
    show_end(folder, said.splitlines(), "results.json, predictions.jsonl, confusion.png, curves.png, checkpoints")
    return 0
