"""The synthetic tasks that the selective-state-space papers stand on: copying, recall, extrapolation, state tracking.

    python -m experiments.synthetic selective-copying      # data tokens among noise, to be repeated in order: 99.9 %
    python -m experiments.synthetic induction              # what followed this token? trained at 256: 100 % up to 8,192
    python -m experiments.synthetic mqar                   # keys and values, then queries; Mamba-2: 99.9 % of 16 keys
    python -m experiments.synthetic mqar --data.n-pairs 8 --data.n-queries 48 --steps 1500 --model.mamba2.d-state 8
                                                           # 8 keys by state size 4, 8, 16, 32: 40, 59, 93, 100 %
    python -m experiments.synthetic mqar --model.pattern "mamba attn" --model.n-layers 2   # not measured
    python -m experiments.synthetic phonebook --model.pattern "mamba2/mlp*3 attn/mlp"      # names and their numbers
    python -m experiments.synthetic parity                 # how many ones so far, odd or even? 100 % to 128 bits
    python -m experiments.synthetic parity --model.pattern mamba2      # chance: its state cannot turn

Some five minutes each on two CPU cores. Each ends with a table, printed and kept in RUN_DIR/results.json. The same
command again resumes the run where it was.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zoo
from experiments.loop import flags, runs
from experiments.loop.json_files import write_json
from experiments.loop.mesh import meshed
from experiments.loop.run_lock import locked
from experiments.loop.run_page import keep_result
from experiments.loop.train import Finished, Task, train
from experiments.recall.answers import answer_loss, score
from experiments.recall.batches import Batches, held_out
from experiments.recall.presets import FREE, PRESETS, Config, fit_vocabulary
from experiments.recall.tasks import row_length


def default_run_dir(config: Config) -> Path:
    """runs/synthetic/TASK for a preset as it is, with a digest of the changes for a changed one."""
    same_task = {name: preset for name, preset in PRESETS.items() if type(preset[1]) is type(config)}
    return runs.default_run_dir(config, same_task, "synthetic", FREE)


def make_task(config: Config) -> Task:
    """The task of a configuration whose model.vocab_size is known."""
    batch_size = config.train.batch_size
    n_batches = -(-config.eval_sequences // batch_size)
    length = row_length(config.data)

    def evaluate(model):
        batches = held_out(config.data, batch_size=batch_size, n_batches=n_batches)
        measured = score(model, batches, chunk_size=min(length, 1024))._asdict()
        del measured["sequences"]
        return measured

    return Task(
        init=lambda rngs: zoo.CausalLM(config.model, rngs=rngs),
        loss=answer_loss,
        batches=Batches(config.data, batch_size=batch_size, seed=config.train.seed),
        evaluate=evaluate,
        tokens_per_batch=batch_size * length,
    )


def measure(config: Config, model: zoo.CausalLM, *, show: Callable[[str], None] = print) -> list[dict[str, float]]:
    """The task's table: one line for each of its variants, shown as it is measured.

    Returns:
      a dict a line: the variant's field and the `Score`, e.g. {"length": 64, "loss": 0.01, "accuracy": 1.0, ...}.
    """
    lines: list[dict[str, float]] = []
    chunk_size = min(row_length(config.data), 1024)
    for name, value, data in config.data.variants():
        rows = max(16, min(config.eval_sequences, config.eval_tokens // row_length(data)))
        batches = held_out(data, batch_size=16, n_batches=-(-rows // 16))
        measured = score(model, batches, chunk_size=chunk_size)
        if not lines:
            show(f"{name.replace('_', ' '):>9}  accuracy  whole rows  of")
        show(f"{value:>9,}  {measured.accuracy:8.2%}  {measured.sequence_accuracy:10.2%}  {measured.sequences}")
        lines.append({name: value, **measured._asdict()})
    return lines


@locked
@meshed
def fit(config: Config, folder: Path) -> Finished:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Raises:
      UsageError: the configuration does not fit, or the folder holds something else; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        runs.holds_run(config, folder, FREE)
        fitted = fit_vocabulary(config)
        task = make_task(fitted)
        runs.begin(config, folder, fitted.model)
    return train(task, config.train, config.optim, folder, record=dataclasses.asdict(fitted))


@locked
@meshed
def run(config: Config, folder: Path) -> dict[str, Any] | None:
    """Trains, measures and keeps the table in the folder's results.json.

    Returns:
      what is in the file, {"step", "pattern", "table"}, or None of a run that was stopped before its last step.
    """
    finished = fit(config, folder)
    if finished.stopped:
        return None
    step = int(finished.state.step)
    lines: list[str] = []

    def show(line: str) -> None:
        print(line)
        lines.append(line)

    results = {"step": step, "pattern": config.model.pattern, "table": measure(config, finished.model, show=show)}
    write_json(results, folder / "results.json")
    keep_result(folder, lines)
    return results


def main() -> int:
    """Trains, then measures."""
    config = flags.parse(PRESETS, prog="python -m experiments.synthetic", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    if run(config, folder) is None:
        return 0
    print(f"run folder: {folder} (index.html, results.json, curves.png, metrics.jsonl, tensorboard, checkpoints)")
    return 0


if __name__ == "__main__":
    flags.run(main)
