"""The table of a model: its parts add up, and its states are those that decoding carries."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm
import zoo
from zoo.stack.mixers import MIXERS

SHAPE = {"d_model": 16, "vocab_size": 30, "attn": zoo.AttentionConfig(n_heads=2), "mlp": zoo.MLPConfig(d_ff=32)}
CAUSAL = zoo.CausalLMConfig(**SHAPE, n_layers=4, pattern="mamba*2 attn/mlp attn[window=4]/mlp")


def abstract(kind, config):
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def n_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def n_bytes(model, length):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1, length)))


def test_parts_add_up_and_states_are_those_of_decoding(capsys):
    model = zoo.CausalLM(CAUSAL, rngs=nnx.Rngs(0))
    made = zoo.summary(model)
    assert capsys.readouterr().out == f"{made}\n"
    assert made.parameters == n_parameters(model) == sum(row.parameters for row in made.rows)
    names = [row.part for row in made.rows]
    assert names == ["embedding", "layers.0", "layers.1", "layers.2", "layers.3", "norm_f", "head"]
    mamba, _, attention, window = made.rows[1:5]
    assert (mamba.kind, mamba.shape, mamba.dtype) == ("mamba", ("b", "l", 16), "float32")
    assert (mamba.state_bytes_per_token, mamba.state_tokens) == (0, None)
    # Keys, values, the position and the segment of each: two heads of eight channels in float32.
    assert (attention.state_bytes_per_token, attention.state_tokens) == (2 * 16 * 4 + 8, None)
    assert window.state_bytes_per_token == 0
    for length in (8, 100):
        assert made.state_bytes + length * made.state_bytes_per_token == n_bytes(model, length)


def test_a_window_ends_the_growth_of_a_state():
    model = abstract(zoo.CausalLM, dataclasses.replace(CAUSAL, n_layers=1, pattern="attn[window=100]/mlp"))
    (layer,) = (row for row in zoo.summary(model, show=False).rows if row.part == "layers.0")
    assert (layer.state_bytes_per_token, layer.state_tokens) == (2 * 16 * 4 + 8, 100)
    assert "136 B up to 100" in str(zoo.summary(model, show=False))


def test_flops_are_two_a_weight_and_what_attention_sees():
    model = abstract(zoo.CausalLM, CAUSAL)
    rows = {row.part: row for row in zoo.summary(model, seq_len=100, show=False).rows}
    weights = 4 * 16 * 16 + 3 * 16 * 32
    assert rows["layers.2"].flops_per_token == 2 * weights + 4 * 16 * 50
    assert rows["layers.3"].flops_per_token == 2 * weights + 4 * 16 * 2
    assert rows["head"].flops_per_token == 2 * 32 * 16
    assert rows["embedding"].flops_per_token == 0


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (zoo.MaskedLM, zoo.MaskedLMConfig(**SHAPE, n_layers=2, pattern="mamba")),
        (
            zoo.SequenceClassifier,
            zoo.SequenceClassifierConfig(**SHAPE, n_layers=2, pattern="attn/mlp", pool="attention"),
        ),
        (zoo.TokenClassifier, zoo.TokenClassifierConfig(**SHAPE, n_layers=1, pattern="m2/monarch", n_labels=5)),
        (zoo.Encoder, zoo.EncoderConfig(**SHAPE, n_layers=1, pattern="attn/mlp")),
        (zoo.ImageClassifier, zoo.ImageClassifierConfig(d_model=16, n_layers=2, image_size=8, patch_size=4)),
        (zoo.Backbone, zoo.BackboneConfig(d_model=16, n_layers=2, pattern="mamba")),
        (zoo.CausalLM, zoo.CausalLMConfig(**SHAPE, n_layers=3, pattern="attn/mlp@a mamba attn/mlp@a")),
        (
            zoo.CausalLM,
            zoo.CausalLMConfig(
                **SHAPE,
                n_layers=2,
                pattern="zamba2",
                zamba2=zoo.Zamba2Config(n_heads=2),
                mamba2=ssm.Mamba2Config(head_dim=16),
            ),
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_model_has_a_table_whose_parts_add_up(kind, config):
    model = abstract(kind, config)
    made = zoo.summary(model, show=False)
    assert made.parameters == n_parameters(model)
    looks_both_ways = not getattr(config, "causal", True)
    assert (made.state_bytes is None) == looks_both_ways
    assert made.flops_per_token > 0
    assert "total" in str(made)


def test_a_mixer_of_one_s_own_has_its_row():
    @dataclasses.dataclass(frozen=True)
    class Options:
        width: int = 3

    class Average(ssm.Mixer):
        def __init__(self, d_model, config, *, residual_scale, dtype, param_dtype, rngs):
            self.proj, self.width = nnx.Linear(d_model, d_model, use_bias=False, rngs=rngs), config.width

        def init_state(self, batch_size, max_len=None):
            return jnp.zeros((batch_size, self.width))

    zoo.register_mixer("average_of_summary", Average, Options())
    try:
        model = abstract(zoo.CausalLM, dataclasses.replace(CAUSAL, n_layers=1, pattern="average_of_summary[width=5]"))
        row = zoo.summary(model, show=False).rows[1]
    finally:
        del MIXERS["average_of_summary"]
    assert (row.kind, row.state_bytes, row.flops_per_token) == ("average_of_summary[width=5]", 20, 2 * 16 * 16)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_backbone_is_refused():
    with pytest.raises(ValueError, match="model is a Linear, expected one with a Backbone"):
        zoo.summary(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
