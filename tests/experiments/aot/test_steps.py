"""The steps that are compiled are those that run, of the batches that the experiments make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments.aot.costs import step_flops
from experiments.aot.steps import batch_of, make_step
from experiments.causal.flops import flops_per_token
from experiments.data.augment import AugmentConfig, mix
from experiments.data.corpus import make_batches
from experiments.data.tokenizers import ByteTokenizer
from experiments.encoders.masking import Masking, MaskingConfig
from experiments.loop.mesh import MeshConfig, make_mesh
from experiments.vision.presets import small_classifier
from tests.experiments.data.texts import stream_of
from zoo.models.build import abstract, build
from zoo.models.flops import weights_met

SMALL = {"d_model": 8, "n_layers": 2, "pattern": "-/mlp", "vocab_size": 263, "scan_layers": True, "remat": True}
CAUSAL, MASKED = zoo.CausalLMConfig(**SMALL), zoo.MaskedLMConfig(**SMALL, max_len=32)
IMAGES = small_classifier(8, 2, 8, 2, pattern="-/mlp", n_classes=3)


@pytest.fixture
def mesh():
    mesh = make_mesh(MeshConfig(), tuple(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        yield mesh


def shapes(batch):
    return {name: (x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for name, x in batch.items()}


def test_batches_are_those_of_the_experiments():
    causal = next(make_batches(stream_of(*[40] * 9), batch_size=4, seq_len=32, seed=0))
    assert shapes(batch_of(CAUSAL, 4, 32)) == shapes(causal)

    random, tokens = np.random.default_rng(0), np.ones((4, 32), np.int32)
    masked = Masking(MaskingConfig(), ByteTokenizer())(tokens, random)._asdict() | {"mask": tokens > 0}
    assert shapes(batch_of(MASKED, 4, 32)) == shapes(masked)

    images, labels = np.zeros((4, 8, 8, 1), np.float32), np.arange(4)
    mixed = {"labels": labels} | mix(images, labels, AugmentConfig(), random)._asdict()
    assert shapes(batch_of(IMAGES, 4)) == shapes(mixed)


@pytest.mark.parametrize("config", [CAUSAL, MASKED, IMAGES], ids=lambda config: type(config).__name__)
def test_a_training_step_takes_and_gives_the_state(mesh, config):
    step = make_step(config, mesh, batch_size=4, seq_len=32, accumulate=2)
    state, metrics = jax.eval_shape(step.program, *step.arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), step.arguments[0]
    )
    assert metrics["loss"].shape == ()
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(step.arguments))


def test_a_token_is_decoded_from_the_state_that_it_gives(mesh):
    config = zoo.CausalLMConfig(**SMALL | {"pattern": "mamba attn"}, attn=zoo.AttentionConfig(n_heads=2))
    step = make_step(config, mesh, "decode", batch_size=4, seq_len=32)
    logits, state = jax.eval_shape(step.program, *step.arguments)
    assert logits.shape == (4, 1, config.padded_vocab_size)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, step.arguments[2])


def test_what_a_model_cannot_do_is_refused(mesh):
    with pytest.raises(ValueError, match="what='decode' with a MaskedLMConfig, expected a CausalLMConfig"):
        make_step(MASKED, mesh, "decode", batch_size=4, seq_len=32)
    with pytest.raises(ValueError, match="seq_len=0, expected at least 1"):
        make_step(CAUSAL, mesh, batch_size=4)
    with pytest.raises(ValueError, match="what='fly'"):
        make_step(CAUSAL, mesh, "fly", batch_size=4, seq_len=32)


def test_operations_are_those_of_all_matrices():
    assert step_flops(CAUSAL, "train", 4, 32) == 4 * 32 * flops_per_token(CAUSAL, 32)
    assert step_flops(CAUSAL, "decode", 4, 32) * 3 * 32 == step_flops(CAUSAL, "train", 4, 32)
    body = 2 * sum(weights_met(block) for block in abstract(MASKED).encoder.backbone.blocks)
    head = 2 * (8 * 8 + 264 * 8)
    assert step_flops(MASKED, "forward", 4, 32) == 4 * 32 * (body + head)
    assert step_flops(MASKED, "train", 4, 32) == 3 * 4 * (32 * body + 10 * head)


def test_operations_of_an_image_are_nearly_the_compilers():
    model = build(IMAGES, rngs=nnx.Rngs(0))
    counted = jax.jit(model).lower(jnp.zeros((4, 8, 8, 1))).compile().cost_analysis()["flops"]
    assert 0.6 * counted < step_flops(IMAGES, "forward", 4) < counted
