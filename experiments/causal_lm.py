"""Causal language modelling: any pattern of mixers, any text.

    python -m experiments.causal_lm tiny                                   # Mamba on Python's standard library, bytes
    python -m experiments.causal_lm tiny --model.pattern attn/mlp          # the same with a Transformer
    python -m experiments.causal_lm tiny --model.pattern m2/monarch        # with Monarch Mixer
    python -m experiments.causal_lm tiny --data.path my.txt --steps 2000   # your own text
    python -m experiments.causal_lm mamba-130m --data.path my.txt          # a published size, a BPE trained on the text
    python -m experiments.causal_lm tiny --init runs/causal_lm/tiny --data.path my.txt --optim.learning-rate 1e-3
    python -m experiments.causal_lm mamba-130m --init state-spaces/mamba-130m --data.path my.txt --steps 1000
                                                                           # a published model, trained on your text
    python -m experiments.causal_lm tiny --init runs/causal_lm/tiny --data.path my.txt --adapt.rank 8
                                                                           # LoRA: adapters of it alone
    python -m experiments.causal_lm tiny --init small --teacher runs/causal_lm/tiny
                                                                           # a pruned model learns from the whole one
    python -m experiments.causal_lm tiny --init runs/causal_lm/tiny --quantize.bits 2
                                                                           # trained on for weights of 2 bits
    python -m experiments.causal_lm tiny --teacher LARGE --modules.steps 100
                                                                           # first each block in the teacher's place

With --init a new run starts from the weights, the architecture and the tokenizer of another run, of a folder in a
published layout or of a name on the hub; optimiser, learning rate, data and number of steps are its own. The same
command again resumes the run where it was. `python -m experiments.sample RUN_DIR --prompt "def "` goes on with a text.
The first command reaches 2.191 bits/byte on held-out files of Python 3.11.7.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import jax
from flax import nnx

import ssm
import zoo
from experiments.causal import load
from experiments.causal.chat import keep_chat
from experiments.causal.directions import check_alike
from experiments.causal.flops import flops_per_token
from experiments.causal.module_wise import ModulesConfig, ModuleWise, check_modules
from experiments.causal.next_token import continued_loss, describe, next_token_loss
from experiments.causal.teaching import TaughtBatches, directed_loss, load_teacher, taught_loss
from experiments.data.corpus import Corpus, DataConfig, evaluation_batches, load_corpus, make_batches, make_lanes
from experiments.data.tokenizers import Tokenizer, save_tokenizer
from experiments.loop import flags, runs
from experiments.loop.adapting import AdaptConfig, adapted, check_start
from experiments.loop.few_bits import QuantizeConfig, check_bits, in_few_bits, say_codes
from experiments.loop.mesh import MeshConfig, check_length, current_mesh, meshed, on_mesh
from experiments.loop.metrics import last_evaluation
from experiments.loop.model_size import describe_size
from experiments.loop.optim import OptimConfig
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.starting import check_agreement, load_start, with_options
from experiments.loop.train import BatchIterator, Finished, LossFunction, Task, TrainConfig, mean_loss, train
from m2 import HyenaFilterConfig, M2Config, MonarchMLPConfig
from zoo.models.build import abstract
from zoo.stack.pattern import parse_pattern


@dataclasses.dataclass(frozen=True)
class Config:
    """A causal language model: its shape, its text, its training."""

    model: zoo.CausalLMConfig = zoo.CausalLMConfig()
    """Shape of the model."""
    data: DataConfig = DataConfig()
    """Text and tokens."""
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    adapt: AdaptConfig = AdaptConfig()
    """Adapters of --init, which stays as it is, rather than all of it."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Few bits that weights are read in, and the model is trained for; see `zoo.quantize`."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    init: str | None = None
    """A run, a published folder or a hub name to start from: its shape and tokenizer replace --model and
    --data.tokenizer, and flags that say otherwise are refused. --model.dropout, dtype, param-dtype, remat,
    remat-keeps and scan-layers may be said; a published model is trained in float32 unless they are."""
    teacher: str | None = None
    """A run, a published folder or a hub name with the same tokenizer: the model learns what this says of each next
    token, rather than what comes. For vocabularies or batches that are not large."""
    directions: float = 0.0
    """With --teacher, factor on how far what the mixers of each layer write (queries, keys and values, or what takes
    their place) and the hidden states are from its own, beside what it says (BiBERT). The models have equally many
    layers of the same width. 0: what it says alone."""
    modules: ModulesConfig = ModulesConfig()
    """Modules that first learn one by one in place of the teacher's (m2mKD)."""
    eval_batches: int | None = 50
    """Batches of held-out text an evaluation reads, spread evenly over it. None reads all of it."""
    prompt: str = "def "
    """Start of the sample that is printed at the end. Empty prints none."""
    run_dir: str | None = None
    """Folder of the run. None: runs/causal_lm/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        check_start(self.adapt, self.init)
        check_bits(self.quantize, self.adapt)
        check_modules(self.modules, self.teacher, self.adapt)
        if self.directions < 0:
            raise ValueError(f"--directions {self.directions}, expected at least 0")
        if self.directions and self.teacher is None:
            raise ValueError(f"--directions {self.directions} without --teacher: there is nothing to be like")
        if self.teacher is not None and self.train.carry_state:
            raise ValueError("--teacher with --train.carry-state: it reads each row from its start")


# Peak rates of the sizes: GPT-3's times five, as in the Mamba papers' recipes (arXiv:2312.00752, appendix E.2; the same
# for Mamba-2 and, at these widths, for Mamba-3).
_PUBLISHED_RATES = {
    **dict.fromkeys(("mamba-130m", "mamba2-130m", "mamba3-siso-187m", "mamba3-mimo-187m"), 3e-3),
    **dict.fromkeys(("mamba-370m", "mamba2-370m", "mamba3-siso-440m", "mamba3-mimo-440m"), 1.5e-3),
    **dict.fromkeys(("mamba-790m", "mamba2-780m", "mamba3-siso-880m", "mamba3-mimo-880m"), 1.25e-3),
    **dict.fromkeys(("mamba-1.4b", "mamba2-1.3b", "mamba3-siso-1.5b", "mamba3-mimo-1.5b"), 1e-3),
    **dict.fromkeys(("mamba-2.8b", "mamba2-2.7b"), 8e-4),
    # GPT-3's as they are: a choice of ours.
    "m2-gpt-145m": 6e-4,
    "m2-gpt-360m": 3e-4,
}

PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "Mamba of 0.5 M parameters on bytes: two minutes on two CPU cores, no downloads.",
        Config(
            model=zoo.CausalLMConfig(
                d_model=128,
                n_layers=4,
                pattern="mamba",
                mamba=ssm.MambaConfig(d_state=8),
                m2=M2Config(l_max=256, filter=HyenaFilterConfig(order=32)),
                attn=zoo.AttentionConfig(n_heads=4),
                monarch=MonarchMLPConfig(d_ff=360),
            ),
            data=DataConfig(tokenizer="bytes", seq_len=256),
            train=TrainConfig(steps=350, batch_size=8, eval_every=175, save_every=175),
            optim=OptimConfig(learning_rate=5e-3, warmup_steps=50),
        ),
    ),
} | {
    name: (
        f"The published shape of {name}, on your text in a BPE trained on it; for accelerators.",
        Config(
            model=model,
            data=DataConfig(tokenizer="bpe", bpe_vocab_size=model.vocab_size, seq_len=2048),
            train=TrainConfig(steps=4800, batch_size=256, eval_every=500, save_every=500),
            optim=OptimConfig(learning_rate=rate, warmup_steps=480, final_fraction=1e-5 / rate),
        ),
    )
    for name, rate in _PUBLISHED_RATES.items()
    for model in [cast(zoo.CausalLMConfig, zoo.presets[name])]
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("eval_batches", "prompt", "data.cache_dir", "data.skip_bad")


def make_task(config: Config, corpus: Corpus, init: zoo.CausalLM | None = None) -> Task:
    """The task of a configuration whose model.vocab_size is known.

    Args:
      init: a model to start from, or None.
    """
    seq_len, batch_size = config.data.seq_len, config.train.batch_size
    held_out = corpus.validation
    pattern = config.model.pattern
    words = parse_pattern(pattern, config.model.n_layers)
    mixers = {name for word in words for name in (*word.plain.mixers, word.plain.channel)}
    for mixer, reason in (
        ("attn", "attention's state grows with the text"),
        ("m2", "a long convolution's state grows with the text"),
        ("moe", "the balance of experts is not trained on rows that go on"),
    ):
        if config.train.carry_state and mixer in mixers:
            raise ValueError(f"--train.carry-state with --model.pattern {pattern!r}: {reason}")
    if config.train.carry_state and any(word.capacity for word in words):
        raise ValueError(f"--train.carry-state with --model.pattern {pattern!r}: a router chooses among whole rows")
    runs.check_filters(config.model, seq_len)

    def bits_per_nat(stream):
        return stream.n_tokens / stream.n_bytes / math.log(2)

    def evaluate(model):
        batches = evaluation_batches(held_out, batch_size=batch_size, seq_len=seq_len, max_batches=config.eval_batches)
        loss = mean_loss(model, next_token_loss, batches)
        return {"loss": loss} | describe(loss, bits_per_nat(held_out))

    batches = _batches(config, corpus, seed=config.train.seed)
    loss: LossFunction = next_token_loss
    if config.teacher is not None:
        teacher = load_teacher(config.teacher, corpus.tokenizer, config.model.vocab_size)
        if config.directions:
            check_alike(config.teacher, teacher, abstract(config.model) if init is None else init)
        batches = TaughtBatches(batches, teacher, directions=config.directions > 0)
        loss = functools.partial(directed_loss, factor=config.directions) if config.directions else taught_loss
    return Task(
        init=lambda rngs: zoo.CausalLM(config.model, rngs=rngs) if init is None else init,
        loss=loss,
        batches=batches,
        evaluate=evaluate,
        describe=(
            functools.partial(describe, bits_per_nat=bits_per_nat(corpus.train))
            if config.teacher is None
            else lambda loss: {}
        ),
        carried_loss=continued_loss,
        init_carry=lambda model, rows: model.init_state(rows),
        tokens_per_batch=batch_size * seq_len,
        flops_per_token=flops_per_token(config.model, seq_len),
    )


def _batches(config: Config, corpus: Corpus, *, seed: int) -> BatchIterator:
    make = make_lanes if config.train.carry_state else make_batches
    return make(corpus.train, batch_size=config.train.batch_size, seq_len=config.data.seq_len, seed=seed)


def module_wise(config: Config, corpus: Corpus, task: Task) -> ModuleWise | None:
    """What trains the model's modules one by one before the task, where that is asked for.

    Raises:
      ValueError: the model cannot stand in its teacher's places.
    """
    if not config.modules.steps:
        return None
    assert config.teacher is not None  # see `check_modules`
    teacher = load_teacher(config.teacher, corpus.tokenizer, config.model.vocab_size)
    student = task.init(nnx.Rngs(params=jax.random.key(config.train.seed)))
    return ModuleWise(config.modules, teacher, cast(zoo.CausalLM, student))


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Sets a vocabulary that is not known yet to the tokenizer's.

    Raises:
      ValueError: the tokenizer has ids that the model has no row for.
    """
    return dataclasses.replace(
        config, model=runs.fit_vocabulary(config.model, tokenizer.vocab_size, config.data.tokenizer)
    )


