"""Attention that becomes linear attention: what is kept, what is computed, and how layers are compared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from experiments.loop import runs
from tests.numerics import assert_close, jitted, normal, with_random_parameters
from zoo.models.build import build
from zoo.published.run_folder import read_model_config

BARE = ssm.LinearAttentionConfig(activation="identity", norm=False, gate=False)
TEACHER = zoo.CausalLMConfig(
    d_model=8,
    n_layers=3,
    pattern="attn/mlp",
    vocab_size=16,
    dtype="float64",
    param_dtype="float64",
    attn=zoo.AttentionConfig(n_heads=4, n_kv_heads=2),
    mlp=zoo.MLPConfig(d_ff=12),
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 9)))


def make(config=TEACHER, **options):
    return with_random_parameters(lambda: build(dataclasses.replace(config, **options), rngs=nnx.Rngs(0)))


def seed(model, *args, **options):
    return zoo.seed_from_attention(model, *args, rngs=nnx.Rngs(1), **options)


def parameters(module):
    return {".".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


MAPS = [f"{name}.kernel" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]


def test_some_layers_are_converted_and_all_else_is_the_teachers(x64):
    teacher = make()
    student = seed(teacher, [2, 1])
    assert student.config.pattern == "attn/mlp linear_attn/mlp*2"
    assert zoo.converted_layers(teacher.backbone, student.backbone) == (1, 2)
    theirs, ours = parameters(teacher), parameters(student)
    for name, value in ours.items():
        if any(name == f"backbone.layers.{i}.mixer.{kept}" for i in (1, 2) for kept in MAPS):
            np.testing.assert_array_equal(value, theirs[name])
            assert value is not theirs[name], name  # it will be trained
        elif ".1.mixer." not in name and ".2.mixer." not in name:
            assert value is theirs[name], name
    # Nothing else is in the new mixers but what attention does not have.
    new = {name.removeprefix("backbone.layers.1.mixer.") for name in ours if ".1.mixer." in name} - set(MAPS)
    assert new == {
        "A_log",
        "dt_bias",
        "dt_proj.kernel",
        "conv1d.kernel",
        "conv1d.bias",
        "gate_proj.kernel",
        "norm.scale",
    }
    assert not np.any(ours["backbone.layers.1.mixer.dt_proj.kernel"])  # mimic
    mixer = student.backbone.layers[1].mixer
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.head_dim) == (4, 2, 2)


def test_the_student_is_the_model_that_its_config_describes(x64, tmp_path):
    student = seed(make(), config=dataclasses.replace(BARE, d_conv=3))
    runs.save_model_config(student.config, tmp_path)
    back = read_model_config(tmp_path)
    assert back == student.config
    assert back.pattern == "linear_attn/mlp*3"
    again = build(back, rngs=nnx.Rngs(0))
    nnx.update(again, nnx.state(student))
    call, params = jitted(again)
    assert_close(call(params, IDS), jitted(student)[0](params, IDS))


@pytest.mark.parametrize(("init", "copied"), [("mimic", True), ("copy", True), ("random", False)])
def test_what_the_ways_to_start_copy(x64, init, copied):
    teacher = make(n_layers=1)
    mixer = seed(teacher, init=init).backbone.layers[0].mixer
    for name in MAPS:
        assert np.array_equal(parameters(mixer)[name], parameters(teacher.backbone.layers[0].mixer)[name]) == copied
    assert bool(np.any(mixer.dt_proj.kernel[...])) == (init != "mimic")


def test_a_seeded_layer_is_attention_without_softmax_rotation_and_scale(x64):
    teacher = make(n_layers=1)
    mixer = seed(teacher, config=BARE).backbone.layers[0].mixer
    mixer.A_log[...] = jnp.full_like(mixer.A_log[...], -jnp.inf)  # no decay; the convolution lets through as it is
    x, p = normal(jax.random.key(1), 2, 9, 8), parameters(teacher.backbone.layers[0].mixer)
    q, k, v = ((x @ p[name]).reshape(2, 9, -1, 2) for name in MAPS[:3])
    k, v = (jnp.repeat(m, 2, axis=2) for m in (k, v))
    scores = jnp.einsum("bqhp,bshp->bhqs", q, k) * jnp.tri(9)
    expected = jnp.einsum("bhqs,bshp->bqhp", scores, v).reshape(2, 9, 8) @ p[MAPS[3]]
    assert_close(jax.jit(mixer.__call__)(x), expected)


def test_layers_of_other_shapes_have_words_of_their_own(x64):
    teacher = make(pattern="attn/mlp attn[bias=true,n_kv_heads=1]/mlp attn[head_dim=4]", n_layers=3)
    student = seed(teacher)
    assert student.config.pattern == ("linear_attn/mlp linear_attn[bias=true,n_kv_heads=1]/mlp linear_attn[head_dim=4]")
    assert [layer.mixer.head_dim for layer in student.backbone.layers] == [2, 2, 4]
    np.testing.assert_array_equal(
        student.backbone.layers[1].mixer.k_proj.bias[...], teacher.backbone.layers[1].mixer.k_proj.bias[...]
    )


def test_layers_may_be_converted_one_after_another(x64):
    once = seed(make(), [0, 2])
    twice = seed(once, [1], config=BARE)
    assert twice.config.pattern == (
        "linear_attn/mlp linear_attn[activation=identity,gate=false,norm=false]/mlp linear_attn/mlp"
    )
    assert twice.config.linear_attn == once.config.linear_attn
    assert parameters(twice)["backbone.layers.0.mixer.A_log"] is parameters(once)["backbone.layers.0.mixer.A_log"]


def test_an_encoder_reads_both_ways_from_the_same_maps(x64):
    fields = {name: getattr(TEACHER, name) for name in ("d_model", "pattern", "vocab_size", "attn", "mlp")}
    teacher = make(zoo.MaskedLMConfig(n_layers=1, max_len=9, norm_place="pre", **fields))
    student = seed(teacher, config=BARE)
    mixer, old = student.encoder.backbone.layers[0].mixer, teacher.encoder.backbone.layers[0].mixer
    for direction in (mixer.forward, mixer.backward):
        np.testing.assert_array_equal(direction.q_proj.kernel[...], old.q_proj.kernel[...])
    assert jax.eval_shape(student, IDS).shape == (2, 9, 16)
    assert zoo.backbone_of(student) is student.encoder.backbone


def test_blocks_are_compared_on_what_enters_the_teachers(x64):
    teacher = make()
    student = seed(teacher, [0, 2], init="copy")
    x, segments = teacher.embedding(IDS), jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])

    def compare(x):
        pairs = zoo.compare_layers(teacher.backbone, student.backbone, x, segment_ids=segments)
        return [(pair.x, pair.teacher, pair.student) for pair in pairs]

    compared = jax.jit(compare)(x)
    run = jax.jit(lambda block, x: (block.mixer(block.norm(x), segment_ids=segments), block(x, segment_ids=segments)))
    for layer, (entered, theirs, ours) in zip((0, 2), compared, strict=True):
        stream = x
        for block in teacher.backbone.layers[:layer]:
            stream = run(block, stream)[1]
        for found, model in ((theirs, teacher), (ours, student)):
            # The softmax of attention is float32.
            assert_close(tuple(found), run(model.backbone.layers[layer], stream))
        assert_close(entered, stream)
    assert np.abs(compared[0][1].out - compared[0][2].out).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({}, [3], r"layers=\[3\], expected layers with attention: 0, 1, 2"),
        ({"pattern": "attn/mlp mamba attn"}, [0, 1], r"layers=\[1\], expected layers with attention: 0, 2"),
        ({"pattern": "mamba"}, None, "pattern='mamba', expected layers with attention: in no layer"),
        ({}, [], "expected layers with attention: 0, 1, 2"),
        (
            {"attn": zoo.AttentionConfig(n_heads=2, qk_norm=True)},
            [1],
            "init='mimic' with attn.qk_norm=True in layer 1, expected 'random': linear attention does not normalise",
        ),
    ],
)
def test_layers_without_attention_are_named(x64, options, layers, message):
    model = nnx.eval_shape(lambda: build(dataclasses.replace(TEACHER, **options), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        seed(model, layers)


def test_decodes_from_its_state_what_it_gives_for_the_whole(x64):
    student = seed(make(n_layers=2), [1], config=ssm.LinearAttentionConfig(chunk_size=4))
    whole, params = jitted(student)
    extend, _ = jitted(student, "extend")
    state, outputs = student.init_state(2, 9), []
    for piece in (IDS[:, :6], *jnp.split(IDS[:, 6:], 3, axis=1)):
        y, state = extend(params, piece, state)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), whole(params, IDS))  # of layer 0
