"""Published models by name: their sizes are the published ones."""

import math

import jax
import pytest
from flax import nnx

import zoo


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
        ("mamba3-siso-187m", 186_849_600),
        ("mamba3-siso-440m", 443_015_680),
        ("mamba3-siso-880m", 892_782_336),
        ("mamba3-siso-1.5b", 1_494_723_584),
        ("mamba3-mimo-187m", 187_291_968),
        ("mamba3-mimo-440m", 444_195_328),
        ("mamba3-mimo-880m", 894_551_808),
        ("mamba3-mimo-1.5b", 1_497_082_880),
        ("falcon-mamba-7b", 7_272_665_088),
        ("codestral-mamba-7b", 7_285_403_648),
        ("m2-gpt-145m", 144_730_240),
        ("m2-gpt-360m", 361_553_760),
        ("m2-bert-80m", 80_267_328),
        ("m2-bert-110m", 115_583_616),
        ("m2-bert-260m", 259_133_760),
        ("m2-bert-341m", 341_038_144),
        ("m2-bert-80m-2k", 81_972_288),
        ("m2-bert-80m-8k", 87_428_160),
        ("m2-bert-80m-32k", 109_251_648),
        ("m2-bert-341m-2k", 344_709_184),
        ("m2-bert-80m-2k-retrieval", 81_940_224),
        ("m2-bert-80m-8k-retrieval", 87_396_096),
        ("m2-bert-80m-32k-retrieval", 109_219_584),
    ],
)
def test_has_as_many_parameters_as_its_checkpoint(name, parameters):
    n_layers = zoo.presets[name].n_layers
    one, two = (count_parameters(name, n_layers=n) for n in (1, 2))
    assert one + (n_layers - 1) * (two - one) == parameters  # all layers are alike, and building them takes a while


def count_parameters(name, **overrides):
    model = nnx.eval_shape(lambda: zoo.create(name, rngs=nnx.Rngs(0), **overrides))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


def test_every_preset_is_tested():
    tested = {name for name, _ in test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1]}
    assert tested == set(zoo.presets)


def test_create_takes_overrides_and_leaves_the_preset_alone():
    options = {"n_layers": 1, "dtype": "bfloat16", "attn": zoo.AttentionConfig(window=4)}
    model = nnx.eval_shape(lambda: zoo.create("mamba-130m", rngs=nnx.Rngs(0), **options))
    assert len(model.backbone.layers) == 1
    assert (model.config.dtype, model.config.attn.window, model.config.d_model) == ("bfloat16", 4, 768)
    assert zoo.presets["mamba-130m"].n_layers == 24


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("mamba-130", {}, "unknown preset 'mamba-130', did you mean 'mamba-130m'\\? Known: codestral-mamba-7b"),
        ("gpt", {}, "unknown preset 'gpt'. Known: codestral-mamba-7b, falcon-mamba-7b"),
        ("mamba-130m", {"n_layer": 2}, "unknown config field 'n_layer', did you mean 'n_layers'"),
        ("mamba-130m", {"n_layers": 0}, "n_layers=0, expected at least 1"),
    ],
)
def test_errors_name_the_nearest_known(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.create(name, rngs=nnx.Rngs(0), **overrides)
