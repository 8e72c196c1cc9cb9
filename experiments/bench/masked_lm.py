"""Contenders of `bench mlm`: one training step's loss and gradient of small encoders of equal size, by mixer.

Masked language models of four blocks' options (`shapes.small_encoder`), filters as long as the sequence, 30 % of the
tokens hidden. The head sees the hidden positions alone; "all logits" is attention with the head at every position.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import zoo
from experiments.bench.contenders import Call, Contender, JaxCall, Pass, Sizes
from experiments.encoders.masked_loss import masked_loss
from experiments.encoders.shapes import small_encoder

RATE = 0.3


def encoder(sizes: Sizes, pattern: str) -> zoo.MaskedLMConfig:
    """A small encoder with the widths of the benchmark."""
    config = small_encoder(sizes.d_model, sizes.layers, sizes.length)
    return dataclasses.replace(config, pattern=pattern, vocab_size=sizes.vocab_size)


def make_batch(sizes: Sizes) -> dict[str, jax.Array]:
    """Random tokens, some of them to be guessed."""
    random = np.random.default_rng(0)
    b, length, k = sizes.batch, sizes.length, max(1, round(RATE * sizes.length))
    return {
        "tokens": jnp.asarray(random.integers(0, sizes.vocab_size, (b, length)), jnp.int32),
        "mask": jnp.ones((b, length), bool),
        "positions": jnp.asarray(np.sort(random.permuted(np.tile(np.arange(length), (b, 1)), axis=1)[:, :k])),
        "targets": jnp.asarray(random.integers(0, sizes.vocab_size, (b, k)), jnp.int32),
        "weights": jnp.ones((b, k)),
    }


def all_logits_loss(model: zoo.MaskedLM, batch, rngs):
    """`masked_loss` with the head at every position, and the hidden ones taken from its logits."""
    logits = model(batch["tokens"], batch["mask"])
    logits = jnp.take_along_axis(logits, batch["positions"][..., None], axis=1)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(nats * batch["weights"]), jnp.sum(batch["weights"])


def _step(pattern: str, loss=masked_loss) -> Contender:
    def build(sizes: Sizes) -> dict[Pass, Call]:
        graphdef, params = nnx.split(zoo.MaskedLM(encoder(sizes, pattern), rngs=nnx.Rngs(0)))

        def mean(params, batch):
            total, weight = loss(nnx.merge(graphdef, params), batch, None)[:2]
            return total / weight

        arguments = (params, make_batch(sizes))
        return {"forward": JaxCall(mean, *arguments), "backward": JaxCall(jax.grad(mean), *arguments)}

    return build


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "mlm": {
        "m2/monarch": _step("m2/monarch"),
        "mamba2, both ways": _step("mamba2"),
        "attn/mlp": _step("attn/mlp"),
        "attn/mlp, all logits": _step("attn/mlp", all_logits_loss),
    }
}
