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
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from experiments.data.packing import Batch, Epochs, make_batches
from experiments.data.special_tokens import SpecialTokens, special_tokens
from experiments.data.tokenizers import save_tokenizer
from experiments.encoders.encoder_inputs import collate
from experiments.encoders.lengths import longest
from experiments.encoders.load import load_encoder
from experiments.encoders.shapes import encoder_config, small_encoder
from experiments.loop import flags, runs
from experiments.loop.adapting import adapted
from experiments.loop.distributed import first_before_others
from experiments.loop.mesh import meshed
from experiments.loop.model_size import describe_size
from experiments.loop.optim import OptimConfig
from experiments.loop.run_lock import locked
from experiments.loop.run_page import show_end
from experiments.loop.train import Finished, Task, TrainConfig, train
from experiments.retrieval.beir import RetrievalData, load_collections
from experiments.retrieval.bi_encoder import Objective, check_batches, retrieval_loss
from experiments.retrieval.embed import make_rows
from experiments.retrieval.haystacks import Needles, find_needles, hunt, needle_batch
from experiments.retrieval.needle_curves import RESULTS, plot, read_results, save_results, table
from experiments.retrieval.ranking import mean_over
from experiments.retrieval.start import BiEncoderConfig, inputs, start_from, training_texts


@dataclasses.dataclass(frozen=True)
class Config(BiEncoderConfig):
    """A bi-encoder that looks for needles: its shape, its texts, how they are hidden."""

    data: RetrievalData = RetrievalData()
    """Queries and documents; the beginning of a document is its passage."""
    objective: Objective = Objective()
    """What is learned, without a teacher."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of the documents in evaluation."""
    train_lengths: tuple[int, ...] = ()
    """Tokens of the documents in training: each batch has one of these at random. Empty: the same. Documents that are
    little but their needle teach a new encoder what answers what; from long ones alone it learns nothing at first."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle begins in evaluation: 0 first thing, 1 last."""
    needle_len: int = 64
    """Most tokens of a passage."""
    filler_share: float = 0.4
    """Share of the documents that are filler, chosen by a hash."""
    eval_queries: int = 100
    """Queries of an evaluation, and documents that are searched for each depth and length."""
    beside: tuple[str, ...] = ()
    """Folders of other runs whose curves are drawn too."""
    run_dir: str | None = None
    """Folder of the run. None: runs/needles/PRESET, with a suffix that depends on the flags that were changed."""

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths or min(self.lengths + self.train_lengths) < self.needle_len + 2:
            shortest = min(self.lengths + self.train_lengths, default=0)
            raise ValueError(
                f"a document of {shortest} tokens, expected room for needle_len={self.needle_len} and 2 more"
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}, expected numbers from 0 to 1")
        if not 0 < self.filler_share < 1:
            raise ValueError(f"filler_share={self.filler_share}, expected 0 < filler_share < 1")
        for name in ("needle_len", "eval_queries"):
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
    check_batches(config.objective, config.train)
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


def default_run_dir(config: Config) -> Path:
    """runs/needles/PRESET for a preset as it is, with a digest of the changes for a changed one."""
    return runs.default_run_dir(config, PRESETS, "needles", FREE)


@locked
@meshed
def fit(config: Config, folder: Path, *, given: Collection[str] = ()) -> tuple[Finished, Needles, SpecialTokens]:
    """Trains a configuration in a folder, from the run's newest checkpoint where there is one.

    Args:
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.

    Returns:
      how it ended, the needles of the last evaluation, and the special tokens.

    Raises:
      UsageError: the texts, the tokenizer or the folder is not what the configuration says; nothing has been written.
      FloatingPointError: see `train`.
    """
    with flags.usage_errors():
        kept = runs.resumed(config, folder, FREE)
        for other in config.beside:
            read_results(Path(other))
        collections = load_collections(config.data)
        length = max(*config.lengths, *config.trained_at, config.max_query_len)
        started = start_from(config, training_texts(collections), kept, length=length, flag="--lengths", given=given)
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
        how = {"steps": config.train.steps, "seed": config.train.seed}
        task, save_base = adapted(task, config.adapt, folder, config.optim, **how)
        save_tokenizer(started.tokenizer, folder)
        runs.begin(config, folder, started.model, inputs(collections, started.tokenizer))
    print(describe_size(started.model, folder), flush=True)
    save_base()
    print(f"{len(trained.queries):,} needles to train on, {len(trained.filler):,} passages of filler", flush=True)
    return train(task, config.train, config.optim, folder, record=dataclasses.asdict(config)), last, special


def main() -> int:
    """Trains, and draws how well needles are found where."""
    config = flags.parse(PRESETS, prog="python -m experiments.needles", description=__doc__)
    folder = Path(config.run_dir) if config.run_dir else default_run_dir(config)
    finished, needles, special = fit(config, folder, given=flags.given(Config))
    if finished.stopped:
        return 0
    points = curves(load_encoder(folder, step="best").model, needles, special, config)
    label = f"{finished.model.config.pattern}, {config.objective.loss}, batch {config.train.batch_size}"
    save_results(label, len(needles.queries), points, folder)
    with flags.usage_errors(), first_before_others():  # they read what it has written
        path = plot([folder, *map(Path, config.beside)])
    heading = f"{len(needles.queries)} test queries, {len(needles.passages)} documents of each length:"
    show_end(folder, [heading, *table(points)], f"{RESULTS}, {path.name}, metrics.jsonl, checkpoints")
    return 0


if __name__ == "__main__":
    flags.run(main)
