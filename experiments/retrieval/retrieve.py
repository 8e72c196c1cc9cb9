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
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import zoo
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from experiments.encoders.load import load_encoder
from experiments.encoders.masked_lm import check_lengths, reach, small_encoder
from experiments.loop import flags, runs
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.train import Finished, Task, TrainConfig, train
from experiments.retrieval.beir import Collection, RetrievalData, load_collections
from experiments.retrieval.bi_encoder import Objective, retrieval_loss
from experiments.retrieval.embed import embed_encoded, normalized
from experiments.retrieval.pairs import Pairs, Prepared, Teaching, ask_teacher, prepare, read_triples
from experiments.retrieval.ranking import DEPTH, Qrels, Run, as_run, bm25, measure, save_run, search
from zoo.layers.pooling import Pool

RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """An encoder of queries and documents: its shape, its texts, what it learns."""

    model: zoo.EncoderConfig = zoo.EncoderConfig()
    """Shape of the encoder. vocab_size 0 takes the tokenizer's."""
    data: RetrievalData = RetrievalData()
    """Queries, documents, and which answers which."""
    objective: Objective = Objective()
    """What is learned."""
    tokenizer: str = "wordpiece"
    """wordpiece or bpe, trained on the training texts; bytes; or a tokenizer.json, a folder or hub repository with
    one."""
    vocab_size: int = 8192
    """At most this many ids in a tokenizer that is trained here."""
    pool: Pool | None = None
    """A text's vector: of its first token, the mean, the last, or attention. None: as --init has it, or the mean."""
    pooler: bool = False
    """Whether a new linear map and tanh follow."""
    max_query_len: int = 32
    """Most tokens of a query; what is longer is cut."""
    max_doc_len: int = 256
    """Most tokens of a document. A model whose positions or filters are shorter has them repeated."""
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep. batch_size counts queries."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    init: str | None = None
    """A run, a published folder or a hub name to go on from: its shape and tokenizer replace --model and
    --tokenizer."""
    zero_shot: bool = False
    """Whether to evaluate --init as it is, without training."""
    dev_queries: int | None = 500
    """Queries of an evaluation during training. None: all of the dev split."""
    dev_documents: int | None = 2000
    """Documents that it searches: the answers, and others at random. None: all."""
    eval_tokens: int = 16384
    """Positions in a batch of an evaluation."""
    run_dir: str | None = None
    """Folder of the run. None: runs/retrieve/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        for name in ("max_query_len", "max_doc_len"):
            if getattr(self, name) < 3:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 3: [CLS], a token, [SEP]")
        for name in ("dev_queries", "dev_documents", "eval_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}, expected at least 1")
        if self.zero_shot and self.init is None:
            raise ValueError("--zero-shot, but no --init to evaluate")


def encoder_config(config: zoo.EncoderConfig) -> zoo.EncoderConfig:
    """The part of a model's configuration that any head has."""
    return zoo.EncoderConfig(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(zoo.EncoderConfig)}
    )


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


class Search(NamedTuple):
    """Queries of a collection and the documents that are searched for their answers."""

    prepared: Prepared
    qrels: Qrels
    documents: list[str]
    """Their ids."""

    def run(self, model: zoo.SequenceClassifier, special: SpecialTokens, config: Config) -> Run:
        """What a model finds."""
        one = self.prepared
        embed = functools.partial(embed_encoded, model, special=special, batch_tokens=config.eval_tokens, progress=True)
        q = embed([one.queries[one.query_rows[name]] for name in self.qrels], max_len=config.max_query_len)
        d = embed([one.documents[one.document_rows[name]] for name in self.documents], max_len=config.max_doc_len)
        if config.objective.score == "cosine":
            q, d = normalized(q), normalized(d)
        return as_run(search(q, d, DEPTH), list(self.qrels), self.documents)

    def bm25(self) -> Run:
        """What BM25 finds."""
        collection = self.prepared.collection
        texts = [collection.documents[name] for name in self.documents]
        found = bm25(texts, [collection.queries[name] for name in self.qrels])
        run = as_run(found, list(self.qrels), self.documents)
        return {query: {name: score for name, score in found.items() if score > 0} for query, found in run.items()}


def searches(
    prepared: Sequence[Prepared], split: str, *, n_queries: int | None = None, n_documents: int | None = None
) -> list[Search]:
    """The searches of a split, one for each collection that has it.

    Args:
      n_queries, n_documents: at most so many of each collection, always the same ones; judged documents are all there.
    """
    out = []
    for one in prepared:
        qrels = one.collection.qrels.get(split, {})
        if not qrels:
            continue
        random = np.random.default_rng(0)
        if n_queries is not None and len(qrels) > n_queries:
            names = list(qrels)
            qrels = {names[i]: qrels[names[i]] for i in sorted(random.permutation(len(names))[:n_queries])}
        documents = list(one.collection.documents)
        if n_documents is not None and len(documents) > n_documents:
            judged = dict.fromkeys(name for grades in qrels.values() for name in grades)
            others = [documents[i] for i in random.permutation(len(documents)) if documents[i] not in judged]
            documents = [*judged, *others[: max(0, n_documents - len(judged))]]
        out.append(Search(one, qrels, documents))
    return out


