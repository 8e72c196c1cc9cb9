"""Published models by name: their sizes are the published ones."""

import itertools
import math
import os
import subprocess
import sys
from typing import get_args

import jax
import pytest
from flax import nnx

import zoo
from zoo.models.build import MODELS
from zoo.published import preset_names


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
        ("mamba2-hybrid-8b", 8_654_517_248),
        ("mamba2attn-2.7b", 2_697_590_880),
        ("jamba-52b", 51_570_323_328),
        ("bamba-9b", 9_780_235_392),
        ("nemotron-h-8b", 8_100_852_736),
        ("falcon-h1-0.5b", 521_411_104),
        ("falcon-h1-7b", 7_585_519_712),
        ("mamba2-hybrid-tiny", 18_400_760),
        ("jamba-tiny", 39_580_752),
        ("nemotron-h-tiny", 30_890_360),
        ("falcon-h1-tiny", 33_052_816),
        ("smollm2-135m", 134_515_008),
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
        ("bert-base", 109_514_298),
        ("mosaicbert-base", 137_400_384),
        ("mosaicbert-large", 435_221_312),
        ("modernbert-base", 149_655_232),
        ("modernbert-large", 395_881_664),
        ("bimamba-base", 107_038_272),
        ("bimamba2-base", 106_899_056),
        # Those of facebookresearch/deit's models, with one classifier and with two.
        ("vit-tiny", 5_717_416),
        ("vit-small", 22_050_664),
        ("vit-base", 86_567_656),
        ("deit-tiny", 5_910_800),
        ("deit-small", 22_436_432),
        ("deit-base", 87_338_192),
        # Fu et al. 2023: 45M. The paper gives no more digits, and there is no code.
        ("m2-vit-base", 45_582_808),
        # Zhu et al. 2024, table 1: 7M, 26M and 98M.
        ("vim-tiny", 7_148_008),
        ("vim-small", 25_796_584),
        ("vim-base", 97_598_440),
        ("llava-1.5-7b", 7_063_427_072),
        # Ours: VMamba's blocks at one resolution. The published model, of four stages, has other numbers.
        ("ss2d-tiny", 6_363_544),
        ("ss2d-small", 24_736_840),
    ],
)
def test_has_as_many_parameters_as_its_checkpoint(name, parameters):
    # All layers are alike, or all periods of the pattern but for its first norm, and building them takes a while.
    if isinstance(preset := zoo.presets[name], zoo.VisionLanguageConfig):
        few, vision, text = (
            count_parameters(name, vision={"n_layers": v}, text={"n_layers": t}) for v, t in ((1, 1), (2, 1), (1, 2))
        )
        more = (preset.vision.n_layers - 1) * (vision - few) + (preset.text.n_layers - 1) * (text - few)
        assert few + more == parameters
        return
    n_layers, pattern = zoo.presets[name].n_layers, zoo.presets[name].pattern
    if "(" in pattern:  # no period
        words = list(map(str, zoo.parse_pattern(pattern, n_layers)))
        one = {word: count_parameters(name, n_layers=1, pattern=word) for word in set(words)}
        rest = 2 * one[words[0]] - count_parameters(name, n_layers=2, pattern=words[0])
        assert sum(one[word] - rest for word in words) + rest == parameters
        return
    period = 3 if " " in pattern else 1
    few = n_layers % period + period
    less, more = (count_parameters(name, n_layers=n) for n in (few, few + period))
    assert less + (n_layers - few) // period * (more - less) == parameters


def count_parameters(name, **overrides):
    model = nnx.eval_shape(lambda: zoo.create(name, rngs=nnx.Rngs(0), **overrides))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


LARGE_HYBRIDS = ("mamba2-hybrid-8b", "jamba-52b", "bamba-9b", "nemotron-h-8b", "falcon-h1-7b")


