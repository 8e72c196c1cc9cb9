"""The texts that a model is looked at on before it is made smaller, and their rows of tokens."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

import zoo
from experiments.causal.load import load_causal
from experiments.causal.next_token import describe, next_token_loss
from experiments.data.corpus import Corpus, DataConfig, evaluation_batches, load_corpus
from experiments.data.streams import TokenStream
from experiments.loop.model_size import count_params
from experiments.loop.train import mean_loss


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How much text is read."""

    batches: int = 8
    """Batches of rows, spread evenly over the text."""
    batch_size: int = 4
    """Rows of a batch; --data.seq-len tokens each."""

    def __post_init__(self):
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--calibration.{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")


def text_for(source: str, data: DataConfig) -> Corpus:
    """A text in the tokens of a causal language model: to look at, and held out.

    Raises:
      ValueError: no causal language model, or no text.
    """
    return load_corpus(dataclasses.replace(data, tokenizer=load_causal(source).spec))


def batches_of(stream: TokenStream, seq_len: int, config: Calibration) -> list[dict[str, Any]]:
    """What `zoo.calibrate` reads."""
    rows = evaluation_batches(stream, batch_size=config.batch_size, seq_len=seq_len, max_batches=config.batches)
    return [{"ids": jnp.asarray(b["tokens"]), "mask": jnp.asarray(b["weights"]) > 0} for b in rows]


def perplexity(model: zoo.CausalLM, stream: TokenStream, *, batch_size: int, seq_len: int, max_batches: int) -> float:
    """Of a text, per token."""
    rows = evaluation_batches(stream, batch_size=batch_size, seq_len=seq_len, max_batches=max_batches)
    return describe(mean_loss(model, next_token_loss, rows), 1.0)["perplexity"]


def said(before: Any, after: Any, text: Corpus, config: Any, text_after: Corpus | None = None) -> str:
    """How large two models are, and how well they guess a held-out text.

    Args:
      before, after: causal language models.
      text: from `text_for`.
      config: with fields `data` and `calibration`.
      text_after: in other tokens, which the second model reads. None: the same.
    """
    seen = {"batch_size": config.calibration.batch_size, "seq_len": config.data.seq_len, "max_batches": 8}
    streams = text.validation, (text_after or text).validation
    found = [perplexity(m, stream, **seen) for m, stream in zip((before, after), streams, strict=True)]
    what = "perplexity"
    if text_after is not None:
        what = "bits per byte"
        found = [math.log2(p) * s.n_tokens / s.n_bytes for p, s in zip(found, streams, strict=True)]
    return (
        f"{count_params(before.config):,} parameters are {count_params(after.config):,}; "
        f"{what} of held-out text {found[0]:.4g} is {found[1]:.4g}"
    )
