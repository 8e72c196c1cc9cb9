"""The loss of the tokens that are hidden is that of all logits, at a part of their price."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from experiments.data.special_tokens import special_tokens
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.masked_loss import masked_loss, masked_sums
from experiments.encoders.masking import Masking, MaskingConfig
from tests.numerics import assert_close, with_random_parameters
from zoo.models.build import build


def small_model(**options):
    config = zoo.MaskedLMConfig(
        **{"d_model": 16, "n_layers": 1, "pattern": "attn/mlp", "vocab_size": 263, "max_len": 64} | options,
        attn=zoo.AttentionConfig(n_heads=2),
        mlp=zoo.MLPConfig(d_ff=16),
    )
    return with_random_parameters(lambda: build(config, rngs=nnx.Rngs(0)))


def hidden_batch(b=3, length=40, rate=0.3):
    random = np.random.default_rng(0)
    masking = Masking(MaskingConfig(), ByteTokenizer())
    tokens = random.integers(0, 256, (b, length)).astype(np.int32)
    tokens[1, 30:] = special_tokens(ByteTokenizer()).pad
    masked = masking(tokens, random, rate=rate)
    return jax.tree.map(jnp.asarray, masked._asdict() | {"mask": tokens != special_tokens(ByteTokenizer()).pad})


def full_loss(model, batch, rngs):
    """The same loss with logits at every position: what gathering saves."""
    logits = model(batch["tokens"], batch["mask"], rngs=rngs)
    rows = jnp.arange(len(logits))[:, None]
    targets = jnp.zeros(batch["tokens"].shape, jnp.int32).at[rows, batch["positions"]].add(batch["targets"])
    weights = jnp.zeros(batch["tokens"].shape).at[rows, batch["positions"]].add(batch["weights"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nats * weights), jnp.sum(weights)


def test_the_loss_is_that_of_all_logits_at_the_hidden_positions():
    model, batch = small_model(), hidden_batch()
    graphdef, params = nnx.split(model)

    def of(loss):
        return jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), batch, None)[0]))(params)

    (total, gradients), (expected, expected_gradients) = of(masked_loss), of(full_loss)
    assert_close(total, expected)
    assert_close(gradients, expected_gradients, gradient=True)
    sums = masked_sums(model, batch, None)
    assert float(sums.weight) == full_loss(model, batch, None)[1] == 12 + 9 + 12
    logits = np.asarray(model(batch["tokens"], batch["mask"]))
    hits = [
        logits[i, p].argmax() == t
        for i in range(3)
        for p, t, w in zip(batch["positions"][i], batch["targets"][i], batch["weights"][i], strict=True)
        if w
    ]
    assert float(sums.correct) == sum(hits)


@pytest.mark.slow
def test_a_mixture_of_experts_is_trained_with_its_balance():
    model, batch = small_model(pattern="attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]"), hidden_batch()
    auxiliary = model.run(batch["tokens"], batch["mask"])[1]
    assert masked_loss(model, batch, None).auxiliary == auxiliary > 0.4
    assert masked_loss(small_model(), batch, None).auxiliary is None


def test_gathering_first_saves_memory_and_operations():
    """At 30 % of the positions, and a vocabulary much wider than the model, to about 30 %."""
    model, batch = small_model(vocab_size=8192), hidden_batch(b=8, length=64)
    graphdef, params = nnx.split(model)

    def cost(loss):
        function = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params), batch, None)[0]))
        compiled = function.lower(params).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, memory), (all_flops, all_memory) = cost(masked_loss), cost(full_loss)
    assert flops < 0.4 * all_flops
    assert memory < 0.4 * all_memory
