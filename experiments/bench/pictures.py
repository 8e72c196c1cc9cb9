"""What reads a picture best: connectors and language models, at equal steps and nearly equal parameters.

    python -m experiments.bench pictures                          # all of it, 3 seeds: an hour or two
    python -m experiments.bench pictures --parts pairs --cross    # the cross through attention and the MLP: 5 pairs
    python -m experiments.bench pictures --seeds 0 --steps 100    # a look
    python -m experiments.bench pictures --cross --json out.json

One image encoder learns from captions of drawn scenes (`experiments.clip`), once, and stays as it is. Each pair of a
connector and a language model then learns to answer about such scenes: what stands at a place, what colour a thing has,
where it is, and what the whole picture shows. The table has the share of the held-out answers that are right to the
last token, of each kind of question: mean and sample standard deviation over the seeds, beside what the most frequent
answer of each kind would have. The same command again goes on where it was; a row that is done is read from
RUN_DIR/ROW/seed-N/results.json.

    pairs      connectors with language models
    deepstack  an image takes a quarter of the places, its other tokens are added before deeper blocks
    sparse     p-MoD: the second block takes 2 of an image's 16 tokens; and MLPs through which words alone go
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ssm
import zoo
from experiments import clip, vlm
from experiments.bench import record
from experiments.data.image_texts import Example, ImageTextsConfig, load_image_texts
from experiments.loop import flags, seeds
from experiments.loop.json_files import write_json
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.summary import Summary, summarise
from experiments.loop.train import TrainConfig
from experiments.vision_language import presets
from experiments.vision_language.encoder import lesson
from experiments.vision_language.task import Prepared, evaluate, prepare

ConnectorName = Literal["mlp", "scan", "queries"]
Part = Literal["pairs", "deepstack", "sparse"]
KINDS = ("caption", "shape", "colour", "place")
LANGUAGES = {
    "attention": "attn/mlp",
    "Mamba-2": "mamba2/mlp",
    "hybrid": "mamba2/mlp attn/mlp",
}
SPARSE = {
    "attention, p-MoD": "attn/mlp:cosine",
    "Mamba-2, p-MoD": "mamba2/mlp:cosine",
    "hybrid, p-MoD": "mamba2/mlp:cosine attn/mlp:cosine",
    "attention, MLPs of words": "attn -/mlp:0.0001 attn -/mlp:0.0001",
    "hybrid, MLPs of words": "mamba2 -/mlp:0.0001 attn -/mlp:0.0001",
}
# Of nearly equal size.
CONNECTORS: dict[ConnectorName, zoo.ConnectorConfig] = {
    "mlp": zoo.ConnectorConfig(d_hidden=192),
    "scan": zoo.ConnectorConfig("scan", mamba2=ssm.Mamba2Config(d_state=8, head_dim=16, expand=0.5)),
    "queries": zoo.ConnectorConfig("queries", n_queries=16, n_heads=4),
}
P_MOD = zoo.MoDConfig(gate="tanh", weighs="symmetric", decides="top_k")
MODEL = presets.small(64, 2, 32, 8)
# DeepStack adds a group of tokens before each of four blocks: as large as two of the others, without MLPs.
BLOCKS = 4


class Row(NamedTuple):
    """What is compared."""

    connector: ConnectorName
    language: str
    deepstack: bool = False

    @property
    def name(self) -> str:
        """Its folder's."""
        language = self.language.replace(",", "").replace(" ", "-")
        return "-".join([self.connector, language, *["deepstack"] * self.deepstack])


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs, how long, and what to write of them."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs: of the initial parameters and of the training batches."""
    connectors: tuple[ConnectorName, ...] = tuple(CONNECTORS)
    """Which connectors."""
    parts: tuple[Part, ...] = ("pairs", "deepstack", "sparse")
    """What is compared."""
    cross: bool = False
    """Connectors with attention alone, and language models with the MLP alone, instead of each with each; DeepStack
    without the hybrid."""
    steps: int = 1200
    """Steps of each run."""
    batch_size: int = 32
    """Questions a step."""
    learning_rate: float = 3e-3
    """Peak learning rate of each run."""
    encoder_steps: int = 400
    """Steps in which the encoder learns which caption is whose."""
    scenes: int = 10_000
    """Scenes to train on."""
    run_dir: Path = Path("runs/bench_pictures")
    """Folder of all runs."""
    json: Path | None = None
    """File to write all figures to, with the hardware and the versions."""

    def __post_init__(self):
        if not self.seeds or not self.connectors or not self.parts:
            raise ValueError("expected at least one of seeds, of connectors and of parts")
        seeds.check_different(self.seeds)
        for name in ("steps", "batch_size", "encoder_steps", "scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")


def rows_of(config: Config) -> list[Row]:
    """What is compared, the cross first."""
    pairs = [Row("mlp", language) for language in LANGUAGES]
    pairs += [Row(connector, "attention") for connector in CONNECTORS if connector != "mlp"]
    deepstack = [Row("mlp", language, deepstack=True) for language in LANGUAGES]
    if config.cross:
        deepstack = [row for row in deepstack if row.language != "hybrid"]
    else:
        pairs += [Row(c, language) for c in CONNECTORS for language in LANGUAGES if Row(c, language) not in pairs]
    sparse = [Row("mlp", language) for language in SPARSE]
    parts = {"pairs": pairs, "deepstack": deepstack, "sparse": sparse}
    return [row for part in config.parts for row in parts[part] if row.connector in config.connectors]


