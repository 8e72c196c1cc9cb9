"""A vision-language model of attention teaches a copy of itself whose attention has become linear attention (mmMamba).

    python -m experiments.vlm distill runs/vlm/RUN                                  # every layer
    python -m experiments.vlm distill runs/vlm/RUN --pattern "attn linear_attn*3"   # a hybrid: every fourth stays
    python -m experiments.vlm distill runs/vlm/RUN --init random                    # nothing is copied, for comparison

The teacher is a run of experiments.vlm, whose data and tokenizer are taken, too. Its image encoder and connector, MLPs,
norms and embeddings are the student's, and stay as they are. The student learns in stages, each in a folder of its own
below the run's; one of 0 steps is left out:

    layers   what attention does not have: decay, convolution, gate, norm; each layer gives what its attention gives
    qkv      also the maps of queries, keys and values; by the same loss
    hidden   all of these mixers; each block gives what the teacher's block gives
    logits   all of these mixers, through the whole model: KL divergence from the teacher's next token of an answer

In the first three all places count, those of images too. How many answers are right is said of the teacher, of a random
student, of the seeded one, and after each stage. The same command again resumes; the student is in RUN/student, in our
own layout: `zoo.from_pretrained`, `experiments.vlm ask`. Students of `vlm tiny` (58.5 % right, three seeds) have 44.7 %
after 400 steps.

Source: Liao et al. 2025, arXiv:2502.13145.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.causal.pair import DISTANCES, Pair, make_pair
from experiments.causal.run_stages import RESULTS_FILE, check_stages, random_pair, run_stages, save_results
from experiments.causal.stages import STAGES, stage_model
from experiments.causal.student import LoopConfig, MixerConfig, Stage, StageOptimConfig, chosen_layers
from experiments.data.packing import Epochs, make_batches
from experiments.data.tokenizers import save_tokenizer
from experiments.loop import flags, runs
from experiments.loop.fingerprints import check_inputs
from experiments.loop.mesh import MeshConfig, meshed
from experiments.loop.model_size import count_params
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.summary import Scores, Summary, table
from experiments.loop.train import Loss, Task, mean_of, sum_over
from experiments.vision.meaning import Meaning, save_meaning
from experiments.vision_language import presets
from experiments.vision_language.rows import Rows, learned_from
from experiments.vision_language.task import Prepared, evaluate, load_model, prepare
from zoo.models.frozen import thaw

_LOOKED_AT = 4  # batches by which distances are scaled


@dataclasses.dataclass(frozen=True)
class Config:
    """Whose attention becomes what, and how the student learns."""

    teacher: Annotated[str, flags.Positional]
    """A run of experiments.vlm."""
    pattern: str = "linear_attn"
    """What each layer's attention becomes, linear_attn or attn as it is, e.g. "attn linear_attn*3"; cycles."""
    init: Literal["mimic", "copy", "random"] = "mimic"
    """How the student starts. mimic: attention's maps are copied, the rest starts as if attention went on. copy: the
    rest starts as in Mamba-2. random: nothing is copied."""
    mixer: MixerConfig = MixerConfig()
    """Options of linear_attn; heads and biases are the teacher's."""
    layers: Stage = Stage(100, 1e-2)
    """Layer by layer, what is new."""
    qkv: Stage = Stage(100, 3e-3)
    """Layer by layer, also the maps of queries, keys and values."""
    hidden: Stage = Stage(0, 3e-3)
    """Block by block, the whole mixers."""
    logits: Stage = Stage(200, 2e-3)
    """End to end, the whole mixers."""
    warmup_fraction: float = 0.1
    """Share of a stage's steps that warm up."""
    train: LoopConfig = LoopConfig(batch_size=32, log_every=50, eval_every=1000, save_every=100)
    """How often to look, what to keep."""
    optim: StageOptimConfig = StageOptimConfig()
    """Optimiser and schedule."""
    threads: int = 4
    """Batches that are made at the same time, each by a thread."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    run_dir: str | None = None
    """Folder of the run. None: beside the teacher's, with a suffix of pattern and start."""

    def __post_init__(self):
        check_stages(self)
        if self.threads < 1:
            raise ValueError(f"--threads {self.threads}, expected at least 1")


# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("threads",)


class PicturePair(Pair):
    """A teacher that reads images, and its student."""

    blocks = "student.language.backbone.layers."

    def compare(self, batch: Mapping[str, Any]) -> list[zoo.Compared]:
        """The converted blocks on a batch."""
        given = {"images": batch["images"], "prompt_mask": batch["prompt"]}
        vectors, _ = self.teacher.inputs(batch["tokens"], batch["mask"], **given)
        options = {"mask": batch["mask"], "layer_inputs": vectors.get("layer_inputs")}
        return zoo.compare_layers(self.teacher.backbone, self.student.backbone, vectors["inputs_embeds"], **options)

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """What one of them says of each next token."""
        return model(batch["tokens"], batch["mask"], images=batch["images"], prompt_mask=batch["prompt"])

    def counted(self, batch: Mapping[str, Any]) -> Any:
        """All places that are there, those of images too, of rows that count."""
        return batch["mask"] * jnp.any(batch["weights"] > 0, axis=1, keepdims=True)


def measure(pair: PicturePair, batch: Mapping[str, Any], rngs: None) -> dict[str, Any]:
    """All distances of a student from its teacher, as sums, and over how many places they are."""
    counts = {"places": jnp.sum(pair.counted(batch)), "answers": jnp.sum(batch["weights"])}
    return counts | {name: distance(pair, batch) for name, distance in DISTANCES.items()}


