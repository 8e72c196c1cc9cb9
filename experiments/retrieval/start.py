"""What the training of a bi-encoder starts from: its configuration, a model, and a tokenizer of the training texts."""

import dataclasses
from collections.abc import Collection as Names
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import Tokenizer, check_same, load_tokenizer
from experiments.encoders.lengths import check_lengths, reach
from experiments.encoders.load import load_encoder
from experiments.encoders.shapes import encoder_fields
from experiments.loop import runs
from experiments.loop.adapting import AdaptConfig, check_start
from experiments.loop.few_bits import say_codes
from experiments.loop.mesh import MeshConfig
from experiments.loop.optim import OptimConfig
from experiments.loop.starting import check_agreement, load_start, options
from experiments.loop.train import TrainConfig
from experiments.retrieval.beir import Collection, RetrievalData
from experiments.retrieval.bi_encoder import Objective
from experiments.retrieval.embedder import pooled
from zoo.layers.pooling import Pool


@dataclasses.dataclass(frozen=True)
class BiEncoderConfig:
    """A bi-encoder: its shape, its texts, what it learns. A subclass says how it is evaluated."""

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
    train: TrainConfig = TrainConfig()
    """How long to train, what to keep. batch_size counts queries."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    adapt: AdaptConfig = AdaptConfig()
    """Adapters of --init, which stays as it is, rather than all of it."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    init: str | None = None
    """A run, a published folder or a hub name to go on from: its shape and tokenizer replace --model and
    --tokenizer, and flags that say otherwise are refused."""
    eval_tokens: int = 16384
    """Positions in a batch of an evaluation."""

    def __post_init__(self):
        check_start(self.adapt, self.init)
        check_row_len("max_query_len", self.max_query_len)
        if self.eval_tokens < 1:
            raise ValueError(f"eval_tokens={self.eval_tokens}, expected at least 1")


def check_row_len(name: str, length: int) -> None:
    """Raises a ValueError where rows of this length have no room for a token."""
    if length < 3:
        raise ValueError(f"{name}={length}, expected at least 3: [CLS], a token, [SEP]")


def inputs(collections: Sequence[Collection], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run learns from, see `fingerprints.check_inputs`."""
    return {"tokenizer": tokenizer.to_json()} | {f"data {one.name}": one for one in collections}


def training_texts(collections: Sequence[Collection]) -> list[str]:
    """The queries and documents of the training split."""
    texts = []
    for one in collections:
        train = one.qrels.get("train", {})
        texts += [one.queries[name] for name in train]
        texts += [one.documents[name] for name in dict.fromkeys(name for grades in train.values() for name in grades)]
    return texts


class Started(NamedTuple):
    """What training starts from."""

    model: zoo.SequenceClassifierConfig
    init: zoo.SequenceClassifier | None
    tokenizer: Tokenizer


def start_from(
    config: BiEncoderConfig,
    texts: Sequence[str],
    folder: Path | None,
    *,
    length: int,
    flag: str = "--max-doc-len",
    n_outputs: int = 0,
    given: Names[str] = (),
) -> Started:
    """Model and tokenizer of a configuration: those of --init, or new ones.

    Args:
      texts: what a new tokenizer is trained on.
      folder: of a run that goes on, which has its tokenizer and its model, or None.
      length: the longest row that must be read.
      flag: what asks for it, for errors.
      n_outputs: width of a linear map behind the vectors, 0 for none.
      given: the fields that flags name; with config.init, those of the model that say otherwise are refused.
    """
    head: dict[str, Any] = {"n_labels": n_outputs, "pool": config.pool or "mean", "pooler": config.pooler}
    if config.init is None:
        tokenizer = load_tokenizer(config.tokenizer, texts, config.vocab_size, folder)
        needed = special_tokens(tokenizer).vocab_size
        encoder = runs.fit_vocabulary(config.model, needed, config.tokenizer)
        check_lengths(encoder, length, flag)
        return Started(zoo.SequenceClassifierConfig(**encoder_fields(encoder), **head), None, tokenizer)
    loaded = load_start(config.init, folder, load_encoder)
    model, tokenizer = loaded.model, loaded.tokenizer
    say_codes(config.init, model, config.adapt)
    if folder is None and "tokenizer" in given:
        check_same(config.tokenizer, tokenizer, flag="--tokenizer", source=config.init)
    trained = config.pool is not None or pooled(loaded) is model
    if trained and isinstance(model, zoo.SequenceClassifier) and config.pool in (None, model.config.pool):
        head = {"n_labels": n_outputs}  # it keeps what pools its rows
    rngs = nnx.Rngs(params=jax.random.key(config.train.seed))
    head |= options(config.model, given)
    init = reach(zoo.with_head(model, zoo.SequenceClassifierConfig, rngs=rngs, **head), length)
    if folder is None:
        check_agreement(config.init, config.model, init.config, given)
    return Started(init.config, init, tokenizer)