def mean_over(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over collections."""
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


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
    if objective.loss == "in-batch" and config.train.accumulate > 1:
        raise ValueError(
            f"--train.accumulate {config.train.accumulate} with --loss in-batch, whose queries compete for the whole "
            "batch; --mini-batch saves memory without changing the loss"
        )
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
    if objective.loss == "in-batch" and objective.n_negatives == 0 and batch_size < 2:
        raise ValueError(
            f"--train.batch-size {batch_size} with --loss in-batch and no --negatives: nothing to tell apart"
        )
    held_out = searches(prepared, "dev", n_queries=config.dev_queries, n_documents=config.dev_documents)
    if not held_out:
        raise ValueError(
            "there are no queries to choose a checkpoint by; give qrels/dev.tsv or a larger --data.dev-share"
        )
    seed = config.train.seed
    plan = Epochs(pairs.bucket, [batch_size] * len(pairs.documents.lengths), seed=seed)

    def make(step: int) -> Batch:
        return pairs(plan(step), np.random.default_rng((seed % (1 << 64), 1, step)))

    def evaluate(trained):
        results = mean_over([measure(one.qrels, one.run(trained, special, config)) for one in held_out])
        return {"loss": 1 - results["ndcg@10"]} | results

    return Task(
        init=lambda rngs: zoo.SequenceClassifier(model, rngs=rngs) if init is None else init,
        loss=functools.partial(retrieval_loss, objective=objective),
        batches=iter(make_batches(make)),
        evaluate=evaluate,
        tokens_per_batch=pairs.n_tokens() // plan.n_batches,
    )


def learn_from(config: Config, prepared: Sequence[Prepared]) -> Teaching:
    """Asks the teacher, where there is one: a model, or a table of scores."""
    teacher = config.objective.teacher
    if teacher is None:
        return Teaching()
    if config.objective.loss == "margin-mse" and Path(teacher).is_file():
        return read_triples(Path(teacher), prepared)
    return ask_teacher(teacher, prepared, max_query_len=config.max_query_len, max_doc_len=config.max_doc_len)


class Started(NamedTuple):
    """What training starts from."""

    model: zoo.SequenceClassifierConfig
    init: zoo.SequenceClassifier | None
    tokenizer: Tokenizer


def start_from(
    config: Any,
    texts: Sequence[str],
    folder: Path | None,
    *,
    length: int,
    flag: str = "--max-doc-len",
    n_outputs: int = 0,
) -> Started:
    """Model and tokenizer of a configuration: those of --init, or new ones.

    Args:
      config: has init, model, tokenizer, vocab_size, pool, pooler, train.
      texts: what a new tokenizer is trained on.
      folder: a run whose tokenizer is used again, or None.
      length: the longest row that must be read.
      flag: what asks for it, for errors.
      n_outputs: width of a linear map behind the vectors, 0 for none.
    """
    head = {"n_labels": n_outputs, "pool": config.pool or "mean", "pooler": config.pooler}
    if config.init is None:
        tokenizer = load_tokenizer(config.tokenizer, texts, config.vocab_size, folder)
        needed = special_tokens(tokenizer).vocab_size
        encoder = runs.fit_vocabulary(config.model, needed, config.tokenizer)
        check_lengths(encoder, length, flag)
        fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(zoo.EncoderConfig)}
        return Started(zoo.SequenceClassifierConfig(**fields, **head), None, tokenizer)
    model, tokenizer, _ = load_encoder(config.init)
    if isinstance(model, zoo.SequenceClassifier) and config.pool in (None, model.config.pool):
        head = {"n_labels": n_outputs}  # it keeps what pools its rows
    rngs = nnx.Rngs(params=jax.random.key(config.train.seed))
    init = reach(zoo.with_head(model, zoo.SequenceClassifierConfig, rngs=rngs, **head), length)
    return Started(init.config, init, tokenizer)


def default_run_dir(config: Config) -> Path:
    """runs/retrieve/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "retrieve", FREE)


def training_texts(collections: Sequence[Collection]) -> list[str]:
    """The queries and documents of the training split."""
    texts = []
    for one in collections:
        train = one.qrels.get("train", {})
        texts += [one.queries[name] for name in train]
        texts += [one.documents[name] for name in dict.fromkeys(name for grades in train.values() for name in grades)]
    return texts


class Fitted(NamedTuple):
    """A trained run, and what it is evaluated on."""

    finished: Finished | None
    """None for --zero-shot."""
    model: Any
    """The model that is evaluated: the best checkpoint's."""
    prepared: list[Prepared]
    special: SpecialTokens