def configuration(config: Config, row: Row, seed: int) -> presets.Config:
    """One run, as `experiments.vlm` does it."""
    pattern = (LANGUAGES | SPARSE)[row.language]
    n_layers = max(MODEL.text.n_layers, len(pattern.split()))
    text = dataclasses.replace(
        MODEL.text,
        n_layers=BLOCKS if row.deepstack else n_layers,
        pattern=pattern.replace("/mlp", "") if row.deepstack else pattern,
        mlp=zoo.MLPConfig(d_ff=64),
        mamba2=ssm.Mamba2Config(head_dim=16, d_state=16, d_conv=2, chunk_size=16, expand=1.0),
        mod=P_MOD if row.language in SPARSE else zoo.MoDConfig(),
    )
    model = dataclasses.replace(
        MODEL,
        text=text,
        connector=CONNECTORS[row.connector],
        deepstack=2 if row.deepstack else 1,
        full_rows=row.language in SPARSE,
    )
    return presets.Config(
        model=model,
        data=ImageTextsConfig(scenes=config.scenes, held_out_scenes=800, scene_kinds=KINDS),
        vision_init=str(config.run_dir / "encoder" / "images"),
        trained="language",
        warmup_fraction=0.1,
        threads=1,
        train=TrainConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            log_every=100,
            eval_every=config.steps,
            save_every=config.steps,
            keep_last=1,
            tensorboard=False,
            seed=seed,
        ),
        optim=OptimConfig(learning_rate=config.learning_rate, weight_decay=0.05, final_fraction=0.01),
    )


def learn(config: presets.Config, folder: Path, prepared: Prepared | None) -> dict[str, Any] | None:
    """The results of a run: read where it is done, else trained. None: it was stopped."""
    done = folder / "results.json"
    if done.exists() and flags.load_config(presets.Config, folder / "config.json") == config:
        return json.loads(done.read_text())
    prepared, finished = seeds.fit_one(vlm.EXPERIMENT, config, folder, prepared)
    if finished.stopped:
        return None
    scores = evaluate(finished.model, prepared.rows[1], config.train.batch_size)
    results = {"held out": scores, "parameters": trained_parameters(prepared.model)}
    write_json(results, done)
    return results


def trained_parameters(model: zoo.VisionLanguageConfig) -> int:
    """Parameters of the connector and the language model."""
    return count_params(model) - count_params(model.vision)


def most_frequent(examples: Sequence[Example]) -> dict[str, float]:
    """The share that the most frequent answer of each kind has, and of all: what a model without eyes can reach."""
    answers = {kind: Counter(e.answer for e in examples if e.kind == kind) for kind in KINDS}
    most = {kind: found.most_common(1)[0][1] for kind, found in answers.items()}
    shares = {kind: most[kind] / answers[kind].total() for kind in KINDS}
    return {"exact": sum(most.values()) / len(examples)} | shares


def main() -> int:
    """Does what runs are missing, then prints the table; what was done before a stop is in the next one's."""
    with flags.usage_errors():
        config = flags.parse_one(Config, prog="python -m experiments.bench pictures", description=__doc__)
    encoder = config.run_dir / "encoder"
    if not (encoder / "images").is_dir():
        first = dataclasses.replace(configuration(config, Row("mlp", "Mamba-2"), 0), vision_init=None)
        if clip.fit(lesson(dataclasses.replace(first, encoder_steps=config.encoder_steps)), encoder).stopped:
            return 0
    found: dict[Row, list[dict[str, Any]]] = {}
    shared: dict[Row, Prepared] = {}
    order = (rows_of(dataclasses.replace(config, parts=(part,))) for part in config.parts)  # each part whole by seed
    for seed, row in itertools.chain.from_iterable(itertools.product(config.seeds, some) for some in order):
        print(f"{row.name}, seed {seed}", flush=True)
        one = configuration(config, row, seed)
        if row not in shared:
            shared[row] = prepare(one)
        if (results := learn(one, config.run_dir / row.name / f"seed-{seed}", shared[row])) is None:
            return 0
        found.setdefault(row, []).append(results)
    blind = most_frequent(load_image_texts(one.data).held_out.examples)
    figures = [
        {**row._asdict(), "parameters": results[0]["parameters"]}
        | {"runs": [{"seed": seed} | run["held out"] for seed, run in zip(config.seeds, results, strict=True)]}
        | {"accuracy": summarise([{"held out": run["held out"]} for run in results])["held out"]}
        for row, results in found.items()
    ]
    environment = record.read_environment()
    print(f"\n{environment['hardware']}; jax {environment['versions']['jax']}, commit {environment['commit']}\n")
    for line in table(figures, blind):
        print(line)
    if config.json:
        record.save_record(config.json, config, environment, figures)
    return 0


def table(figures: list[dict], blind: dict[str, float]) -> list[str]:
    """Lines of Markdown: right answers in %, a column for each kind of question."""
    kinds = ("exact", *KINDS)
    lines = [f"| connector | language model | parameters | all | {' | '.join(KINDS)} |"]
    lines.append(f"| --- | --- | --: |{' --: |' * len(kinds)}")
    for row in figures:
        connector = row["connector"] + ", DeepStack" * row["deepstack"]
        cells = " | ".join(_cell(row["accuracy"][kind]) for kind in kinds)
        lines.append(f"| {connector} | {row['language']} | {row['parameters']:,} | {cells} |")
    return [*lines, f"| | most frequent answer | | {' | '.join(f'{100 * blind[kind]:.1f}' for kind in kinds)} |"]


def _cell(value: Summary) -> str:
    return f"{100 * value.mean:.1f}" + ("" if value.std is None else f" ± {100 * value.std:.1f}")
