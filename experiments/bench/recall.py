"""Does a fixed state recall less than attention, and do a few layers of attention make up for it?

    python -m experiments.bench recall                            # 2 tasks x 3 models x 3 seeds
    python -m experiments.bench recall --tasks mqar --seeds 0     # one task, one seed
    python -m experiments.bench recall --d-state 16 --steps 6000 --run-dir runs/bench_recall/larger
    python -m experiments.bench recall --json out.json --plot out.png

Attention, Mamba-2 and a hybrid of them, equal in parameters, learn two of the tasks of `experiments.synthetic` from
the same batches: recall of keys' values (MQAR) and a phonebook look-up. The table has the accuracy on held-out rows,
with more and more pairs or entries: mean and sample standard deviation over the seeds. Each run is one that
`experiments.synthetic` could do, in a folder of its own, RUN_DIR/TASK/MODEL/seed-N; the same command again goes on
where it was.

The finding to be checked: Waleffe et al. 2024, arXiv:2406.07887, section 3.3 (pure state-space models lag in copying,
hybrids with few attention layers do not); for MQAR also Arora et al. 2023, arXiv:2312.04927.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Literal

import ssm
import zoo
from experiments import synthetic
from experiments.bench import record
from experiments.bench.panels import tidy
from experiments.loop import flags, runs
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.summary import Summary, summarise
from experiments.loop.train import TrainConfig
from experiments.recall import presets
from experiments.recall.tasks import MQAR, Phonebook

TaskName = Literal["mqar", "phonebook"]
MODELS = {"attention": "attn/mlp", "Mamba-2": "mamba2", "hybrid": "attn/mlp mamba2"}
# Queries, keys and values pass a short convolution, as Mamba-2's inputs do: without it attention takes longer to learn
# that a value is the token behind its key than all of this takes.
MODEL = zoo.CausalLMConfig(
    d_model=64,
    n_layers=2,
    mamba2=ssm.Mamba2Config(head_dim=16),
    attn=zoo.AttentionConfig(n_heads=2, d_conv=4),
)
TRAIN = TrainConfig(
    steps=1500, batch_size=32, eval_every=500, save_every=500, log_every=250, keep_last=1, tensorboard=False
)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, final_fraction=0.0, weight_decay=0.0)
PAIRS = MQAR(length=32, n_pairs=8, n_queries=16, vocab_size=32)
BOOK = Phonebook(n_entries=8, number_length=2, n_questions=4, max_eval_entries=16)
# What grows in the table, and the task with its model and training; the pattern and the seed are each run's own.
TASKS: dict[TaskName, tuple[str, presets.Config]] = {
    "mqar": ("pairs of key and value", presets.MQARConfig(data=PAIRS, model=MODEL, train=TRAIN, optim=OPTIM)),
    "phonebook": ("entries", presets.PhonebookConfig(data=BOOK, model=MODEL, train=TRAIN, optim=OPTIM)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs, and what to write of them."""

    tasks: tuple[TaskName, ...] = tuple(TASKS)
    """Tasks to learn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs: of the initial parameters and of the training batches."""
    steps: int = TRAIN.steps
    """Steps of each run."""
    learning_rate: float = 1e-2
    """Peak learning rate of each run."""
    d_state: int = 8
    """State size of a channel of Mamba-2. The MLPs behind attention are as wide as makes the models equal."""
    run_dir: Path = Path("runs/bench_recall")
    """Folder of all runs."""
    json: Path | None = None
    """File to write all figures to, with the hardware and the versions."""
    plot: Path | None = None
    """Picture to draw: accuracy against the number of pairs or entries, a panel for each task."""

    def __post_init__(self):
        if not self.tasks or not self.seeds:
            raise ValueError("expected at least one of tasks and of seeds")
        for task, model in itertools.product(self.tasks, MODELS):
            configuration(self, task, model, 0)


def configuration(config: Config, task: TaskName, model: str, seed: int) -> presets.Config:
    """One run, as `experiments.synthetic` does it."""
    base = TASKS[task][1]
    return presets.fit_vocabulary(
        dataclasses.replace(
            base,
            model=dataclasses.replace(equal_blocks(base.model, config.d_state), pattern=MODELS[model]),
            train=dataclasses.replace(base.train, seed=seed, steps=config.steps),
            optim=dataclasses.replace(base.optim, learning_rate=config.learning_rate),
        )
    )