class Evaluation:
    """What a model says of held-out questions."""

    def __init__(self, rows: Rows, batch_size: int):
        self.rows, self.batch_size = rows, batch_size

    def batches(self) -> list[dict[str, Any]]:
        """All rows, the last batch filled up with rows that count for nothing."""
        numbers = np.append(np.arange(len(self.rows)), np.full(-len(self.rows) % self.batch_size, -1))
        return [self.rows(some) for some in numbers.reshape(-1, self.batch_size)]

    def of_teacher(self, teacher: Any) -> Scores:
        """Nats a token of the answers, and how many are right, of each kind."""
        scores = evaluate(teacher, self.rows, self.batch_size)
        return {"nats": scores.pop("loss")} | scores

    def __call__(self, pair: PicturePair) -> Scores:
        """The same of a student, and its distances from its teacher."""
        pair = thaw(pair)
        sums = sum_over(pair, measure, self.batches())
        places, answers = sums.pop("places"), sums.pop("answers")
        means = {name: mean_of(total, answers if name == "kl" else places) for name, total in sums.items()}
        return self.of_teacher(pair.student) | means


class Distilled(NamedTuple):
    """A run that has ended."""

    student: Any
    rows: dict[str, Scores]
    """Right answers and distances on held-out questions: of the teacher, of a random student, seeded, after stages."""
    stopped: bool
    """Whether a signal ended it."""


def make_task(name: str, pair: PicturePair, prepared: Prepared, evaluation: Evaluation, config: Config) -> Task:
    """The task of one stage, from a pair on."""
    kind, rows, size = STAGES[name], prepared.rows[0], config.train.batch_size
    distance = DISTANCES[kind.loss]
    plan = Epochs(np.zeros(len(rows), int), [size], seed=config.train.seed + list(STAGES).index(name))

    def loss(pair: Any, batch: Mapping[str, Any], rngs: Any) -> Loss:
        counted = batch["weights"] if kind.loss == "kl" else pair.counted(batch)
        return Loss(distance(pair, batch), jnp.sum(counted))

    def held_out(pair: Any) -> Scores:
        found = evaluation(pair)
        return found | {"loss": found[kind.loss]}

    return Task(
        init=lambda rngs: stage_model(pair, kind),
        loss=loss,
        batches=iter(make_batches(lambda step: rows(plan(step)), threads=config.threads, prefetch=2 * config.threads)),
        evaluate=held_out,
        tokens_per_batch=size * rows.length,
    )


def default_run_dir(config: Config) -> Path:
    """Beside the teacher's run: its name, the pattern and the start."""
    teacher = Path(config.teacher)
    words = "".join(c if c.isalnum() else "-" for c in f"{config.pattern}-{config.init}")
    return teacher.with_name(f"{teacher.resolve().name}-{words}")


@locked
@meshed
def fit(config: Config, folder: Path) -> Distilled:
    """Distils in a folder, from where a run that was stopped there had come to.

    Raises:
      UsageError: teacher or folder are not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        runs.holds_run(config, folder, FREE)
        source = Path(config.teacher)
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"{source} holds no config.json, expected a run of experiments.vlm")
        taught = flags.load_config(presets.Config, source / "config.json")
        teacher: Any = load_model(source)[0]
        layers = chosen_layers(config.pattern, teacher.config)
        # Its own tokenizer lies in its folder; what it had started from need not be there any more.
        shape = dataclasses.replace(taught, init=str(source), vision_init=None, language_init=None)
        prepared = prepare(shape)
        options, seed = config.mixer.options, config.train.seed
        student = zoo.seed_from_attention(teacher, layers, config=options, init=config.init, rngs=nnx.Rngs(seed))
        check_inputs(folder, learned_from(prepared.data, prepared.tokenizer), config.train.allow_changed)
        runs.begin(config, folder)
    sizes = f"{count_params(teacher.config):,} parameters, the student {count_params(student.config):,}"
    print(f"{teacher.config.pattern} -> {student.config.pattern}: {sizes}; {folder}", flush=True)
    path, size = folder / RESULTS_FILE, config.train.batch_size
    found: dict[str, Scores] = json.loads(path.read_text())["rows"] if path.exists() else {}
    evaluation = Evaluation(prepared.rows[1], size)
    some = [prepared.rows[0](np.arange(i * size, (i + 1) * size) % len(prepared.rows[0])) for i in range(_LOOKED_AT)]
    pair: Any = make_pair(teacher, student, some, PicturePair)
    if "seeded" not in found:
        found["teacher"] = evaluation.of_teacher(teacher)
        found["random"] = evaluation(random_pair(pair, config))
        found["seeded"] = evaluation(pair)
        save_results(config, found, folder)
    pair, stopped = run_stages(
        config, pair, found, folder, lambda name, pair: make_task(name, pair, prepared, evaluation, config)
    )
    if stopped:
        return Distilled(pair.student, found, stopped=True)
    zoo.save_pretrained(pair.student, folder / "student")
    save_tokenizer(prepared.tokenizer, folder / "student")
    save_meaning(Meaning(prepared.preprocess.config, prepared.preprocess.size, ()), folder / "student")
    return Distilled(pair.student, found, stopped=False)


def main() -> int:
    """Distils, and shows a table of the stages."""
    config = flags.parse_one(Config, prog="python -m experiments.vlm distill", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    distilled = fit(config, folder)
    if distilled.stopped:
        return 0
    rows = {name: {k: Summary(v, None) for k, v in row.items()} for name, row in distilled.rows.items()}
    lines = ["on held-out questions:", *(f"  {line}" for line in table(rows))]
    show_end(folder, lines, "results.json; a folder for each stage, and the student's")
    return 0
