"""Small encoders are of one size, and of any mixer."""

import dataclasses

from flax import nnx

import ssm
from experiments.encoders.shapes import small_encoder
from experiments.loop.model_size import count_params
from zoo.models.build import build


def test_the_small_encoders_are_of_one_size_whatever_the_mixer():
    base = dataclasses.replace(small_encoder(128, 4, 512), vocab_size=8192)
    patterns = ("m2/monarch", "mamba", "mamba2", "attn/mlp")
    sizes = [count_params(dataclasses.replace(base, pattern=pattern)) for pattern in patterns]
    assert max(sizes) < 1.005 * min(sizes)


def test_bidirectional_state_spaces_and_monarch_mixers_by_one_flag():
    config = small_encoder(16, 1, 64)
    for pattern, kind in (("mamba2", ssm.Bidirectional), ("m2/monarch", object)):
        model = dataclasses.replace(config, pattern=pattern, vocab_size=64)
        mixer = nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0))).encoder.backbone.layers[0].mixer
        assert isinstance(mixer, kind)
        assert not mixer.causal
