"""Encoders of text: BERT with any mixer, its masked-language-model head, its poolers and classifiers.

Packed rows, several documents in one, give each what it gives alone: positions are counted from the start of each.

Source: Devlin et al. 2018, arXiv:1810.04805; m2's bert/src/bert_layers.py for M2-BERT.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2.mlp import ACTIVATIONS
from ssm import segment_starts
from zoo.layers.linear import linear
from zoo.layers.names import unknown_name
from zoo.layers.pooling import AttentionPool, Pool, pool
from zoo.models.causal import TokenConfig, make_embedding, project_to_vocabulary, token_embedding
from zoo.stack.backbone import Backbone
from zoo.stack.block import make_norm

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TokenConfig):
    """Token, position and type embeddings, and a backbone that looks both ways. The defaults are BERT's."""

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
    """Tokens to vectors that know their context: embed, normalise, backbone."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word_embeddings = token_embedding(config, rngs)
        self.position_embeddings = make_embedding(config, config.max_len, rngs) if config.max_len else None
        kinds = config.type_vocab_size
        self.token_type_embeddings = make_embedding(config, kinds, rngs) if kinds else None
        self.norm = make_norm(config, rngs)
        self.dropout = nnx.Dropout(config.embedding_dropout)
        self.backbone = Backbone(config, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l d"]:
        """The vector of every position.

        Args:
          ids: token ids.
          mask: False where a position is not there (padding, at the end). With mask_padding=False nothing heeds it.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other, and each has its
            own learned positions from 0. A row may then be longer than max_len, but no document: one that is longer
            turns its whole row into NaN, since values cannot raise errors under `jax.jit`. Padding counts as a document
            unless the mask says that it is not there.
          token_type_ids: the kind of each token, 0 to type_vocab_size - 1. None: all 0.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: more positions than max_len without segment_ids, or kinds of tokens where there is one only.
        """
        return self.run(ids, mask, segment_ids, token_type_ids=token_type_ids, rngs=rngs)[0]

    def run(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and what training adds to its loss: that of mixtures of experts, 0 without any."""
        x = self.word_embeddings(ids)
        if self.token_type_embeddings is not None:
            kinds = jnp.zeros_like(ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(kinds)
        elif token_type_ids is not None:
            raise ValueError("token_type_ids given, but type_vocab_size=0: the model knows one kind of token")
        if self.position_embeddings is not None:
            x = x + self._positions(self.position_embeddings.embedding[...], ids.shape[1], mask, segment_ids)
        x = self.norm(x)
        if rngs is not None:
            x = self.dropout(x, deterministic=False, rngs=rngs)
        mask = mask if self.config.mask_padding else None
        return self.backbone.run(x, mask=mask, segment_ids=segment_ids, rngs=rngs)

    @staticmethod
    def _positions(table, length, mask, segment_ids):
        """The learned vectors of every position, (l, d), or (b, l, d) with segments."""
        rows = len(table)
        if segment_ids is None:
            if length > rows:
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


class HiddenLayer(nnx.Module):
    """What ModernBERT's classifiers have between a vector and its classes: norm(act(dense(x)))."""

    def __init__(self, config: "SequenceClassifierConfig | TokenClassifierConfig", *, rngs: nnx.Rngs):
        self.activation: str = config.head_activation or "gelu"
        self.dense = _dense(config, config.d_model, rngs, bias=config.head_bias)
        self.norm = make_norm(config, rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The vectors that the classifier reads."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class EncoderModel(nnx.Module):
    """What models with an `encoder` and a head of their own share: the encoder's output, and the head that reads it."""

    encoder: Encoder

    def hidden(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l d"]:
        """The encoder's output. Arguments are those of `Encoder`."""
        return self.run(ids, mask, segment_ids, token_type_ids=token_type_ids, rngs=rngs)[0]

    def run(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `hidden`, and what training adds to its loss: that of mixtures of experts, 0 without any."""
        return self.encoder.run(ids, mask, segment_ids, token_type_ids=token_type_ids, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MaskedLMConfig(EncoderConfig):
    """A masked language model."""

    head_activation: Activation = "gelu"
    """Non-linearity of the head's hidden layer."""
    head_bias: bool = True
    """Whether the head's hidden layer has a bias. The vocabulary always has one."""


class MaskedLM(EncoderModel):
    """An encoder that says which token belongs at each position: the output projection is the embedding itself.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params".
    """

    def __init__(self, config: MaskedLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.dense = _dense(config, config.d_model, rngs, bias=config.head_bias)
        self.norm = make_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.padded_vocab_size,), jnp.dtype(config.param_dtype)), decay=False)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l v"]:
        """Logits of the token at every position, in at least float32. Arguments are those of `Encoder`."""
        return self.head(self.hidden(ids, mask, segment_ids, token_type_ids=token_type_ids, rngs=rngs))

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits from the encoder's output, at all positions or those that are asked for."""
        x = self.norm(ACTIVATIONS[self.config.head_activation](self.dense(hidden)))
        weight = self.encoder.word_embeddings.embedding[...].T
        return project_to_vocabulary(x, weight, self.config.dtype) + self.bias[...]


@dataclasses.dataclass(frozen=True)
class SequenceClassifierConfig(EncoderConfig):
    """An encoder with one vector, and perhaps a class, for a whole row."""

    n_labels: int = 2
    """Classes, or 1 for a number. 0: no classifier, a row's vector is all."""
    pool: Pool = "first"
    """A row's vector: that of its first token, the mean of those that are there, the last that is there, or a mean
    weighted by attention to one learned query."""
    pooler: bool = True
    """Whether that vector goes through a linear map and tanh."""
    head_activation: Activation | None = None
    """Non-linearity of a hidden layer with a norm before the classifier, as ModernBERT has it. None: no such layer."""
    head_bias: bool = False
    """Whether that layer has a bias."""
    classifier_dropout: float = 0.0
    """Share of what the classifier reads that is dropped in training."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_labels < 0:
            raise ValueError(f"n_labels={self.n_labels}, expected at least 0")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool={self.pool!r}, expected one of {', '.join(get_args(Pool))}")
        _check_classifier(self)


class SequenceClassifier(EncoderModel):
    """An encoder that sorts whole rows, or embeds them for retrieval.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params".
    """

    def __init__(self, config: SequenceClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        dtype = jnp.dtype(config.param_dtype)
        attention = config.pool == "attention"
        self.attention_pool = AttentionPool(config.d_model, param_dtype=dtype, rngs=rngs) if attention else None
        self.pooler = _dense(config, config.d_model, rngs) if config.pooler else None
        self.head = HiddenLayer(config, rngs=rngs) if config.head_activation else None
        self.dropout = nnx.Dropout(config.classifier_dropout)
        self.classifier = _dense(config, config.n_labels, rngs) if config.n_labels else None

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b c"]:
        """Logits of every row's c classes, in at least float32. Arguments are those of `Encoder`, without segments.

        Raises:
          ValueError: n_labels=0, there is no classifier; or segment_ids.
        """
        _check_no_segments(segment_ids)
        return self.read(self.hidden(ids, mask, token_type_ids=token_type_ids, rngs=rngs), mask, rngs=rngs)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b c"]:
        """Logits from the encoder's output.

        Raises:
          ValueError: n_labels=0, there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("n_labels=0: the model has no classifier; `embed` gives each row's vector")
        x = self.vectors(hidden, mask)
        x = x if self.head is None else self.head(x)
        if rngs is not None:
            x = self.dropout(x, deterministic=False, rngs=rngs)
        return self.classifier(x).astype(jnp.promote_types(x.dtype, jnp.float32))

    def embed(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b d"]:
        """One vector a row, as `Encoder` takes rows. Pooling leaves padding out, whatever mask_padding says.

        Raises:
          ValueError: segment_ids given.
        """
        _check_no_segments(segment_ids)
        return self.vectors(self.hidden(ids, mask, token_type_ids=token_type_ids, rngs=rngs), mask)

    def vectors(self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b d"]:
        """One vector a row from the encoder's output."""
        x = hidden
        if self.attention_pool is not None:
            x = self.attention_pool(x, mask)
        elif self.config.pool != "attention":
            x = pool(x, mask, kind=self.config.pool)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))


@dataclasses.dataclass(frozen=True)
class TokenClassifierConfig(EncoderConfig):
    """An encoder with a class for every token. Spans (extractive answers) are n_labels=2: where one starts and ends."""

    n_labels: int = 2
    """Classes."""
    head_activation: Activation | None = None
    """Non-linearity of a hidden layer with a norm before the classifier, as ModernBERT has it. None: no such layer."""
    head_bias: bool = False
    """Whether that layer has a bias."""
    classifier_dropout: float = 0.0
    """Share of what the classifier reads that is dropped in training."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_labels < 1:
            raise ValueError(f"n_labels={self.n_labels}, expected at least 1")
        _check_classifier(self)


class TokenClassifier(EncoderModel):
    """An encoder that sorts tokens: tags, or the ends of a span.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params".
    """

    def __init__(self, config: TokenClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.head = HiddenLayer(config, rngs=rngs) if config.head_activation else None
        self.dropout = nnx.Dropout(config.classifier_dropout)
        self.classifier = _dense(config, config.n_labels, rngs)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        token_type_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l c"]:
        """Logits of every token's c classes, in at least float32. Arguments are those of `Encoder`."""
        return self.read(self.hidden(ids, mask, segment_ids, token_type_ids=token_type_ids, rngs=rngs), rngs=rngs)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l c"]:
        """Logits from the encoder's output, each from its own position, whatever is masked."""
        x = hidden if self.head is None else self.head(hidden)
        if rngs is not None:
            x = self.dropout(x, deterministic=False, rngs=rngs)
        return self.classifier(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_no_segments(segment_ids) -> None:
    if segment_ids is not None:
        raise ValueError("segment_ids given, expected one document a row: a row has one vector")


def _check_classifier(config: SequenceClassifierConfig | TokenClassifierConfig) -> None:
    rate, activation = config.classifier_dropout, config.head_activation
    if not 0 <= rate < 1:
        raise ValueError(f"classifier_dropout={rate}, expected 0 <= classifier_dropout < 1")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(unknown_name("head_activation", activation, ACTIVATIONS))
    if activation is not None and not config.n_labels:
        raise ValueError(f"head_activation={activation!r} with n_labels=0, expected None: there is no classifier")


def _dense(config: EncoderConfig, d_out: int, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
    return linear(config.d_model, d_out, bias=bias, rngs=rngs, **options)