def fit(config: Config, folder: Path) -> Fitted:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Raises:
      UsageError: the texts, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    length = max(config.max_query_len, config.max_doc_len)
    with flags.usage_errors():
        going_on = runs.holds_run(config, folder, FREE)
        collections = load_collections(config.data)
        width = 0
        if config.objective.loss == "prototype":
            width = load_encoder(config.objective.teacher or "").model.config.d_model
        texts = training_texts(collections)
        started = start_from(config, texts, folder if going_on else None, length=length)
        if width not in (0, started.model.d_model):
            started = start_from(config, texts, folder if going_on else None, length=length, n_outputs=width)
        special = special_tokens(started.tokenizer)
        lengths = {"max_query_len": config.max_query_len, "max_doc_len": config.max_doc_len}
        prepared = [prepare(one, started.tokenizer, **lengths) for one in collections]
        if not config.zero_shot:
            teaching = learn_from(config, prepared)
            task = make_task(config, prepared, special, started.model, started.init, teaching)
        folder.mkdir(parents=True, exist_ok=True)
        flags.save_config(config, folder / "config.json")
    counts = {s: sum(len(one.qrels.get(s, {})) for one in collections) for s in ("train", "dev", "test")}
    print(f"{started.model.pattern}: {count_params(started.model):,} parameters; {folder}", flush=True)
    print(
        f"{sum(len(one.documents) for one in collections):,} documents; queries: "
        + ", ".join(f"{n:,} {split}" for split, n in counts.items()),
        flush=True,
    )
    if shared := sum(map(overlap, collections)):
        print(f"note: {shared:,} documents answer queries of both train and test, as the data says", flush=True)
    if config.zero_shot:
        return Fitted(None, started.init, prepared, special)
    save_tokenizer(started.tokenizer, folder)
    runs.save_model_config(started.model, folder)
    finished = train(task, config.train, config.optim, folder, record=dataclasses.asdict(config))
    model = finished.model if finished.stopped else load_encoder(folder, step="best").model
    return Fitted(finished, model, prepared, special)


def overlap(collection: Collection) -> int:
    """How many documents answer queries of both train and test."""
    sides = [
        {name for grades in collection.qrels.get(split, {}).values() for name, grade in grades.items() if grade > 0}
        for split in ("train", "test")
    ]
    return len(sides[0] & sides[1])


def evaluate(model: Any, prepared: Sequence[Prepared], special: SpecialTokens, config: Config, folder: Path) -> dict:
    """The last evaluation, written to results.json and run.trec: on the test split, or on dev where there is none.

    Returns:
      {"split", "queries", "documents", "model": measures, "bm25": measures, "tasks": the same for each}.
    """
    split = next((s for s in ("test", "dev") if any(one.collection.qrels.get(s) for one in prepared)), None)
    if split is None:
        raise flags.UsageError("there are neither test nor dev queries to evaluate on")
    tasks: dict[str, dict[str, Any]] = {}
    whole: Run = {}
    for one in searches(prepared, split):
        run = one.run(model, special, config)
        whole |= run
        tasks[one.prepared.collection.name] = {
            "queries": len(one.qrels),
            "documents": len(one.documents),
            "model": measure(one.qrels, run),
            "bm25": measure(one.qrels, one.bm25()),
        }
    results = {
        "split": split,
        "queries": sum(task["queries"] for task in tasks.values()),
        "documents": sum(task["documents"] for task in tasks.values()),
        "model": mean_over([task["model"] for task in tasks.values()]),
        "bm25": mean_over([task["bm25"] for task in tasks.values()]),
        "tasks": tasks,
    }
    save_run(whole, folder / "run.trec")
    partial = folder / f"{RESULTS}.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, folder / RESULTS)
    return results


def table(results: Mapping[str, Any]) -> list[str]:
    """The results, for people: a line for the model, one for BM25, and two for each task where there are several."""
    names = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@1": "R@1", "recall@10": "R@10", "recall@100": "R@100"}
    tasks = results["tasks"] if len(results["tasks"]) > 1 else {}
    width = max(map(len, [*tasks, "mean"]))
    lines = [" " * (width + 8) + "".join(f"{label:>9}" for label in names.values())]
    for task, values in {**tasks, "mean" if tasks else results["split"]: results}.items():
        for who in ("model", "bm25"):
            numbers = "".join(f"{values[who][name]:>9.3f}" for name in names)
            lines.append(f"{task if who == 'model' else '':{width}}  {who:<6}{numbers}")
    return lines


def main() -> int:
    """Trains and evaluates."""
    config = flags.parse(PRESETS, prog="python -m experiments.bert retrieve", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    fitted = fit(config, folder)
    finished = fitted.finished
    if finished is not None and finished.stopped:
        return 0
    results = evaluate(fitted.model, fitted.prepared, fitted.special, config, folder)
    print(f"{results['queries']:,} {results['split']} queries, {results['documents']:,} documents searched:")
    for line in table(results):
        print(line)
    print(f"run folder: {folder} ({RESULTS}, run.trec, metrics.jsonl, checkpoints)")
    model = config.init if finished is None else folder
    print(f"vectors:    python -m experiments.bert embed {model} texts.txt vectors.npy")
    return 0


if __name__ == "__main__":
    flags.run(main)
