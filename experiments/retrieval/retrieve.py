"""Retrieval: queries and documents as vectors of one encoder, with any mixer, up to 32k tokens a document.

    python -m experiments.bert retrieve tiny                                   # docstring -> function, two minutes
    python -m experiments.bert retrieve tiny --init runs/bert/tiny             # from a pre-trained encoder
    python -m experiments.bert retrieve tiny --model.pattern attn/mlp          # the same with attention
    python -m experiments.bert retrieve small --data.path headlines            # a folder in BEIR's layout
    python -m experiments.bert retrieve small --train.batch-size 256 --mini-batch 16    # a large batch in small memory
    python -m experiments.bert retrieve small --loss orthogonal --train.batch-size 1    # pairs one by one
    python -m experiments.bert retrieve small --init MODEL --data.path headlines --zero-shot   # evaluation alone
    python -m experiments.bert retrieve small --data.loco-documents hazyresearch/LoCoV1-Documents
        --data.loco-queries hazyresearch/LoCoV1-Queries --max-doc-len 8192     # LoCoV1, task by task

Checkpoints are chosen by nDCG@10 on queries of the dev split; the last evaluation is on the test split, beside BM25,
and is written to results.json and run.trec in the run's folder. The same command again resumes. The first command
reaches nDCG@10 0.148 on functions of files that it has not seen (BM25: 0.296): without pre-training, 4,000 pairs teach
little.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import zoo
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import save_tokenizer
from experiments.encoders.load import load_encoder
from experiments.encoders.shapes import encoder_config, small_encoder
from experiments.loop import flags, runs
from experiments.loop.adapting import adapted
from experiments.loop.mesh import meshed
from experiments.loop.model_size import describe_size
from experiments.loop.optim import OptimConfig
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.train import Finished, Task, TrainConfig, train
from experiments.retrieval.beir import load_collections, overlap
from experiments.retrieval.bi_encoder import Objective, check_batches, retrieval_loss
from experiments.retrieval.embedder import load_embedder
from experiments.retrieval.pairs import Pairs, Prepared, Teaching, learn_from, prepare
from experiments.retrieval.ranking import mean_over, measure
from experiments.retrieval.results import RESULTS, evaluate, table
from experiments.retrieval.searches import searches
from experiments.retrieval.start import BiEncoderConfig, check_row_len, inputs, start_from, training_texts


@dataclasses.dataclass(frozen=True)
class Config(BiEncoderConfig):
    """An encoder of queries and documents: its shape, its texts, what it learns."""

    max_doc_len: int = 256
    """Most tokens of a document. A model whose positions or filters are shorter has them repeated."""
    zero_shot: bool = False
    """Whether to evaluate --init as it is, without training."""
    dev_queries: int | None = 500
    """Queries of an evaluation during training. None: all of the dev split."""
    dev_documents: int | None = 2000
    """Documents that it searches: the answers, and others at random. None: all."""
    run_dir: str | None = None
    """Folder of the run. None: runs/retrieve/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        super().__post_init__()
        check_row_len("max_doc_len", self.max_doc_len)
        for name in ("dev_queries", "dev_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1")
        if self.zero_shot and self.init is None:
            raise ValueError("--zero-shot, but no --init to evaluate")


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "An encoder of 0.8 M parameters finds functions of Python's standard library: two CPU minutes, no downloads.",
        Config(
            model=encoder_config(small_encoder(96, 3, 128)),
            vocab_size=4096,
            max_doc_len=128,
            train=TrainConfig(steps=300, batch_size=32, eval_every=150, save_every=150),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=30),
        ),
    ),
    "small": (
        "An encoder of about 2 M parameters, documents of 256 tokens: for --data.path headlines.",
        Config(
            model=encoder_config(small_encoder(128, 4, 512)),
            train=TrainConfig(steps=1500, batch_size=32, eval_every=250, save_every=250),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        ),
    ),
    "m2-bert": (
        "The recipe of M2-BERT's retrieval models, for --init with one: pairs one by one, 32 negatives each.",
        Config(
            objective=Objective(loss="orthogonal", negatives=32, mini_batch=4),
            max_query_len=2048,
            max_doc_len=2048,
            train=TrainConfig(steps=20_000, batch_size=1, eval_every=1000, save_every=1000),
            optim=OptimConfig(
                learning_rate=5e-6,
                warmup_steps=2000,
                schedule="linear",
                final_fraction=0.0,
                weight_decay=0.01,
                beta2=0.999,
            ),
        ),
    ),
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("dev_queries", "dev_documents", "eval_tokens", "objective.mini_batch")


