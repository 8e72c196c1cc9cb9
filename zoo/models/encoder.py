"""Encoders of text: BERT with any mixer, up to the vectors that the heads of `encoder_heads.py` read.

Packed rows, several documents in one, give each what it gives alone: positions are counted from the start of each.

Source: Devlin et al. 2018, arXiv:1810.04805; m2's bert/src/bert_layers.py for M2-BERT.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2.filters import fits
from ssm import segment_starts
from ssm.absent import blank
from zoo.layers.depth_router import Skippable
from zoo.layers.rngs import Seed, as_rngs
from zoo.layers.token_ids import check_ids, check_one
from zoo.models.called_like import called_like
from zoo.models.causal import TokenConfig, make_embedding, token_embedding
from zoo.stack.backbone import Backbone
from zoo.stack.block import make_norm


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TokenConfig):
    """Token, position and type embeddings, and a backbone that looks both ways. The defaults are BERT's.

    Examples:
      >>> zoo.EncoderConfig().causal
      False
    """

    causal: bool = False
    """Whether positions see only themselves and earlier ones."""
    norm: Literal["rms", "layer"] = "layer"
    """Normalisation of the embeddings and around each mixer."""
    norm_place: Literal["pre", "post"] = "post"
    """pre: x + mixer(norm(x)), and a last norm at the end. post: norm(x + mixer(x)), as in BERT."""
    norm_eps: float = 1e-12
    """Added to the variance in normalisation."""
    max_len: int | None = 512
    """Positions that have a learned embedding, and so the longest document. None: positions have none."""
    type_vocab_size: int = 2
    """Kinds of tokens, e.g. those of a first and a second sentence, each with an embedding. 0: none."""
    embedding_dropout: float = 0.0
    """Share of the embeddings that is dropped in training."""
    mask_padding: bool = True
    """Whether the mixers leave padding out. The published M2-BERT models take it for text: False reproduces them."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_len is not None and self.max_len < 1:
            raise ValueError(f"max_len={self.max_len}, expected None or at least 1")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size={self.type_vocab_size}, expected at least 0")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout={self.embedding_dropout}, expected 0 <= embedding_dropout < 1")


