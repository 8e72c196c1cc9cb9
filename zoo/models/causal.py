"""Causal language models: embed, backbone, head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from ssm.linear import rows_dot_general
from zoo.layers.depth_router import Skippable
from zoo.layers.linear import linear
from zoo.layers.rngs import Seed, as_rngs
from zoo.layers.token_ids import check_ids, check_one
from zoo.stack.backbone import Backbone
from zoo.stack.backbone_config import BackboneConfig
from zoo.stack.layer_inputs import LayerInputs


@dataclasses.dataclass(frozen=True)
class TokenConfig(BackboneConfig):
    """A backbone that reads tokens.

    Examples:
      >>> issubclass(zoo.CausalLMConfig, zoo.TokenConfig) and issubclass(zoo.EncoderConfig, zoo.TokenConfig)
      True
    """

    vocab_size: int = 0
    """Token ids that mean something: 0 to vocab_size - 1. 0 is not known yet: experiments take the tokenizer's."""
    pad_vocab_multiple: int = 8
    """The embedding has vocab_size rows, rounded up to a multiple of this."""

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size={self.vocab_size}, expected at least 0")
        if self.pad_vocab_multiple < 1:
            raise ValueError(f"pad_vocab_multiple={self.pad_vocab_multiple}, expected at least 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, columns of the logits."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple


@dataclasses.dataclass(frozen=True)
class CausalLMConfig(TokenConfig):
    """A causal language model.

    Examples:
      >>> config = zoo.CausalLMConfig(vocab_size=32, d_model=16, n_layers=4, pattern="mamba*3 attn/mlp")
      >>> config.tie_embeddings
      True
    """

    tie_embeddings: bool = True
    """Whether the output projection is the embedding itself."""
    embedding_multiplier: float = 1.0
    """Multiplies the token vectors, as maximal-update parametrisation may ask for (Falcon-H1, Granite)."""
    logits_multiplier: float = 1.0
    """Multiplies the logits."""

    def __post_init__(self):
        super().__post_init__()
        if not self.causal:
            raise ValueError("causal=False, but a causal language model predicts from earlier positions only")


def token_embedding(config: TokenConfig, rngs: nnx.Rngs) -> nnx.Embed:
    """The table of token vectors, normal(0.02) at the start.

    Raises:
      ValueError: the vocabulary is not known yet.
    """
    if config.vocab_size == 0:
        raise ValueError("vocab_size=0, expected the number of token ids before a model is built")
    return make_embedding(config, config.padded_vocab_size, rngs)


def make_embedding(config: BackboneConfig, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `rows` vectors that enter the residual stream unrounded."""
    dtype = jnp.dtype(config.param_dtype)
    init = jax.nn.initializers.normal(0.02)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "embedding_metadata": {"axes": ("vocab", "embed")}}
    return nnx.Embed(rows, config.d_model, embedding_init=init, rngs=rngs, **options)


def project_to_vocabulary(
    hidden: Float[Array, "*b d"], weight: Float[Array, "d v"], dtype: Dtype
) -> Float[Array, "*b v"]:
    """Logits, multiplied in `dtype` and summed in at least float32."""
    dtype = jnp.dtype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    last_and_first = (((hidden.ndim - 1,), (0,)), ((), ()))
    return rows_dot_general(hidden.astype(dtype), weight.astype(dtype), last_and_first, preferred_element_type=wide)


class CausalLM(nnx.Module):
    """A language model that predicts each token from those before it.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params", or a seed.

    Examples:
      >>> model = zoo.create("mamba-130m", rngs=0, d_model=16, n_layers=2, vocab_size=32)
      >>> model(jnp.array([[1, 2, 3]])).shape  # (b, l) in, (b, l, v) out
      (1, 3, 32)

    Source: `MambaLMHeadModel` in mamba_ssm/models/mixer_seq_simple.py (no positional embedding; normal(0.02)
      embedding; head tied to it).
    """

    def __init__(self, config: CausalLMConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embedding = token_embedding(config, rngs)
        self.backbone = Backbone(config, rngs=rngs)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            self.lm_head = linear(
                config.d_model,
                config.padded_vocab_size,
                axes=("embed", "vocab"),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l v"]:
        """Logits of the next token at every position, in at least float32.

        Args:
          ids: token ids, of the vocabulary and what pads it. Under `jax.jit` others give NaN, or are rows from the end.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          inputs_embeds: vectors in place of ids, as `embed` gives them: model(inputs_embeds=model.embed(ids)).
          ahead: who sees what comes later, `LOOKS_AHEAD`, `SEEN_AHEAD` or 0 of each position (`zoo.layers.seen`), in a
            model of attention alone. None: nobody does.
          layer_inputs: what is added to the residual stream before some blocks, by their number from 0 (DeepStack).
          skippable: the positions that blocks with a capacity choose among; None: all.
          rngs: stream "dropout" switches dropout on; None leaves it off.

        Raises:
          ValueError: ids that are no integers (b, l), or outside of the vocabulary where their values are known; both
            ids and vectors, or neither.
        """
        given: dict[str, Any] = {"inputs_embeds": inputs_embeds, "ahead": ahead, "layer_inputs": layer_inputs}
        given["skippable"] = skippable
        return self.head(self.hidden(ids, mask, segment_ids, rngs=rngs, **given))

    def hidden(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l d"]:
        """The backbone's output, after its final normalisation."""
        given: dict[str, Any] = {"inputs_embeds": inputs_embeds, "ahead": ahead, "layer_inputs": layer_inputs}
        given["skippable"] = skippable
        return self.run(ids, mask, segment_ids, rngs=rngs, **given)[0]

    def run(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `hidden`, and what training adds to its loss: that of mixtures of experts and of depths, 0 without any."""
        x = self._vectors(ids, inputs_embeds)
        given: dict[str, Any] = {"ahead": ahead, "layer_inputs": layer_inputs, "skippable": skippable}
        return self.backbone.run(x, mask=mask, segment_ids=segment_ids, rngs=rngs, **given)

    def hidden_states(
        self,
        ids: Int[Array, "b l"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], ...]:
        """The vectors of every layer: n_layers + 1 arrays, the embedding first and `hidden` last.

        See `Backbone.hidden_states` for the convention. Arguments are those of `__call__`.
        """
        x = self._vectors(ids, inputs_embeds)
        given: dict[str, Any] = {"ahead": ahead, "layer_inputs": layer_inputs, "skippable": skippable}
        return self.backbone.hidden_states(x, mask=mask, segment_ids=segment_ids, rngs=rngs, **given)

    def _vectors(self, ids, inputs_embeds):
        """What enters the backbone: the vectors of ids, or those that are given."""
        check_one(ids, inputs_embeds, self.config.d_model)
        return inputs_embeds if ids is None else self.vectors(ids)

    def vectors(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """As `embed`, of ids that are checked as far as they are known; see `__call__`."""
        check_ids(ids, self.embedding)
        return self.embed(ids)

    def embed(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The vectors of tokens, as they enter the backbone."""
        x, multiplier = self.embedding(ids), self.config.embedding_multiplier
        return x if multiplier == 1 else x * multiplier

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits from the backbone's output: one column a row of the embedding, padding rows included."""
        weight = self.embedding.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        logits, multiplier = project_to_vocabulary(hidden, weight, self.config.dtype), self.config.logits_multiplier
        return logits if multiplier == 1 else logits * multiplier

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first token: one mixer's state a block.

        Args:
          batch_size: rows.
          max_len: the most tokens a row will ever hold; attention without a window needs it.
        """
        return self.backbone.init_state(batch_size, max_len)

    def extend(
        self,
        ids: Int[Array, "b l"] | None,
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        last_only: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b _ v"], tuple]:
        """Logits for l more tokens, going on from `state`; any split gives the same as the whole.

        Args:
          ids: the next tokens.
          state: from `init_state` or the last `extend`.
          mask: False where a position is not there.
          segment_ids: as in `__call__`; the first token belongs to the segment that the state ended in.
          inputs_embeds: vectors in place of ids, which are None then.
          ahead, layer_inputs, skippable: as in `__call__`, of these tokens: none sees those of a later `extend`.
          last_only: compute the logits of the last position alone, as a prompt needs.
          rngs: as in `__call__`.

        Returns:
          (logits, state): logits (b, l, v), or (b, 1, v) with last_only.
        """
        x = self._vectors(ids, inputs_embeds)
        given: dict[str, Any] = {"ahead": ahead, "layer_inputs": layer_inputs, "skippable": skippable}
        hidden, state = self.backbone.extend(x, state, mask=mask, segment_ids=segment_ids, rngs=rngs, **given)
        return self.head(hidden[:, -1:] if last_only else hidden), state
