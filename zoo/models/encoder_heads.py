"""What reads the vectors of an encoder of text: the masked language model's head, poolers and classifiers.

Source: Devlin et al. 2018, arXiv:1810.04805; m2's bert/src/bert_layers.py for M2-BERT.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2.mlp import ACTIVATIONS
from zoo.layers.linear import linear
from zoo.layers.names import unknown_name
from zoo.layers.pooling import AttentionPool, Pool, pool
from zoo.layers.rngs import Seed, as_rngs
from zoo.models.called_like import called_like
from zoo.models.causal import project_to_vocabulary
from zoo.models.encoder import Encoder, EncoderConfig
from zoo.models.pretraining_decoder import PretrainingDecoder, decoder_config
from zoo.stack.block import make_norm

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


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

    @called_like(Encoder.run)
    def __call__(self, ids=None, mask=None, segment_ids=None, *, rngs=None, **options) -> Float[Array, "b *c"]:
        """What the head answers, in at least float32. Arguments are those of `Encoder.run`."""
        return self.read(self.hidden(ids, mask, segment_ids, rngs=rngs, **options), mask, rngs=rngs)

    @called_like(Encoder.run)
    def hidden(self, *inputs, **options) -> Float[Array, "b l d"]:
        """The encoder's output."""
        return self.run(*inputs, **options)[0]

    @called_like(Encoder.run)
    def run(self, *inputs, **options) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `hidden`, and what training adds to its loss: that of mixtures of experts, 0 without any."""
        return self.encoder.run(*inputs, **options)

    @called_like(Encoder.run)
    def hidden_states(self, *inputs, **options) -> tuple[Float[Array, "b l d"], ...]:
        """The encoder's vectors of every layer, the embedding first and `hidden` last."""
        return self.encoder.hidden_states(*inputs, **options)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b *c"]:
        """The head's answer to the encoder's output.

        Args:
          hidden: the encoder's output.
          mask: False where a position is not there.
          rngs: stream "dropout" switches dropout on; None leaves it off.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MaskedLMConfig(EncoderConfig):
    """A masked language model.

    Examples:
      >>> zoo.MaskedLMConfig(vocab_size=32, pattern="m2/monarch").vocab_size
      32
    """

    head_activation: Activation = "gelu"
    """Non-linearity of the head's hidden layer."""
    head_bias: bool = True
    """Whether the head's hidden layer has a bias. The vocabulary always has one."""
    decoder_layers: int = 0
    """Blocks between encoder and head that take part in training alone (BPDec): no output has them in it, and published
    layouts leave them out."""
    decoder_pattern: str | None = None
    """Mixers of these blocks. None: those of the encoder's pattern."""
    decoder_share: float = 0.5
    """Chance that the head reads, at a position in training, what these blocks give, not the encoder."""

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_layers < 0:
            raise ValueError(f"decoder_layers={self.decoder_layers}, expected at least 0")
        if not 0 <= self.decoder_share <= 1:
            raise ValueError(f"decoder_share={self.decoder_share}, expected 0 to 1")
        if self.decoder_layers:
            decoder_config(self, self.decoder_layers, self.decoder_pattern)
        elif self.decoder_pattern is not None:
            raise ValueError(f"decoder_pattern={self.decoder_pattern!r} with decoder_layers=0, expected none")


