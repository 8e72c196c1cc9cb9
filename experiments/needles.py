"""Where in a long document a bi-encoder still finds a passage: nDCG@10 by its depth and the document's length.

    python -m experiments.needles tiny --init runs/retrieve/tiny         # 128 to 512 tokens, CPU minutes
    python -m experiments.needles small --data.path headlines --init runs/retrieve/small   # 256 to 4096 tokens
    python -m experiments.needles tiny                                   # a new encoder: harder
    python -m experiments.needles tiny --model.pattern attn/mlp --beside runs/needles/tiny
    python -m experiments.needles tiny --loss orthogonal --train.batch-size 1

A document is filler, passages of other documents end to end, with one relevant passage, the needle, somewhere inside:
anywhere in training, at fixed depths in evaluation. Its query is what asks for the needle. Filler comes from documents
that are nobody's needle, and at all depths a needle lies in the same filler. needles.json and needles.png in the run's
folder hold the curves; --beside draws those of other runs into the same plot.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import zoo
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import Tokenizer, save_tokenizer
from experiments.encoders.encoder_inputs import Encoded, Texts, collate, encode
from experiments.encoders.load import load_encoder
from experiments.encoders.masked_lm import small_encoder
from experiments.loop import flags, runs
from experiments.loop.model_size import count_params
from experiments.loop.optim import OptimConfig
from experiments.loop.train import Finished, Task, TrainConfig, train
from experiments.retrieval.beir import Collection, RetrievalData, load_collections, side_of
from experiments.retrieval.bi_encoder import Objective, retrieval_loss
from experiments.retrieval.embed import embed_encoded, longest, make_rows, normalized
from experiments.retrieval.ranking import DEPTH, as_run, measure, search
from experiments.retrieval.retrieve import encoder_config, mean_over, start_from, training_texts
from zoo.layers.pooling import Pool

RESULTS, PLOT = "needles.json", "needles.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """A bi-encoder that looks for needles: its shape, its texts, how they are hidden."""

    model: zoo.EncoderConfig = zoo.EncoderConfig()
    """Shape of the encoder. vocab_size 0 takes the tokenizer's."""
    data: RetrievalData = RetrievalData()
    """Queries and documents; the beginning of a document is its passage."""
    objective: Objective = Objective()
    """What is learned, without a teacher."""
    tokenizer: str = "wordpiece"
    """wordpiece or bpe, trained on the training texts; bytes; or a tokenizer.json, a folder or hub repository with
    one."""
    vocab_size: int = 8192
    """At most this many ids in a tokenizer that is trained here."""
    pool: Pool | None = None
    """A text's vector. None: as --init has it, or the mean."""
    pooler: bool = False
    """Whether a new linear map and tanh follow."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of the documents in evaluation."""
    train_lengths: tuple[int, ...] = ()
    """Tokens of the documents in training: each batch has one of these at random. Empty: the same. Documents that are
    little but their needle teach a new encoder what answers what; from long ones alone it learns nothing at first."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle begins in evaluation: 0 first thing, 1 last."""
    needle_len: int = 64
    """Most tokens of a passage."""
    max_query_len: int = 32
    """Most tokens of a query."""
    filler_share: float = 0.4
    """Share of the documents that are filler, chosen by a hash."""
    eval_queries: int = 100
    """Queries of an evaluation, and documents that are searched for each depth and length."""
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep. batch_size counts queries."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    init: str | None = None
    """A run, a published folder or a hub name to go on from."""
    eval_tokens: int = 16384
    """Positions in a batch of an evaluation."""
    beside: tuple[str, ...] = ()
    """Folders of other runs whose curves are drawn too."""
    run_dir: str | None = None
    """Folder of the run. None: runs/needles/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        if not self.lengths or min(self.lengths + self.train_lengths) < self.needle_len + 2:
            shortest = min(self.lengths + self.train_lengths, default=0)
            raise ValueError(
                f"a document of {shortest} tokens, expected room for needle_len={self.needle_len} and 2 more"
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}, expected numbers from 0 to 1")
        if not 0 < self.filler_share < 1:
            raise ValueError(f"filler_share={self.filler_share}, expected 0 < filler_share < 1")
        for name in ("needle_len", "eval_queries", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.objective.teacher is not None or self.objective.mine != "random":
            raise ValueError("needles are learned from pairs: expected neither --teacher nor --mine")

    @property
    def trained_at(self) -> tuple[int, ...]:
        """Lengths of training."""
        return self.train_lengths or self.lengths


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "An encoder of 0.8 M parameters, functions of Python's standard library in 128 to 512 tokens: CPU minutes.",
        Config(
            model=encoder_config(small_encoder(96, 3, 512)),
            vocab_size=4096,
            lengths=(128, 256, 512),
            train_lengths=(34, 64, 128, 256),
            needle_len=32,
            train=TrainConfig(steps=400, batch_size=16, eval_every=200, save_every=200),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
        ),
    ),
    "small": (
        "An encoder of about 2 M parameters, documents of 256 to 4096 tokens: for --data.path headlines.",
        Config(
            model=encoder_config(small_encoder(128, 4, 4096)),
            objective=Objective(mini_batch=8),
            train_lengths=(66, 256, 1024, 4096),
            train=TrainConfig(steps=600, batch_size=16, eval_every=200, save_every=200),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=60),
        ),
    ),
}

# Fields that may change between two starts of one run, besides those of every experiment.
FREE = ("lengths", "depths", "eval_queries", "eval_tokens", "beside", "objective.mini_batch")


class Needles(NamedTuple):
    """Passages to find, and what hides them."""

    queries: list[Encoded]
    passages: list[np.ndarray]
    """(n,) int32 tokens each, without [CLS] and [SEP]."""
    answers: list[list[int]]
    """The passages that answer each query; at least one."""
    filler: list[np.ndarray]


def find_needles(
    collections: Sequence[Collection],
    split: str,
    tokenizer: Tokenizer,
    *,
    needle_len: int,
    max_query_len: int,
    filler_share: float,
    n_queries: int | None = None,
) -> Needles:
    """The needles and the filler of a split. A query with an answer in the filler is left out.

    Args:
      n_queries: at most so many queries, always the same ones.

    Raises:
      ValueError: there are not enough documents for both.
    """
    texts: dict[tuple[int, str], str] = {}  # every answer of the split
    asked: list[tuple[str, list[tuple[int, str]]]] = []
    for number, one in enumerate(collections):
        for query, grades in one.qrels.get(split, {}).items():
            names = [(number, name) for name, grade in grades.items() if grade > 0]
            texts |= {name: one.documents[name[1]] for name in names}
            asked.append((one.queries[query], names))
    shares = {"filler": filler_share, "needle": 1 - filler_share}
    hidden = {name for name in texts if side_of(f"filler {name[1]}", shares) == "filler"}
    asked = [(query, names) for query, names in asked if not hidden & set(names)]
    if n_queries is not None and len(asked) > n_queries:
        asked = [asked[i] for i in sorted(np.random.default_rng(0).permutation(len(asked))[:n_queries])]
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, names in asked for name in names))}

    def tokens(names):
        encoded = encode(tokenizer, [texts[name] for name in names], max_len=needle_len + 2)
        return [text.tokens[1:-1] for text in encoded]

    filler = [piece for piece in tokens(sorted(hidden)) if len(piece)]
    if len(rows) < 2 or not filler:
        raise ValueError(f"{len(rows)} needles and {len(filler)} fillers in the {split} split; expected more documents")
    return Needles(
        encode(tokenizer, [query for query, _ in asked], max_len=max_query_len),
        tokens(rows),
        [[rows[name] for name in names] for _, names in asked],
        filler,
    )


def haystack(
    needle: np.ndarray,
    filler: Sequence[np.ndarray],
    special: SpecialTokens,
    *,
    length: int,
    depth: float,
    random: np.random.Generator,
) -> Encoded:
    """A document of `length` tokens with a needle in it, [CLS] filler needle filler [SEP].

    Args:
      needle: its tokens.
      filler: passages, drawn with replacement until the document is full.
      special: what to put around it.
      length: of the whole.
      depth: the share of the filler that stands before the needle.
      random: draws the filler, the same whatever the depth is.
    """
    room = length - 2 - len(needle)
    pieces, n = [], 0
    while n < room:
        pieces.append(filler[int(random.integers(len(filler)))])
        n += len(pieces[-1])
    hay = np.concatenate([np.zeros(0, np.int32), *pieces])[:room]
    before = round(depth * room)
    parts = [[special.cls], hay[:before], needle, hay[before:], [special.sep]]
    tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
    return Encoded(tokens, np.zeros(length, np.int32))


def needle_batch(
    needles: Needles, queries: Texts, rows: np.ndarray, random: np.random.Generator, *, length: int, n_negatives: int
) -> tuple[Batch, list[Encoded | None]]:
    """The batch of some queries, as `retrieval.bi_encoder` takes it, but for the documents, b k of them in order.

    Args:
      needles: of the training split.
      queries: theirs, in rows.
      rows: which queries; -1 is an empty row.
      random: draws documents, their filler, and where the needle is in it.
      length: of the documents.
      n_negatives: documents for each query whose needle does not answer it.
    """
    d_ids = np.full((len(rows), 1 + n_negatives), -1, np.int32)
    answers = np.full((len(rows), max(map(len, needles.answers))), -1, np.int32)
    for i in np.flatnonzero(rows >= 0):
        known = needles.answers[rows[i]]
        answers[i, : len(known)] = known
        others = np.setdiff1d(np.arange(len(needles.passages)), known) if n_negatives else np.zeros(0, int)
        chosen = [known[random.integers(len(known))], *random.permutation(others)[:n_negatives]]
        d_ids[i, : len(chosen)] = chosen
    documents = [
        haystack(
            needles.passages[document],
            needles.filler,
            queries.special,
            length=length,
            depth=random.random(),
            random=random,
        )
        if document >= 0
        else None
        for document in d_ids.reshape(-1)
    ]
    q = queries(rows)
    return {"q_tokens": q["tokens"], "q_mask": q["mask"], "d_ids": d_ids, "answers": answers}, documents


def hunt(
    model: Any, needles: Needles, special: SpecialTokens, config: Config, *, length: int, depth: float | None
) -> dict[str, float]:
    """How well a model finds needles at one depth (None: at random ones) in documents of one length."""
    documents = []
    for row, passage in enumerate(needles.passages):
        random = np.random.default_rng((row, length))
        where = np.random.default_rng((row, length, 1)).random() if depth is None else depth
        documents.append(haystack(passage, needles.filler, special, length=length, depth=where, random=random))
    embed = functools.partial(embed_encoded, model, special=special, batch_tokens=config.eval_tokens, progress=True)
    q, d = embed(needles.queries, max_len=config.max_query_len), embed(documents, max_len=length)
    if config.objective.score == "cosine":
        q, d = normalized(q), normalized(d)
    names = [str(i) for i in range(max(len(q), len(d)))]
    qrels = {names[i]: {names[j]: 1 for j in known} for i, known in enumerate(needles.answers)}
    return measure(qrels, as_run(search(q, d, DEPTH), names[: len(q)], names))


def make_task(
    config: Config,
    trained: Needles,
    held_out: Needles,
    special: SpecialTokens,
    model: zoo.SequenceClassifierConfig,
    init: Any = None,
) -> Task:
    """The task of a configuration; its checkpoints are chosen by nDCG@10 at random depths, over the lengths."""
    batch_size, seed = config.train.batch_size, config.train.seed
    if config.objective.loss == "in-batch":
        if config.train.accumulate > 1:
            raise ValueError(
                "--train.accumulate with --loss in-batch; --mini-batch saves memory without changing the loss"
            )
        if batch_size == 1 and not config.objective.n_negatives:
            raise ValueError("--train.batch-size 1 with --loss in-batch and no --negatives: nothing to tell apart")
    plan = Epochs(np.zeros(len(trained.queries), int), [batch_size], seed=seed)

    n_negatives = config.objective.n_negatives
    queries = make_rows(trained.queries, special, model, config.max_query_len)

    def make(step: int) -> Batch:
        random = np.random.default_rng((seed % (1 << 64), 1, step))
        length = int(random.choice(config.trained_at))
        batch, documents = needle_batch(trained, queries, plan(step), random, length=length, n_negatives=n_negatives)
        d = collate(documents, special, length if model.mask_padding else longest(model) or length)
        shape = (batch_size, 1 + n_negatives, -1)
        return batch | {"d_tokens": d["tokens"].reshape(shape), "d_mask": d["mask"].reshape(shape)}

    def evaluate(current):
        results = mean_over([hunt(current, held_out, special, config, length=n, depth=None) for n in config.trained_at])
        return {"loss": 1 - results["ndcg@10"]} | results

    rows = batch_size * (1 + n_negatives)
    return Task(
        init=lambda rngs: zoo.SequenceClassifier(model, rngs=rngs) if init is None else init,
        loss=functools.partial(retrieval_loss, objective=config.objective),
        batches=iter(make_batches(make)),
        evaluate=evaluate,
        tokens_per_batch=int(rows * np.mean(config.trained_at)) + batch_size * config.max_query_len,
    )


def curves(model: Any, needles: Needles, special: SpecialTokens, config: Config) -> list[dict[str, float]]:
    """The measures at every length and depth."""
    return [
        {"length": length, "depth": depth} | hunt(model, needles, special, config, length=length, depth=depth)
        for length in config.lengths
        for depth in config.depths
    ]


def plot(folders: Sequence[Path]) -> Path:
    """Draws the curves of runs, a panel for each length, into the first one's folder.

    Raises:
      FileNotFoundError, ValueError: a folder has none.
    """
    from matplotlib.figure import Figure

    said = [read_results(folder) for folder in folders]
    lengths = sorted({point["length"] for one in said for point in one["curves"]})
    figure = Figure(figsize=(3.2 * len(lengths) + 0.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        for folder, one in zip(folders, said, strict=True):
            points = [(p["depth"], p["ndcg@10"]) for p in one["curves"] if p["length"] == length]
            panel.plot(
                *zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=f"{folder.name}: {one['label']}"
            )
        panel.set(title=f"{length:,} tokens", xlabel="depth of the needle", ylim=(0, 1.02))
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nDCG@10")
    panels[-1].legend(frameon=False, fontsize=8)
    path = folders[0] / PLOT
    figure.savefig(path, dpi=150)
    return path


def read_results(folder: Path) -> dict[str, Any]:
    """What a run has written.

    Raises:
      FileNotFoundError: nothing yet.
      ValueError: it is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS}: it holds no finished run of experiments.needles")
    try:
        said = json.loads(path.read_text())
        if not said["curves"] or not isinstance(said["label"], str):
            raise ValueError("no curves")
        return said
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def table(points: Sequence[dict[str, float]]) -> list[str]:
    """nDCG@10 and MRR@10, a line for each length, a column for each depth."""
    depths = sorted({point["depth"] for point in points})
    lines = [f"{'depth':>16}" + "".join(f"{depth:>8.2f}" for depth in depths) + f"{'mean':>8}"]
    for length in sorted({point["length"] for point in points}):
        for name, label in (("ndcg@10", "nDCG@10"), ("mrr@10", "MRR@10")):
            row = {point["depth"]: point[name] for point in points if point["length"] == length}
            numbers = "".join(f"{row[depth]:>8.3f}" for depth in depths) + f"{np.mean(list(row.values())):>8.3f}"
            lines.append(f"{length if label == 'nDCG@10' else '':>7}  {label:7}{numbers}")
    return lines


