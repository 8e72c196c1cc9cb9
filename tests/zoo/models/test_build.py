"""What a config describes, without arrays."""

import time

import jax
import pytest
from flax import nnx

import m2
import ssm
import zoo
from zoo.models.build import abstract, build

SMALL = {"d_model": 16, "vocab_size": 24}
CONFIGS = {
    "hybrid": zoo.CausalLMConfig(d_model=64, vocab_size=24, n_layers=3, pattern="mamba mamba2/mlp attn/moe"),
    "encoder": zoo.MaskedLMConfig(**SMALL, n_layers=2, pattern="m2/monarch", m2=m2.M2Config(l_max=16)),
    "images": zoo.ImageClassifierConfig(d_model=16, n_layers=2, pattern="attn/mlp", image_size=8, patch_size=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_abstract_model_is_the_model_without_its_numbers(name):
    model, described = build(CONFIGS[name], rngs=0), abstract(CONFIGS[name])
    assert nnx.graphdef(model) == nnx.graphdef(described)
    shapes, there = (dict(nnx.to_flat_state(nnx.state(each))) for each in (model, described))
    assert {path: (x.shape, x.dtype) for path, x in shapes.items()} == {p: (x.shape, x.dtype) for p, x in there.items()}
    assert all(isinstance(x.get_value(), jax.ShapeDtypeStruct) for x in there.values())
    assert {p: x.get_metadata() for p, x in shapes.items()} == {p: x.get_metadata() for p, x in there.items()}


@pytest.mark.slow
def test_hundreds_of_layers_are_described_in_seconds():
    """In the time of their square a hundred took 50 s."""
    start = time.process_time()
    converted = ssm.LinearAttentionConfig(n_heads=2, init="mimic")
    model = abstract(zoo.CausalLMConfig(**SMALL, n_layers=200, pattern="linear_attn", linear_attn=converted))
    assert len(model.backbone.layers) == 200
    assert time.process_time() - start < 10