class Encoder(nnx.Module):
    """Tokens to vectors that know their context: embed, normalise, backbone.

    Examples:
      >>> config = zoo.EncoderConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba")
      >>> zoo.Encoder(config, rngs=0)(jnp.ones((2, 5), jnp.int32)).shape
      (2, 5, 16)
    """

    def __init__(self, config: EncoderConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        self.word_embeddings = token_embedding(config, rngs)
        self.position_embeddings = make_embedding(config, config.max_len, rngs) if config.max_len else None
        kinds = config.type_vocab_size
        self.token_type_embeddings = make_embedding(config, kinds, rngs) if kinds else None
        self.norm = make_norm(config, rngs)
        self.dropout = nnx.Dropout(config.embedding_dropout)
        self.backbone = Backbone(config, rngs=rngs)

    def run(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        task: Int[Array, "b"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """The vector of every position, and what training adds to its loss: that of mixtures of experts, 0 without any.

        Args:
          ids: token ids, of the vocabulary and what pads it. Under `jax.jit` others give NaN, or are rows from the end.
          mask: False where a position is not there (padding, at the end). With mask_padding=False nothing heeds it.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other, and each has its
            own learned positions from 0. A row may then be longer than max_len, but no document: one that is longer
            turns its whole row into NaN, since values cannot raise errors under `jax.jit`. Padding counts as a document
            unless the mask says that it is not there.
          token_type_ids: the kind of each token, 0 to type_vocab_size - 1. None: all 0.
          inputs_embeds: vectors in place of the ids' own (`word_embeddings`); positions, kinds and the norm come still.
          task: the number of each row's task, where mixtures of experts have a router for each (`MoEConfig.n_tasks`).
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: more positions than max_len without segment_ids, or kinds of tokens where there is one only. Or
            ids or kinds that are no integers (b, l), or that there is no vector for where their values are known; ids
            and vectors, or neither.
        """
        x = self._embed(ids, mask, segment_ids, token_type_ids, inputs_embeds, rngs)
        given: dict[str, Any] = {"segment_ids": segment_ids, "task": task, "skippable": self._skippable(x, segment_ids)}
        return self.backbone.run(x, mask=self._heeded(mask), rngs=rngs, **given)

    @called_like(run)
    def hidden_states(self, ids=None, mask=None, segment_ids=None, **options) -> tuple[Float[Array, "b l d"], ...]:
        """The vectors of every layer: n_layers + 1 arrays, the embedding first (normalised, as it enters the first
        block) and what `__call__` gives last; see `Backbone.hidden_states`. Arguments are those of `run`."""
        kinds, vectors, rngs = (options.get(name) for name in ("token_type_ids", "inputs_embeds", "rngs"))
        x = self._embed(ids, mask, segment_ids, kinds, vectors, rngs)
        given: dict[str, Any] = {"segment_ids": segment_ids, "task": options.get("task")}
        given["skippable"] = self._skippable(x, segment_ids)
        return self.backbone.hidden_states(x, mask=self._heeded(mask), rngs=rngs, **given)

    def _embed(self, ids, mask, segment_ids, token_type_ids, inputs_embeds, rngs):
        """What enters the backbone."""
        check_one(ids, inputs_embeds, self.config.d_model)
        if ids is not None:
            check_ids(ids, self.word_embeddings)
            x = self.word_embeddings(ids)
        else:
            x = blank(self._heeded(mask), inputs_embeds).astype(jnp.dtype(self.config.param_dtype))
        if self.token_type_embeddings is not None:
            if token_type_ids is None:  # one vector for all: by token, its gradient would sort and scatter
                kinds = jnp.zeros((1, 1), int)
            else:
                check_ids(token_type_ids, self.token_type_embeddings, "token_type_ids")
                kinds = token_type_ids
            x = x + self.token_type_embeddings(kinds)
        elif token_type_ids is not None:
            raise ValueError("token_type_ids given, but type_vocab_size=0: the model knows one kind of token")
        if self.position_embeddings is not None:
            x = x + self._positions(self.position_embeddings.embedding[...], x.shape[1], mask, segment_ids)
        x = self.norm(x)
        return x if rngs is None else self.dropout(x, deterministic=False, rngs=rngs)

    def _skippable(self, x, segment_ids):
        """All positions but the first of each document, whose vector stands for the whole, where some do not go on."""
        if self.config.keep is None:
            return None
        if segment_ids is None:
            later = jnp.broadcast_to(jnp.arange(x.shape[1]) > 0, x.shape[:2])
            return Skippable(later, x.shape[1] - 1)
        return Skippable(document_positions(segment_ids) > 0)

    def _heeded(self, mask):
        return mask if self.config.mask_padding else None

    @called_like(run)
    def __call__(self, *inputs, **options) -> Float[Array, "b l d"]:
        """The vector of every position. Arguments are those of `run`."""
        return self.run(*inputs, **options)[0]

    @staticmethod
    def _positions(table, length, mask, segment_ids):
        """The learned vectors of every position, (l, d), or (b, l, d) with segments."""
        rows = table.shape[0]
        if segment_ids is None:
            if not fits(length, rows, "max_len"):
                raise ValueError(f"ids has {length} positions, expected at most max_len={rows}, or segment_ids")
            return table[:length]
        index = document_positions(segment_ids)
        if mask is not None:
            index = jnp.where(mask, index, jnp.minimum(index, rows - 1))
        return table.at[index].get(mode="fill", fill_value=jnp.nan)


def document_positions(segment_ids: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """The index of each position in its document, counted from the start of its run of equal ids."""
    index = jnp.arange(segment_ids.shape[1])
    return index - jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