@pytest.mark.parametrize("name", LARGE_HYBRIDS)
@pytest.mark.usefixtures("unchecked")  # a mesh without devices is none to the annotation
def test_a_large_hybrid_spreads_over_eight_devices(name):
    """Each device holds an eighth, but for norms, step sizes and the like. One block of each kind is built."""
    rule = zoo.shard_largest(jax.sharding.AbstractMesh((8,), ("data",)))
    words = {*map(str, zoo.parse_pattern(zoo.presets[name].pattern, zoo.presets[name].n_layers))}
    held = total = 0
    for word in words:
        model = nnx.eval_shape(
            lambda w=word: zoo.create(name, rngs=nnx.Rngs(0), n_layers=1, pattern=w, dtype="bfloat16")
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            held += math.prod(rule(path, leaf.shape).shard_shape(leaf.shape))
            total += math.prod(leaf.shape)
    assert total / 8 <= held <= 1.001 * total / 8


SHARDED = """
import math, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
import jax, jax.numpy as jnp
from flax import nnx
import zoo

name = sys.argv[1]
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rule = zoo.shard_largest(mesh)
small = {"dtype": "bfloat16", "param_dtype": "bfloat16", "scan_layers": True}
model = nnx.eval_shape(lambda: zoo.create(name, rngs=nnx.Rngs(0), **small))
graphdef, params = nnx.split(model)
flat = [
    (path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rule(path, leaf.shape))))
    for path, leaf in nnx.to_flat_state(params)
]
ids = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data")))
run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
compiled = run.lower(nnx.from_flat_state(flat), ids).compile()
total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in flat)
print(total, compiled.memory_analysis().argument_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_HYBRIDS)
def test_a_large_hybrid_compiles_for_eight_devices(name):
    """Whole and with its published width; no weights are made."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", SHARDED, name], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    total, on_a_device = map(int, ran.stdout.split())
    assert total / 8 <= on_a_device <= 1.01 * total / 8


# A line of weights and biases for each part, as the papers describe it: embeddings with their norm, a layer, the head.
def bert(d, n_layers, *, vocab, d_ff, table):
    embeddings = (vocab + table) * d + 2 * d
    layer = 4 * (d * d + d) + (d * d_ff + d_ff) + (d_ff * d + d) + 2 * 2 * d
    return embeddings, layer, n_layers, (d * d + d) + 2 * d + vocab


def mosaicbert(d, n_layers):
    _, layer, _, head = bert(d, n_layers, vocab=30_528, d_ff=0, table=0)
    return (30_528 + 2) * d + 2 * d, layer + 3 * d * 4 * d, n_layers, head


def modernbert(d, n_layers, d_ff):
    return 50_368 * d + d, 4 * d * d + 3 * d * d_ff + 2 * d, n_layers, (d * d + d) + 50_368


def total(embeddings, layer, n_layers, head):
    return embeddings + n_layers * layer + head


@pytest.mark.parametrize(
    ("name", "parts", "published"),
    [
        # Devlin et al. 2018, section 3: 110M. The table has 512 positions and 2 kinds of tokens.
        ("bert-base", bert(768, 12, vocab=30_522, d_ff=3072, table=514), 110e6),
        # The model's card: 137M.
        ("mosaicbert-base", mosaicbert(768, 12), 137e6),
        ("mosaicbert-large", mosaicbert(1024, 24), None),
        # Warner et al. 2024, section 2.1: 149M and 395M, which leave the head out.
        ("modernbert-base", modernbert(768, 22, 1152), 149e6),
        ("modernbert-large", modernbert(1024, 28, 2624), 395e6),
    ],
)
def test_encoders_of_attention_have_the_parts_that_their_papers_describe(name, parts, published):
    built = dict(test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1])[name]
    pre_norm = name.startswith("modernbert")  # its last norm is the one that the first block goes without
    assert total(*parts) == built
    if published:
        without_head = total(*parts[:3], 0)
        assert (without_head if pre_norm else built) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("name", "d"), [("ss2d-tiny", 192), ("ss2d-small", 384)])
