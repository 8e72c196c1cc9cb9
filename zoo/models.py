"""Whole models: embed, backbone, head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zoo.backbone import Backbone, BackboneConfig
from zoo.linear import linear


@dataclasses.dataclass(frozen=True)
class CausalLMConfig(BackboneConfig):
    """A backbone with a vocabulary."""

    vocab_size: int = 0
    """Token ids that mean something: 0 to vocab_size - 1. 0 is not known yet: experiments take the tokenizer's."""
    pad_vocab_multiple: int = 8
    """The embedding has vocab_size rows, rounded up to a multiple of this."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding itself."""

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size={self.vocab_size}, expected at least 0")
        if self.pad_vocab_multiple < 1:
            raise ValueError(f"pad_vocab_multiple={self.pad_vocab_multiple}, expected at least 1")
        if not self.causal:
            raise ValueError("causal=False, but a causal language model predicts from earlier positions only")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, columns of the logits."""
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple


class CausalLM(nnx.Module):
    """A language model that predicts each token from those before it.

    Args:
      config: shape and options; its vocab_size must be known.
      rngs: source of keys, stream "params".

    Source: `MambaLMHeadModel` in mamba_ssm/models/mixer_seq_simple.py (no positional embedding; normal(0.02)
      embedding; head tied to it).
    """

    def __init__(self, config: CausalLMConfig, *, rngs: nnx.Rngs):
        if config.vocab_size == 0:
            raise ValueError("vocab_size=0, expected the number of token ids before a model is built")
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        rows = config.padded_vocab_size
        self.embedding = nnx.Embed(
            rows,
            config.d_model,
            dtype=param_dtype,  # tokens enter the residual stream unrounded
            param_dtype=param_dtype,
            embedding_init=jax.nn.initializers.normal(0.02),
            rngs=rngs,
        )
        self.backbone = Backbone(config, rngs=rngs)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            self.lm_head = linear(config.d_model, rows, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l v"]:
        """Logits of the next token at every position, in at least float32.

        Args:
          ids: token ids.
          mask: False where a position is not there (padding, at either end).
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          rngs: stream "dropout" switches dropout on; None leaves it off.
        """
        return self.head(self.hidden(ids, mask, segment_ids, rngs=rngs))

    def hidden(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b l d"]:
        """The backbone's output, after its final normalisation."""
        return self.backbone(self.embedding(ids), mask=mask, segment_ids=segment_ids, rngs=rngs)

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits from the backbone's output: one column a row of the embedding, padding rows included."""
        weight = self.embedding.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        dtype = jnp.dtype(self.config.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        return jnp.matmul(hidden.astype(dtype), weight.astype(dtype), preferred_element_type=wide)

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first token: one mixer's state a block.

        Args:
          batch_size: rows.
          max_len: the most tokens a row will ever hold; attention without a window needs it.
        """
        return self.backbone.init_state(batch_size, max_len)

    def extend(
        self,
        ids: Int[Array, "b l"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        last_only: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b _ v"], tuple]:
        """Logits for l more tokens, going on from `state`; any split gives the same as the whole.

        Args:
          ids: the next tokens.
          state: from `init_state` or the last `extend`.
          mask: False where a position is not there.
          segment_ids: as in `__call__`; the first token belongs to the segment that the state ended in.
          last_only: compute the logits of the last position alone, as a prompt needs.
          rngs: as in `__call__`.

        Returns:
          (logits, state): logits (b, l, v), or (b, 1, v) with last_only.
        """
        hidden, state = self.backbone.extend(self.embedding(ids), state, mask=mask, segment_ids=segment_ids, rngs=rngs)
        return self.head(hidden[:, -1:] if last_only else hidden), state
