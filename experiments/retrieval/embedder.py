"""Encoders that make one vector of a text: what pools a row, and what their folders say of texts and vectors."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from flax import nnx

import zoo
from experiments.data.tokenizers import Tokenizer
from experiments.encoders.load import Pretrained, load_encoder
from experiments.retrieval.sentence_modules import SentenceModules, read_modules
from zoo.layers.pooling import Pool
from zoo.published import bert_layout, m2_layout
from zoo.published.pretrained import read_config_file
from zoo.published.run_folder import is_run


class Embedder(NamedTuple):
    """All that makes vectors of texts."""

    model: zoo.SequenceClassifier
    tokenizer: Tokenizer
    modules: SentenceModules


def load_embedder(source: str | Path, pool: Pool | None = None) -> Embedder:
    """A model with one vector a text, from anywhere, and what its folder says of texts and vectors.

    Args:
      source: a run, a published folder, or a name on the hub.
      pool: another pooling than the model's.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: what is there is no encoder, or has a module that there is none for here.
    """
    loaded = load_encoder(source, leave_dense=True)
    model = pooled(loaded, pool)
    modules = SentenceModules() if is_run(loaded.folder) else read_modules(loaded.folder)
    return Embedder(as_embedder(model, pool), loaded.tokenizer, modules)


def pooled(loaded: Pretrained, pool: Pool | None = None) -> Any:
    """The model that was loaded; one that nothing has pooled for a vector yet, with a pooling: the mean, or `pool`.

    A published BERT without a head holds the map and tanh of its next-sentence task, and a ModernBERT nothing. Neither
    was trained to be a text's vector, as little as a masked language model's first position.
    """
    model, folder = loaded.model, loaded.folder
    if not isinstance(model, zoo.SequenceClassifier) or model.config.n_labels:
        return model
    if is_run(folder) or bert_layout.read_pooling(folder, leave_dense=True) is not None:
        return model
    raw = read_config_file(folder)[0]
    if not bert_layout.is_bert(raw) or m2_layout.is_m2_bert(raw):
        return model
    head: dict[str, Any] = {"n_labels": 0, "pool": pool or "mean", "pooler": False}
    return zoo.with_head(model, zoo.SequenceClassifierConfig, rngs=nnx.Rngs(params=jax.random.key(0)), **head)


def as_embedder(model: Any, pool: Pool | None = None, *, pooler: bool = False, seed: int = 0) -> zoo.SequenceClassifier:
    """A model with one vector a row: itself where it has a pooling and no other is asked for.

    Args:
      pool: another pooling than the model's; "attention" begins untrained. None: the model's, or the mean.
      pooler: whether a new linear map and tanh follow where the model is given a pooling.
      seed: of parameters that the model lacks.
    """
    kept = model.config.pool if isinstance(model, zoo.SequenceClassifier) else None
    if kept is not None and pool in (None, kept):
        return model
    rngs = nnx.Rngs(params=jax.random.key(seed))
    head: dict[str, Any] = {"n_labels": 0, "pool": pool or "mean", "pooler": pooler}
    return cast(zoo.SequenceClassifier, zoo.with_head(model, zoo.SequenceClassifierConfig, rngs=rngs, **head))