def default_run_dir(config: Config) -> Path:
    """runs/causal_lm/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "causal_lm", FREE)


def load_run(
    folder: str | Path, *, step: Any = "latest", allow_nonfinite: bool = False
) -> tuple[zoo.CausalLM, Tokenizer, Config]:
    """The model, tokenizer and configuration of a run, for sampling or a notebook. Changes nothing in the folder.

    Args:
      folder: a run's folder.
      step: a checkpoint's step, "latest" or "best".

    Raises:
      FileNotFoundError: no run, or no checkpoint, there.
      ValueError: a checkpoint that does not fit the configuration.
    """
    folder = Path(folder)
    model, tokenizer, *_ = load.load_run(folder, step=step, allow_nonfinite=allow_nonfinite)
    config = flags.load_config(Config, folder / "config.json")
    return model, tokenizer, dataclasses.replace(config, model=model.config)


def start_from(config: Config, kept: Path | None, given: Collection[str]) -> tuple[Config, zoo.CausalLM | None]:
    """Takes model and tokenizer from --init, where there is one; None is a fresh model.

    Args:
      kept: the run's folder, where it goes on.
      given: the fields that flags name.

    Raises:
      ValueError: flags say otherwise.
    """
    if config.init is None:
        return config, None
    named = config.data.tokenizer if "data.tokenizer" in given else None
    how: dict[str, Any] = {"flag": "--data.tokenizer", "masters": config.quantize.bits > 0}
    one = functools.partial(load.load_causal, tokenizer=named, dtype="float32", **how)
    model, _, _, spec = load_start(config.init, kept, one)
    say_codes(config.init, model, config.adapt)
    model = with_options(model, config.model, given)
    if kept is None:
        check_agreement(config.init, config.model, model.config, given)
    data = dataclasses.replace(config.data, tokenizer=spec)
    return dataclasses.replace(config, model=model.config, data=data), model


@locked
@meshed
def fit(config: Config, folder: Path, *, given: Collection[str] = ()) -> tuple[Finished, Corpus]:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Args:
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.

    Raises:
      UsageError: the text, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        check_length(current_mesh(), config.data.seq_len)
        kept = runs.resumed(config, folder, FREE)
        started, init = start_from(config, kept, given)
        corpus = load_corpus(started.data, kept)
        fitted = fit_vocabulary(started, corpus.tokenizer)
        task = make_task(fitted, corpus, init)
        modules = module_wise(fitted, corpus, task)
        how = {"steps": config.train.steps, "seed": config.train.seed}
        task, save_base = adapted(task, config.adapt, folder, config.optim, **how)
        fresh = init is None
        task, save_bits = in_few_bits(task, config.quantize, folder, seed=config.train.seed, fresh=fresh)
        if kept is None:
            keep_chat(started.data.tokenizer, folder, corpus.tokenizer, fitted.model.vocab_size)
        save_tokenizer(corpus.tokenizer, folder)
        runs.begin(config, folder, fitted.model, corpus.inputs())
    print(describe_size(fitted.model, folder), flush=True)
    save_base()
    save_bits()
    record = dataclasses.asdict(fitted)
    if modules is not None:
        batches = _batches(config, corpus, seed=config.train.seed + 1)
        learned = modules.learn(task, batches, config.train, config.optim, folder, record)
        if learned.stopped:
            return learned, corpus
        task = task._replace(init=lambda rngs: learned.model)
    return train(task, config.train, config.optim, folder, record=record), corpus


def main() -> int:
    """Trains, evaluates and samples."""
    config = flags.parse(PRESETS, prog="python -m experiments.causal_lm", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    finished, corpus = fit(config, folder, given=flags.given(Config))
    if finished.stopped:
        return 0
    step = int(finished.state.step)
    lines = []
    if last := last_evaluation(folder):
        lines.append(f"held-out text: {last['bits_per_byte']:.3f} bits/byte after {last['step']} steps")
    if config.prompt:
        with on_mesh(config.mesh):
            text = sample(finished.model, corpus.tokenizer, config.prompt)
        lines += ["--- sample " + "-" * 49, text, "-" * 60]
    show_end(folder, lines, "curves.png, metrics.jsonl, tensorboard, checkpoints")
    print(flags.as_called(f'more text:  python -m experiments.sample {folder} --prompt "class "'))
    print(f"train on:   the same command with --steps {2 * max(step, config.train.steps)} resumes from step {step}")
    return 0


def sample(model: zoo.CausalLM, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int = 200) -> str:
    """A prompt and its continuation, drawn at temperature 0.8."""
    ids = [tokenizer.eot, *tokenizer.encode(prompt).tolist()]
    sampling = zoo.Sampling(temperature=0.8, top_p=0.95)
    tokens = zoo.generate(model, ids, max_new_tokens, sampling=sampling, eos_id=tokenizer.eot, key=jax.random.key(0))
    return tokenizer.decode(tokens[0].tolist()).rstrip()


if __name__ == "__main__":
    flags.run(main)
