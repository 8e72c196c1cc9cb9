"""What parameters say their axes are along, and which axes of a mesh they lie over."""

import dataclasses
import math

import jax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import m2
import ssm
import zoo
from zoo.layers.mesh_axes import is_over, spec_of, specs_of, without
from zoo.models.build import build

EIGHT = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1, "expert": 1}
EACH_TWO = dict.fromkeys(EIGHT, 2)
SMALL = {"d_model": 32, "n_layers": 1, "vocab_size": 64}


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "spec"),
    [
        (("embed", "inner"), (64, 96), EIGHT, P("fsdp", None)),
        (("embed", "inner"), (63, 96), EIGHT, P(None, "fsdp")),
        (("embed", "inner"), (64, 96), EACH_TWO, P("fsdp", "tensor")),
        (("inner", "embed"), (96, 64), EACH_TWO, P("tensor", "fsdp")),
        (("embed", "inner"), (5, 64, 96), EACH_TWO, P(None, "fsdp", "tensor")),  # a stack of layers
        (("inner", None), (96, 3), EIGHT, P("fsdp", None)),
        (("inner", None), (96, 3), EACH_TWO, P(("tensor", "fsdp"), None)),
        (("inner", None), (98, 3), EACH_TWO, P("tensor", None)),
        (("experts", "embed", "inner"), (4, 64, 96), EACH_TWO, P("expert", "fsdp", "tensor")),
        (("embed", ("heads", 4)), (64, 96), EACH_TWO, P("fsdp", "tensor")),
        (("embed", ("kv heads", 1)), (64, 24), EACH_TWO, P("fsdp", None)),  # one head of keys: on every device
        (("inner",), (96,), EIGHT, P(None)),  # vectors are little
        (("inner",), (96,), EACH_TWO, P("tensor")),
        ((None, None), (96, 64), EACH_TWO, P(None, None)),
        (None, (96, 128), EIGHT, P(None, "fsdp")),  # a mixer of one's own that says nothing
        (None, (7, 9), EIGHT, P(None, None)),
        (("embed", "inner"), (64, 96), {}, P(None, None)),
    ],
)
def test_a_parameter_lies_over_the_first_axes_that_are_free_and_divide(axes, shape, sizes, spec):
    assert spec_of(axes, shape, sizes) == spec


def test_what_is_gathered_stays_cut_along_other_axes():
    spec = P(None, ("tensor", "fsdp"), "fsdp", "expert")
    assert [is_over(spec, axis) for axis in ("fsdp", "tensor", "data")] == [True, True, False]
    assert without(spec, "fsdp") == P(None, "tensor", None, "expert")


def test_names_and_heads_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="unknown parameter axis 'iner', did you mean 'inner'"):
        spec_of(("embed", "iner"), (4, 4), EIGHT)
    with pytest.raises(ValueError, match=r"--mesh\.tensor 2 does not divide the 3 heads of a mixer"):
        spec_of(("embed", ("heads", 3)), (4, 6), EACH_TWO)
    with pytest.raises(ValueError, match="expected at most 1"):
        spec_of(("embed", "inner"), (4,), EIGHT)


ALL_WORDS = "mamba mamba2 mamba3 linear_attn/moe m2/monarch attn/mlp zamba2"
ENCODER = {**SMALL, "n_layers": 3, "pattern": "mamba m2/monarch vim", "norm_bias": True}
MODELS = {
    "causal": zoo.CausalLMConfig(
        **SMALL | {"n_layers": 7},
        pattern=ALL_WORDS,
        tie_embeddings=False,
        layer_scale=0.1,
        moe=zoo.MoEConfig(n_experts=4, bias=True, correction=True, d_latent=16, n_shared=1, shared_gate=True),
        mamba2=ssm.Mamba2Config(head_dim=16),
        mamba3=ssm.Mamba3Config(head_dim=16, is_mimo=True),
        linear_attn=ssm.LinearAttentionConfig(n_heads=4),
        zamba2=zoo.Zamba2Config(n_heads=4),
        attn=zoo.AttentionConfig(n_heads=4, bias=True, d_conv=2),
    ),
    "masked": zoo.MaskedLMConfig(**ENCODER, m2=m2.M2Config(residual_long_conv=True, training_additions=True)),
    "classifier": zoo.SequenceClassifierConfig(**ENCODER, pool="attention", head_activation="gelu"),
    "images": zoo.ImageClassifierConfig(
        d_model=32, n_layers=2, pattern="ss2d m2[conv=2d]/monarch[order=2,n_blocks=2]", class_token="none", pool="mean"
    ),
    "tokens": zoo.ImageClassifierConfig(
        d_model=32, n_layers=1, pattern="attn/mlp", stem="conv", position="learned", attn=zoo.AttentionConfig(n_heads=4)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_says_what_each_of_its_axes_is_along(name):
    model = nnx.eval_shape(lambda: build(MODELS[name], rngs=nnx.Rngs(0)))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = param.get_metadata().get("axes")
        assert axes is not None, path
        assert len(axes) == len(param.shape), path
        spec_of(axes, param.shape, EACH_TWO)  # known names


@pytest.mark.parametrize("name", ["mamba-2.8b", "mamba2-2.7b", "mamba2-hybrid-8b", "mamba3-siso-1.5b", "m2-gpt-360m"])
@pytest.mark.usefixtures("unchecked")  # a mesh without devices is none to the annotation
def test_a_large_model_is_cut_evenly(name):
    config = zoo.presets[name]
    words = sorted({*map(str, zoo.parse_pattern(config.pattern, config.n_layers))})
    config = dataclasses.replace(config, n_layers=len(words), pattern=" ".join(words))
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    total = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    for sizes in ((1, 8, 1, 1, 1), (1, 4, 1, 2, 1), (1, 1, 1, 8, 1)):
        mesh = jax.sharding.AbstractMesh(sizes, tuple(EIGHT))
        shards = jax.tree.map(
            lambda spec, p, mesh=mesh: math.prod(NamedSharding(mesh, spec).shard_shape(p.shape)),
            specs_of(params, mesh),
            params,
            is_leaf=lambda x: isinstance(x, P),
        )
        assert total / 8 <= sum(jax.tree.leaves(shards)) <= 1.02 * total / 8, sizes
