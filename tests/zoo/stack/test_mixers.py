"""Mixers of one's own: a few lines and a call, and patterns, training and generation take them like the zoo's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import with_random_parameters
from zoo.stack.mixers import CHANNEL_MIXERS, MIXERS, OURS, find_kind


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    rate: float = 0.5


class Average(ssm.Mixer):
    """y = out_proj(h), h' = h + rate (x - h)."""

    def __init__(self, d_model, config, *, residual_scale=1.0, dtype=None, param_dtype=jnp.float32, rngs):
        self.rate, self.d_model, self.scale = config.rate, d_model, residual_scale
        self.out_proj = nnx.Linear(d_model, d_model, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def init_state(self, batch_size, max_len=None):
        return jnp.zeros((batch_size, self.d_model))

    def _mix(self, x, state, mask, segment_ids):
        def step(h, inputs):
            x, there = inputs
            h = jnp.where(there, h + self.rate * (x - h), h)
            return h, h

        there = jnp.ones(x.shape[:2], bool) if mask is None else mask
        state = self.init_state(len(x)) if state is None else state
        state, y = jax.lax.scan(step, state, (x.swapaxes(0, 1), there.T[..., None]))
        return self.scale * self.out_proj(y.swapaxes(0, 1)), state


class Mean(ssm.Mixer):
    """The mean of all positions, or of those so far."""

    def __init__(self, d_model, config, *, causal, **options):
        self.causal = causal

    def __call__(self, x, *, mask=None, segment_ids=None):
        whole = jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
        return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None] if self.causal else whole


class Scale(nnx.Module):
    def __init__(self, d_model, config, *, residual_scale, param_dtype, rngs, dtype):
        self.scale = nnx.Param(jnp.full(d_model, config.rate, param_dtype))

    def __call__(self, x, *, rngs=None):
        return x * self.scale[...]


@pytest.fixture(autouse=True)
def _registered():
    zoo.register_mixer("average", Average, AverageConfig())
    zoo.register_mixer("mean", Mean, AverageConfig(), two_sided=True)
    zoo.register_channel_mixer("scale", Scale, AverageConfig(rate=1.0))
    yield
    for table in (MIXERS, CHANNEL_MIXERS):
        for name in ("average", "mean", "scale", "norm"):
            table.pop(name, None)


def test_one_trains_a_step_and_generates_in_a_language_model():
    config = zoo.CausalLMConfig(d_model=8, n_layers=2, pattern="average[rate=0.25]+attn/scale average", vocab_size=16)
    config = dataclasses.replace(config, attn=zoo.AttentionConfig(n_heads=2))
    model = with_random_parameters(lambda: zoo.CausalLM(config, rngs=nnx.Rngs(0)))
    first, second = model.backbone.layers
    assert (first.mixer.mixers[0].rate, second.mixer.rate) == (0.25, 0.5)
    assert (first.mixer.mixers[0].scale, first.mlp.scale.shape) == (2**-0.5, (8,))

    graphdef, params = nnx.split(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 9)))

    def loss(params):
        logits = nnx.merge(graphdef, params)(ids[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1))

    step = jax.jit(jax.value_and_grad(loss))
    before, gradients = step(params)
    after, _ = step(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    assert after < before - 1e-3
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]["layers"][1]))

    out = zoo.generate(model, [[1, 2, 3], [4, 5]], 5)
    call = jax.jit(model)
    for t in range(3, 8):
        assert out[0, t] == call(out[:1, :8])[0, t - 1].argmax()


def test_one_that_reads_one_way_is_two_in_an_encoder_and_one_that_looks_both_ways_is_told():
    config = zoo.BackboneConfig(d_model=8, n_layers=2, pattern="average mean", causal=False)
    average, mean = (block.mixer for block in zoo.Backbone(config, rngs=nnx.Rngs(0)).layers)
    assert isinstance(average, ssm.Bidirectional)
    assert isinstance(average.forward, Average)
    assert not mean.causal
    assert zoo.Backbone(dataclasses.replace(config, causal=True), rngs=nnx.Rngs(0)).layers[1].mixer.causal


def test_a_config_with_a_field_of_its_name_gives_its_options():
    @dataclasses.dataclass(frozen=True)
    class Config(zoo.BackboneConfig):
        average: AverageConfig = AverageConfig(rate=0.125)

    zoo.register_mixer("norm", Average, AverageConfig(rate=0.75))  # a field of that name which is no such config
    config = Config(d_model=8, n_layers=3, pattern="average average[rate=1] norm")
    rates = [block.mixer.rate for block in zoo.Backbone(config, rngs=nnx.Rngs(0)).layers]
    assert rates == [0.125, 1, 0.75]


def test_a_registered_mixer_may_be_registered_anew():
    zoo.register_mixer("average", Average, AverageConfig(rate=0.2))
    config = zoo.BackboneConfig(d_model=8, n_layers=1, pattern="average")
    assert zoo.Backbone(config, rngs=nnx.Rngs(0)).layers[0].mixer.rate == 0.2


def test_mistakes_in_a_pattern_know_its_name_and_options():
    with pytest.raises(ValueError, match="unknown mixer 'avrage', did you mean 'average'"):
        zoo.parse_pattern("avrage", 1)
    with pytest.raises(ValueError, match="unknown option of average 'rat', did you mean 'rate'"):
        zoo.parse_pattern("average[rat=1]", 1)
    assert zoo.canonical_pattern("average[rate=0.50]/scale", 2) == "average[rate=0.5]/scale*2"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Average", AverageConfig(), "name='Average', expected lower-case letters"),
        ("my-mixer", AverageConfig(), "name='my-mixer', expected lower-case letters"),
        ("2average", AverageConfig(), "name='2average', expected lower-case"),
        ("attn", AverageConfig(), "name='attn' is taken, expected another than attn, linear_attn, m2"),
        ("mlp", AverageConfig(), "name='mlp' is taken"),
        ("scale", AverageConfig(), "name='scale' is taken"),
        ("other", {"rate": 1}, "config_default={'rate': 1}, expected an instance of a dataclass"),
        ("other", AverageConfig, "expected an instance of a dataclass"),
    ],
)
def test_names_are_words_of_their_own_and_options_a_dataclass(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.register_mixer(name, Average, options)
    assert MIXERS.get("attn").constructor is zoo.Attention


def test_the_config_has_a_field_for_each_of_the_zoos_own():
    config = zoo.BackboneConfig()
    for name in OURS:
        assert getattr(config, name) == find_kind(name).config_default