def equal_blocks(model: zoo.CausalLMConfig, d_state: int) -> zoo.CausalLMConfig:
    """Sets the state size of Mamba-2, and the width at which attention and its MLP have as many parameters.

    Raises:
      ValueError: Mamba-2 has no more than attention alone.
    """
    model = dataclasses.replace(model, mamba2=dataclasses.replace(model.mamba2, d_state=d_state))
    of = {p: count_params(dataclasses.replace(model, vocab_size=1, pattern=p, n_layers=1)) for p in ("mamba2", "attn")}
    d_ff = round((of["mamba2"] - of["attn"]) / (3 * model.d_model))  # the MLP is gated: three matrices
    if d_ff < 1:
        raise ValueError(f"d_state={d_state}: attention alone has {of['attn']:,} parameters, Mamba-2 {of['mamba2']:,}")
    return dataclasses.replace(model, mlp=dataclasses.replace(model.mlp, d_ff=d_ff))


def learn(config: presets.Config, folder: Path) -> dict | None:
    """The results of a run: read where it is done, else trained. None: it was stopped."""
    done = folder / "results.json"
    with flags.usage_errors():
        if runs.holds_run(config, folder, presets.FREE) and done.exists():
            results = json.loads(done.read_text())
            if results["step"] >= config.train.steps:
                return results
    return synthetic.run(config, folder)


def main() -> int:
    """Does what runs are missing, then prints a table of each task."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench recall", description=__doc__)
    scores: dict[tuple[TaskName, str], list[dict[str, dict[str, float]]]] = {}
    for seed, task, model in itertools.product(config.seeds, config.tasks, MODELS):
        print(f"{task}, {model}, seed {seed}", flush=True)
        folder = config.run_dir / task / model / f"seed-{seed}"
        if (results := learn(configuration(config, task, model, seed), folder)) is None:
            return 0
        lines = {str(next(iter(line.values()))): {"accuracy": line["accuracy"]} for line in results["table"]}
        scores.setdefault((task, model), []).append(lines)
    figures = [
        {
            **{"task": task, "model": model, "pattern": MODELS[model]},
            "parameters": count_params(configuration(config, task, model, 0).model),
            "runs": [{"seed": seed} | run for seed, run in zip(config.seeds, several, strict=True)],
            "accuracy": {int(size): row["accuracy"] for size, row in summarise(several).items()},
        }
        for (task, model), several in scores.items()
    ]
    environment = record.read_environment()
    print(f"\n{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}")
    for line in table(figures):
        print(line)
    if config.plot:
        plot(figures, config.plot)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def table(figures: list[dict]) -> list[str]:
    """Lines of Markdown, a table for each task: accuracy in %, a column for each number of pairs or entries."""
    lines: list[str] = []
    for task in dict.fromkeys(figure["task"] for figure in figures):
        rows = [figure for figure in figures if figure["task"] == task]
        sizes = list(rows[0]["accuracy"])
        lines += ["", f"| {task}, {TASKS[task][0]} | pattern | parameters | {' | '.join(map(str, sizes))} |"]
        lines.append(f"| --- | --- | --: |{' --: |' * len(sizes)}")
        for row in rows:
            cells = " | ".join(_cell(row["accuracy"][size]) for size in sizes)
            lines.append(f"| {row['model']} | `{row['pattern']}` | {row['parameters']:,} | {cells} |")
    return lines


def _cell(value: Summary) -> str:
    return f"{100 * value.mean:.1f}" + ("" if value.std is None else f" ± {100 * value.std:.1f}")


def plot(figures: list[dict], path: Path) -> None:
    """Draws accuracy against the number of pairs or entries: a panel for each task, a line for each model."""
    from matplotlib.figure import Figure  # a third of a second; a Figure made like this opens no window

    tasks = list(dict.fromkeys(figure["task"] for figure in figures))
    picture = Figure(figsize=(5 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for figure in (figure for figure in figures if figure["task"] == task):
            sizes, summary = zip(*figure["accuracy"].items(), strict=True)
            spread = [100 * (value.std or 0.0) for value in summary]
            axes.errorbar(
                *(sizes, [100 * value.mean for value in summary], spread),
                **{"marker": "o", "markersize": 3.5, "capsize": 3, "label": figure["model"]},
            )
        tidy(axes, sizes, title=task, xlabel=TASKS[task][0], ylabel="accuracy, %")
    picture.savefig(path, dpi=80)