def default_run_dir(config: Config) -> Path:
    """runs/needles/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "needles", FREE)


def fit(config: Config, folder: Path) -> tuple[Finished, Needles, SpecialTokens]:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Returns:
      how it ended, the needles of the last evaluation, and the special tokens.

    Raises:
      UsageError: the texts, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        going_on = runs.holds_run(config, folder, FREE)
        for other in config.beside:
            read_results(Path(other))
        collections = load_collections(config.data)
        length = max(*config.lengths, *config.trained_at, config.max_query_len)
        started = start_from(
            config, training_texts(collections), folder if going_on else None, length=length, flag="--lengths"
        )
        special = special_tokens(started.tokenizer)
        find = functools.partial(
            find_needles,
            collections,
            tokenizer=started.tokenizer,
            needle_len=config.needle_len,
            max_query_len=config.max_query_len,
            filler_share=config.filler_share,
        )
        trained, held_out = find("train"), find("dev", n_queries=config.eval_queries)
        last = find("test", n_queries=config.eval_queries)
        task = make_task(config, trained, held_out, special, started.model, started.init)
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(started.tokenizer, folder)
        runs.save_model_config(started.model, folder)
        flags.save_config(config, folder / "config.json")
    print(f"{started.model.pattern}: {count_params(started.model):,} parameters; {folder}", flush=True)
    print(f"{len(trained.queries):,} needles to train on, {len(trained.filler):,} passages of filler", flush=True)
    return train(task, config.train, config.optim, folder, record=dataclasses.asdict(config)), last, special


def main() -> int:
    """Trains, and draws how well needles are found where."""
    config = flags.parse(PRESETS, prog="python -m experiments.needles", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    finished, needles, special = fit(config, folder)
    if finished.stopped:
        return 0
    points = curves(load_encoder(folder, step="best").model, needles, special, config)
    label = f"{finished.model.config.pattern}, {config.objective.loss}, batch {config.train.batch_size}"
    partial = folder / f"{RESULTS}.partial"
    partial.write_text(json.dumps({"label": label, "queries": len(needles.queries), "curves": points}, indent=2) + "\n")
    os.replace(partial, folder / RESULTS)
    with flags.usage_errors():
        path = plot([folder, *map(Path, config.beside)])
    print(f"{len(needles.queries)} test queries, {len(needles.passages)} documents of each length:")
    for line in table(points):
        print(line)
    print(f"run folder: {folder} ({RESULTS}, {path.name}, metrics.jsonl, checkpoints)")
    return 0


if __name__ == "__main__":
    flags.run(main)