class MaskedLM(EncoderModel):
    """An encoder that says which token belongs at each position: the output projection is the embedding itself.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params", or a seed.

    Examples:
      >>> model = zoo.create("m2-bert-80m", rngs=0, d_model=16, n_layers=1, vocab_size=32)
      >>> model(jnp.ones((2, 5), jnp.int32)).shape
      (2, 5, 32)
    """

    def __init__(self, config: MaskedLMConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.dense = _dense(config, config.d_model, rngs, bias=config.head_bias)
        self.norm = make_norm(config, rngs)
        bias = jnp.zeros((config.padded_vocab_size,), jnp.dtype(config.param_dtype))
        self.bias = nnx.Param(bias, decay=False, axes=("vocab",))
        self.decoder = _decoder(config, rngs)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds something to its loss for one of the mixers."""
        decoder = [] if self.decoder is None else self.decoder.blocks
        return self.encoder.backbone.has_auxiliary_loss or any(block.has_auxiliary_loss for block in decoder)

    def decode(
        self,
        hidden: Float[Array, "b l d"],
        guessed: Bool[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        rngs: nnx.Rngs | None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """What the head reads in training in place of the encoder's output, and what training adds to its loss.

        Args:
          hidden: the encoder's output.
          guessed: True where a token is to be guessed.
          mask, segment_ids: as the encoder was given them.
          rngs: stream "dropout". None is not training: the encoder's output comes back, as it does without a decoder.
        """
        if self.decoder is None or rngs is None:
            return hidden, jnp.float32(0)
        mask = mask if self.config.mask_padding else None
        return self.decoder(hidden, guessed, mask=mask, segment_ids=segment_ids, rngs=rngs)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l v"]:
        """Logits of the token at every position."""
        return self.head(hidden)

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits from the encoder's output, at all positions or those that are asked for, in at least float32."""
        x = self.norm(ACTIVATIONS[self.config.head_activation](self.dense(hidden)))
        weight = self.encoder.word_embeddings.embedding[...].T
        return project_to_vocabulary(x, weight, self.config.dtype) + self.bias[...]


def _decoder(config: MaskedLMConfig, rngs: nnx.Rngs) -> PretrainingDecoder | None:
    if not config.decoder_layers:
        return None
    blocks = decoder_config(config, config.decoder_layers, config.decoder_pattern)
    return PretrainingDecoder(blocks, share=config.decoder_share, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class SequenceClassifierConfig(EncoderConfig):
    """An encoder with one vector, and perhaps a class, for a whole row.

    Examples:
      >>> zoo.SequenceClassifierConfig(n_labels=3).n_labels
      3
    """

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
      rngs: source of keys, stream "params", or a seed.

    Examples:
      >>> config = zoo.SequenceClassifierConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba", n_labels=3)
      >>> zoo.SequenceClassifier(config, rngs=0)(jnp.ones((2, 5), jnp.int32)).shape
      (2, 3)
    """

    def __init__(self, config: SequenceClassifierConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        self.encoder = Encoder(config, rngs=rngs)
        dtype = jnp.dtype(config.param_dtype)
        attention = config.pool == "attention"
        self.attention_pool = AttentionPool(config.d_model, param_dtype=dtype, rngs=rngs) if attention else None
        self.pooler = _dense(config, config.d_model, rngs) if config.pooler else None
        self.head = HiddenLayer(config, rngs=rngs) if config.head_activation else None
        self.dropout = nnx.Dropout(config.classifier_dropout)
        self.classifier = _dense(config, config.n_labels, rngs) if config.n_labels else None

    @called_like(Encoder.run)
    def __call__(self, ids=None, mask=None, segment_ids=None, **options) -> Float[Array, "b c"]:
        """Logits of every row's c classes, in at least float32. Arguments are those of `Encoder.run`, without segments.

        Raises:
          ValueError: n_labels=0, there is no classifier; or segment_ids.
        """
        _check_no_segments(segment_ids)
        return super().__call__(ids, mask, **options)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b c"]:
        """Logits from the encoder's output.

        Raises:
          ValueError: n_labels=0, there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("n_labels=0: the model has no classifier; `embed` gives each row's vector")
        return _classified(self.vectors(hidden, mask), self.head, self.dropout, self.classifier, rngs)

    @called_like(Encoder.run)
    def embed(self, ids=None, mask=None, segment_ids=None, **options) -> Float[Array, "b d"]:
        """One vector a row, as `Encoder` takes rows. Pooling leaves padding out, whatever mask_padding says.

        Raises:
          ValueError: segment_ids given.
        """
        _check_no_segments(segment_ids)
        return self.vectors(self.hidden(ids, mask, **options), mask)

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
    """An encoder with a class for every token. Spans (extractive answers) are n_labels=2: where one starts and ends.

    Examples:
      >>> zoo.TokenClassifierConfig(n_labels=9).n_labels
      9
    """

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
      rngs: source of keys, stream "params", or a seed.

    Examples:
      >>> config = zoo.TokenClassifierConfig(vocab_size=32, d_model=16, n_layers=1, pattern="mamba", n_labels=3)
      >>> zoo.TokenClassifier(config, rngs=0)(jnp.ones((2, 5), jnp.int32)).shape
      (2, 5, 3)
    """

    def __init__(self, config: TokenClassifierConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.head = HiddenLayer(config, rngs=rngs) if config.head_activation else None
        self.dropout = nnx.Dropout(config.classifier_dropout)
        self.classifier = _dense(config, config.n_labels, rngs)

    def read(
        self, hidden: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l c"]:
        """Logits of every token's c classes, in at least float32, each from its own position, whatever is masked."""
        return _classified(hidden, self.head, self.dropout, self.classifier, rngs)


def _classified(x, head: HiddenLayer | None, dropout: nnx.Dropout, classifier: nnx.Linear, rngs: nnx.Rngs | None):
    """Logits of vectors, in at least float32."""
    x = x if head is None else head(x)
    if rngs is not None:
        x = dropout(x, deterministic=False, rngs=rngs)
    return classifier(x).astype(jnp.promote_types(x.dtype, jnp.float32))


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
