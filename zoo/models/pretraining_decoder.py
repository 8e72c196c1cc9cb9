"""Blocks above an encoder that help it to learn and are thrown away: BPDec.

They read what the encoder gives. Of the tokens to be guessed the first block sees some, drawn anew at each step, the
last all of them, for by then they are better guesses. What the head reads in training is, at each position by itself,
theirs or the encoder's own; outside of training it is the encoder's.

Source: Liang & Liang 2024, arXiv:2401.15861 (DrBERT, later BPDec): gradual unmasking, output randomness.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zoo.layers.rngs import Seed, as_rngs
from zoo.stack.backbone_config import BackboneConfig, mixer_needs
from zoo.stack.block import Block, make_norm
from zoo.stack.gaps import close_gaps
from zoo.stack.pattern import mixer_name, parse_pattern


class PretrainingDecoder(nnx.Module):
    """Blocks that take part in training alone.

    Args:
      config: shape and options; its pattern and n_layers are those of the decoder.
      share: chance that a position's output is the decoder's, not the encoder's.
      rngs: source of keys, stream "params", or a seed.

    Raises:
      ValueError: a mixer that needs more than positions and their mask.

    Examples:
      >>> config = zoo.BackboneConfig(d_model=8, n_layers=2, pattern="mamba", causal=False)
      >>> decoder = zoo.PretrainingDecoder(config, share=0.5, rngs=0)
      >>> x, guessed = jnp.ones((1, 4, 8)), jnp.array([[False, True, True, False]])
      >>> decoder(x, guessed, rngs=nnx.Rngs(dropout=0))[0].shape
      (1, 4, 8)
    """

    def __init__(self, config: BackboneConfig, *, share: float, rngs: Seed):
        words, rngs = parse_pattern(config.pattern, config.n_layers), as_rngs(rngs)
        for mixer in (mixer for word in words for mixer in (*word.mixers, word.channel) if mixer):
            if missing := {*mixer_needs(config, mixer)} & {"grid", "embeddings", "shared"}:
                raise ValueError(f"decoder of {config.pattern!r}: {mixer_name(mixer)} needs {', '.join(missing)}")
        self.share = share
        self.blocks = nnx.List([Block(config, word, rngs=rngs) for word in words])
        self.norm_f = make_norm(config, rngs) if config.norm_place == "pre" else None

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        guessed: Bool[Array, "b l"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """What the head reads in training, and what the blocks' mixers add to the loss.

        Args:
          hidden: the encoder's output.
          guessed: True where a token is to be guessed.
          mask: False where a position is not there.
          segment_ids: documents packed in a row, each a run of equal ids.
          rngs: stream "dropout": which tokens are seen, whose output is read, and dropout.
        """
        chance, wide = jax.random.uniform(rngs.dropout(), guessed.shape), hidden.dtype
        x, total = hidden, jnp.float32(0)
        for i, block in enumerate(self.blocks):
            seen = ~guessed | (chance < (i + 1) / len(self.blocks))
            seen = seen if mask is None else seen & mask
            closed = close_gaps(seen, segment_ids)
            given: dict[str, Any] = {"mask": closed.mask, "segment_ids": closed.segment_ids}
            y, loss = block.run(closed.close(x), key=rngs.dropout(), training=True, **given)
            x, total = jnp.where(seen[..., None], closed.open(y), x), total + loss
        x = x if self.norm_f is None else self.norm_f(x)
        own = jax.random.bernoulli(rngs.dropout(), self.share, guessed.shape)
        return jnp.where(own[..., None], x, hidden).astype(wide), total


def decoder_config(config: BackboneConfig, n_layers: int, pattern: str | None) -> BackboneConfig:
    """The config of a decoder of an encoder: its options, with other blocks."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(BackboneConfig)}
    return BackboneConfig(
        **fields | {"n_layers": n_layers, "pattern": pattern or config.pattern, "first_norm": True, "causal": False}
    )