def test_image_models_of_ss2d_have_the_parts_of_vmambas_blocks(name, d):
    widths = [3, d // 8, d // 4, d // 2, d]
    stem = sum(9 * a * b + b for a, b in itertools.pairwise(widths)) + d * d + d
    e, rank = 2 * d, d // 16
    direction = e * (rank + 2) + (rank * e + e) + e + e  # step sizes, B and C of one state; dt_proj; A; D
    mixer = d * e + 9 * e + 4 * direction + 2 * e + e * d
    layer = mixer + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    built = dict(test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1])[name]
    assert total(stem, layer, 12, 2 * d + 1000 * (d + 1)) == built


def test_the_hybrid_has_the_layers_of_the_study():
    """24 of Mamba-2, 4 of attention, 28 of MLPs, and two tables: 8.66B in all, by Waleffe et al. 2024."""
    config, d, e = zoo.presets["mamba2-hybrid-8b"], 4096, 8192
    letters = zoo.canonical_pattern(config.pattern, config.n_layers, "megatron")
    assert letters == "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    conv, heads = e + 2 * 8 * 128, e // 64
    mamba2 = d * (e + conv + heads) + (4 + 1) * conv + 3 * heads + e + e * d
    parts = 2 * 256_000 * d + 24 * mamba2 + 4 * (2 * d * d + 2 * d * 1024) + 28 * 2 * d * 4 * d + 57 * d
    assert parts == dict(test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1])["mamba2-hybrid-8b"]
    assert parts == pytest.approx(8.66e9, rel=0.001)


def test_the_mambas_that_look_both_ways_are_of_bert_bases_size():
    for name, parameters in test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1]:
        if name.startswith("bimamba"):
            assert parameters == pytest.approx(110e6, rel=0.03)


def test_every_preset_is_tested():
    tested = {name for name, _ in test_has_as_many_parameters_as_its_checkpoint.pytestmark[0].args[1]}
    assert tested == set(zoo.presets)


@pytest.mark.parametrize(
    "kind", [zoo.CausalLM, zoo.MaskedLM, zoo.SequenceClassifier, zoo.ImageClassifier, zoo.VisionLanguageModel]
)
def test_the_names_of_each_kind_are_those_of_its_presets(kind):
    of_kind = [name for name, config in zoo.presets.items() if MODELS[type(config)] is kind]
    assert [*get_args(getattr(preset_names, f"{kind.__name__}Name"))] == of_kind
    assert of_kind


def test_every_preset_is_of_a_kind_with_names():
    kinds = {MODELS[type(config)].__name__ for config in zoo.presets.values()}
    assert kinds == {name.removesuffix("Name") for name in vars(preset_names) if name.endswith("Name")}


def test_create_takes_the_kind_that_is_expected():
    model = nnx.eval_shape(lambda: zoo.create("bert-base", rngs=nnx.Rngs(0), kind=zoo.MaskedLM, n_layers=1))
    assert isinstance(model, zoo.MaskedLM)
    with pytest.raises(ValueError, match=r"^name='bert-base' is a MaskedLM, expected kind=CausalLM$"):
        zoo.create("bert-base", rngs=nnx.Rngs(0), kind=zoo.CausalLM)


def test_create_takes_overrides_and_leaves_the_preset_alone():
    options = {"n_layers": 1, "dtype": "bfloat16", "attn": zoo.AttentionConfig(window=4)}
    model = nnx.eval_shape(lambda: zoo.create("mamba-130m", rngs=nnx.Rngs(0), **options))
    assert len(model.backbone.layers) == 1
    assert (model.config.dtype, model.config.attn.window, model.config.d_model) == ("bfloat16", 4, 768)
    assert zoo.presets["mamba-130m"].n_layers == 24


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("mamba-130", {}, "unknown preset 'mamba-130', did you mean 'mamba-130m'\\? Known: bamba-9b, bert-base"),
        ("gpt", {}, "unknown preset 'gpt'. Known: bamba-9b, bert-base, bimamba-base"),
        ("mamba-130m", {"n_layer": 2}, "unknown config field 'n_layer', did you mean 'n_layers'"),
        ("mamba-130m", {"n_layers": 0}, "n_layers=0, expected at least 1"),
    ],
)
def test_errors_name_the_nearest_known(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.create(name, rngs=nnx.Rngs(0), **overrides)