def make_task(
    config: Config,
    prepared: Sequence[Prepared],
    special: SpecialTokens,
    model: zoo.SequenceClassifierConfig,
    init: Any = None,
    teaching: Teaching = Teaching(),
) -> Task:
    """The task of a configuration.

    Args:
      prepared: the collections in tokens.
      special: of the tokenizer.
      model: shape of the model, its vocabulary known.
      init: a model to go on from, or None.
      teaching: what a teacher says.
    """
    objective, batch_size = config.objective, config.train.batch_size
    check_batches(objective, config.train)
    pairs = Pairs(
        prepared,
        special,
        model,
        objective,
        max_query_len=config.max_query_len,
        max_doc_len=config.max_doc_len,
        teaching=teaching,
    )
    if not len(pairs):
        raise ValueError("there are no training pairs (no qrels/train.tsv?); --zero-shot evaluates without training")
    held_out = searches(prepared, "dev", n_queries=config.dev_queries, n_documents=config.dev_documents)
    if not held_out:
        raise ValueError(
            "there are no queries to choose a checkpoint by; give qrels/dev.tsv or a larger --data.dev-share"
        )
    seed = config.train.seed
    plan = Epochs(pairs.bucket, [batch_size] * len(pairs.documents.lengths), seed=seed)

    def make(step: int) -> Batch:
        return pairs(plan(step), np.random.default_rng((seed % (1 << 64), 1, step)))

    def evaluate_held_out(trained):
        found = (one.run(trained, special, config, max_doc_len=config.max_doc_len) for one in held_out)
        results = mean_over([measure(one.qrels, run) for one, run in zip(held_out, found, strict=True)])
        return {"loss": 1 - results["ndcg@10"]} | results

    return Task(
        init=lambda rngs: zoo.SequenceClassifier(model, rngs=rngs) if init is None else init,
        loss=functools.partial(retrieval_loss, objective=objective),
        batches=iter(make_batches(make)),
        evaluate=evaluate_held_out,
        tokens_per_batch=pairs.n_tokens() // plan.n_batches,
    )


def default_run_dir(config: Config) -> Path:
    """runs/retrieve/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "retrieve", FREE)


class Fitted(NamedTuple):
    """A trained run, and what it is evaluated on."""

    finished: Finished | None
    """None for --zero-shot."""
    model: Any
    """The model that is evaluated: the best checkpoint's."""
    prepared: list[Prepared]
    special: SpecialTokens


@locked
@meshed
def fit(config: Config, folder: Path, *, given: Collection[str] = ()) -> Fitted:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Args:
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.

    Raises:
      UsageError: the texts, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    length = max(config.max_query_len, config.max_doc_len)
    with flags.usage_errors():
        kept = runs.resumed(config, folder, FREE)
        collections = load_collections(config.data)
        width = 0
        if config.objective.loss == "prototype":
            teacher = load_embedder(config.objective.teacher or "")
            width = teacher.modules.width(teacher.model.config.d_model)
        texts = training_texts(collections)
        started = start_from(config, texts, kept, length=length, given=given)
        if width not in (0, started.model.d_model):
            started = start_from(config, texts, kept, length=length, n_outputs=width, given=given)
        special = special_tokens(started.tokenizer)
        lengths = {"max_query_len": config.max_query_len, "max_doc_len": config.max_doc_len}
        prepared = [prepare(one, started.tokenizer, **lengths) for one in collections]
        if not config.zero_shot:
            teaching = learn_from(config.objective, prepared, **lengths)
            task = make_task(config, prepared, special, started.model, started.init, teaching)
            how = {"steps": config.train.steps, "seed": config.train.seed}
            task, save_base = adapted(task, config.adapt, folder, config.optim, **how)
            save_tokenizer(started.tokenizer, folder)
        read = inputs(collections, started.tokenizer)
        runs.begin(config, folder, None if config.zero_shot else started.model, read)
    counts = {s: sum(len(one.qrels.get(s, {})) for one in collections) for s in ("train", "dev", "test")}
    print(describe_size(started.model, folder), flush=True)
    print(
        f"{sum(len(one.documents) for one in collections):,} documents; queries: "
        + ", ".join(f"{n:,} {split}" for split, n in counts.items()),
        flush=True,
    )
    if shared := sum(map(overlap, collections)):
        print(f"note: {shared:,} documents answer queries of both train and test, as the data says", flush=True)
    if config.zero_shot:
        return Fitted(None, started.init, prepared, special)
    save_base()
    finished = train(task, config.train, config.optim, folder, record=dataclasses.asdict(config))
    model = finished.model if finished.stopped else load_encoder(folder, step="best").model
    return Fitted(finished, model, prepared, special)


def main() -> int:
    """Trains and evaluates."""
    config = flags.parse(PRESETS, prog="python -m experiments.bert retrieve", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    fitted = fit(config, folder, given=flags.given(Config))
    finished = fitted.finished
    if finished is not None and finished.stopped:
        return 0
    results = evaluate(fitted.model, fitted.prepared, fitted.special, config, folder, max_doc_len=config.max_doc_len)
    heading = f"{results['queries']:,} {results['split']} queries, {results['documents']:,} documents searched:"
    show_end(folder, [heading, *table(results)], f"{RESULTS}, run.trec, metrics.jsonl, checkpoints")
    model = config.init if finished is None else folder
    print(flags.as_called(f"vectors:    python -m experiments.bert embed {model} texts.txt vectors.npy"))
    return 0


if __name__ == "__main__":
    flags.run(main)
