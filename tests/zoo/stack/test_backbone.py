"""The stack of blocks: its residual stream, and the switches that may not change what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters

D_MODEL = 8
SMALL = zoo.BackboneConfig(
    d_model=D_MODEL,
    n_layers=3,
    mamba=ssm.MambaConfig(d_state=4, d_conv=3, dt_rank=2),
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=12),
    moe=zoo.MoEConfig(n_experts=3, d_ff=4, bias=True, dropout=0.1, balance_weight=0.5, z_weight=0.1),
)


def make_backbone(**options):
    config = dataclasses.replace(SMALL, **options)
    return with_random_parameters(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0)))


def make_input(length=6, b=2):
    return normal(jax.random.key(1), b, length, D_MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model=0, expected at least 1"),
        ({"remat_rounds": True}, "remat_rounds=True, expected remat=True, norm_place='pre' and mixer_residual=True"),
        ({"n_layers": 0}, "n_layers=0, expected at least 1"),
        ({"dropout": 1.0}, "dropout=1.0, expected 0 <= dropout < 1"),
        ({"dtype": "bf16"}, "dtype='bf16', expected one of bfloat16, float16, float32, float64"),
        ({"param_dtype": "int8"}, "param_dtype='int8', expected one of"),
        ({"norm": "batch"}, "norm='batch', expected 'rms' or 'layer'"),
        ({"norm_place": "both"}, "norm_place='both', expected 'pre' or 'post'"),
        ({"norm_place": "post", "first_norm": False}, "first_norm=False, expected norm_place='pre'"),
    ],
)
def test_config_errors_name_the_option(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.BackboneConfig(**options)


def test_a_block_adds_each_mixer_to_the_stream(x64):
    backbone = make_backbone(pattern="mamba/mlp", n_layers=1, dtype="float64", param_dtype="float64")
    block, x = backbone.layers[0], make_input()

    def rms_norm(x, norm):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * norm.scale[...]

    expected = x + block.mixer(rms_norm(x, block.norm))
    expected = expected + block.mlp(rms_norm(expected, block.norm2))
    assert_close(jax.jit(backbone)(x), rms_norm(expected, backbone.norm_f))


def test_post_norm_and_a_mixer_in_place_of_its_input(x64):
    options = {
        "pattern": "mamba/mlp",
        "n_layers": 1,
        "norm_place": "post",
        "dtype": "float64",
        "param_dtype": "float64",
    }
    x = make_input()

    def rms_norm(x, norm):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * norm.scale[...]

    for mixer_residual in (True, False):
        backbone = make_backbone(**options, mixer_residual=mixer_residual)
        block = backbone.layers[0]
        mixed = rms_norm(x + block.mixer(x), block.norm) if mixer_residual else block.mixer(x)
        expected = rms_norm(mixed + block.mlp(mixed), block.norm2)
        assert_close(jax.jit(backbone)(x), expected)
        assert backbone.norm_f is None
        assert (block.norm is None) == (not mixer_residual)


def test_layer_norm_takes_the_mean_away(x64):
    backbone = make_backbone(
        pattern="-/mlp", n_layers=1, norm="layer", norm_eps=1e-3, dtype="float64", param_dtype="float64"
    )
    block, x = backbone.layers[0], make_input()

    def layer_norm(x, norm):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        scaled = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-3)
        return scaled * norm.scale[...] + norm.bias[...]

    assert_close(backbone(x), layer_norm(x + block.mlp(layer_norm(x, block.norm2)), backbone.norm_f))


def test_a_words_options_are_those_of_its_blocks_alone(x64):
    """Each block is that of a backbone whose config has these options."""
    x, options = make_input(), {"n_layers": 2, "dtype": "float64", "param_dtype": "float64"}
    mixed = make_backbone(pattern="attn[window=2,n_heads=1]/mlp attn/mlp[d_ff=6,gated=false]", **options)
    near, wide = (
        make_backbone(pattern="attn/mlp", **options, **changes)
        for changes in (
            {"attn": zoo.AttentionConfig(n_heads=1, window=2)},
            {"mlp": zoo.MLPConfig(d_ff=6, gated=False)},
        )
    )
    for i, plain in enumerate((near, wide)):
        nnx.update(plain.layers[i], nnx.state(mixed.layers[i]))
        assert_close(mixed.layers[i](x), plain.layers[i](x))
    assert np.abs(mixed.layers[0](x) - wide.layers[0](x)).max() > 1e-3


def test_the_first_block_may_go_without_a_norm(x64):
    options = {"n_layers": 2, "pattern": "attn/mlp", "dtype": "float64", "param_dtype": "float64"}
    backbone, x = make_backbone(first_norm=False, **options), make_input()
    first, second = backbone.layers
    assert first.norm is None

    def rms_norm(x, norm):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * norm.scale[...]

    expected = x + first.mixer(x)
    expected = expected + first.mlp(rms_norm(expected, first.norm2))
    expected = expected + second.mixer(rms_norm(expected, second.norm))
    expected = expected + second.mlp(rms_norm(expected, second.norm2))
    assert_close(backbone(x), rms_norm(expected, backbone.norm_f))
    y, _ = backbone.extend(x, backbone.init_state(2, 6))
    assert_close(y, rms_norm(expected, backbone.norm_f))


def test_layer_norm_may_have_no_bias(x64):
    backbone = make_backbone(
        pattern="-/mlp", n_layers=1, norm="layer", norm_bias=False, dtype="float64", param_dtype="float64"
    )
    x = make_input()
    assert backbone.norm_f.bias is None
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    expected = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    assert_close(backbone.norm_f(x), expected * backbone.norm_f.scale[...])


@pytest.mark.slow
def test_auxiliary_losses_of_all_blocks_add_up_and_padding_does_not_count(x64):
    options = {"pattern": "-/moe -/mlp -/moe[z_weight=0,top_k=1]", "dtype": "float64", "param_dtype": "float64"}
    backbone, x, mask = make_backbone(**options), make_input(), jnp.arange(6) < jnp.array([[4], [6]])
    expected = 0.0
    y = x
    for block in backbone.layers:
        y, loss = block.run(y, mask=mask)
        assert (loss > 0) == isinstance(block.mlp, zoo.MoE)
        expected += loss
    run = jax.jit(backbone.run)
    assert_close(run(x, mask=mask), (backbone.norm_f(y), expected))
    elsewhere = run(jnp.where(mask[..., None], x, 9.0), mask=mask)
    assert_close(elsewhere[1], expected)
    assert abs(run(x)[1] - expected) > 1e-6


def value_and_gradients(backbone, x, key=None):
    """The output and the auxiliary loss, weighted at random, and the gradient in the parameters and the input."""
    graphdef, params = nnx.split(backbone)
    weight = normal(jax.random.key(2), *x.shape)

    def total(params, x, key):
        y, loss = nnx.merge(graphdef, params).run(x, rngs=None if key is None else nnx.Rngs(dropout=key))
        return jnp.sum(y * weight) + loss, (y, loss)

    (_, y), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, x, key)
    return y, jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    ("pattern", "n_layers", "switches"),
    [
        ("-/mlp", 3, [{"remat": True, "remat_keeps": "matmuls"}, {"remat": True}, {"scan_layers": True}]),
        ("mamba", 2, [{"remat": True, "remat_keeps": "matmuls", "scan_layers": True}]),
        pytest.param("attn/mlp", 2, [{"remat": True, "scan_layers": True}], marks=pytest.mark.slow),
        ("-/mlp[d_ff=5] (-/mlp*2 attn)*2", 7, [{"remat": True, "scan_layers": True}]),  # one, and a loop in a loop
        pytest.param("mamba*3 attn/mlp", 9, [{"remat": True, "scan_layers": True}], marks=pytest.mark.slow),
        ("attn attn[window=2], first without norm", 6, [{"remat": True, "scan_layers": True}]),
        ("attn, first without norm", 1, [{"scan_layers": True}]),
        pytest.param("-/moe*2 -/mlp", 7, [{"remat": True, "scan_layers": True}], marks=pytest.mark.slow),
    ],
)
def test_remat_and_scan_layers_change_neither_values_nor_gradients(x64, pattern, n_layers, switches):
    pattern, comma, _ = pattern.partition(",")
    options = {"pattern": pattern, "n_layers": n_layers, "dropout": 0.3, "dtype": "float64", "param_dtype": "float64"}
    options["first_norm"] = not comma
    x, key = make_input(3, b=1), jax.random.key(3)
    expected = value_and_gradients(make_backbone(**options), x, key)
    assert all(np.any(g) for g in expected[1])
    for switch in switches:
        assert_close(
            value_and_gradients(make_backbone(**options, **switch), x, key),
            expected,
            name=str(switch),
        )


def test_a_shared_block_is_the_same_at_every_depth(x64):
    """Its gradient is the sum of those that blocks of their own, with the same parameters, would have."""
    pattern, x = "-/mlp[d_ff=6]*2 -/mlp@a", make_input(3, b=1)
    options = {"n_layers": 6, "dropout": 0.3, "dtype": "float64", "param_dtype": "float64"}
    shared = make_backbone(pattern=pattern, **options)
    assert (len(shared.layers), shared.order) == (5, (0, 1, 2, 3, 4, 2))
    plain = make_backbone(pattern=pattern.replace("@a", ""), **options)
    nnx.update(plain.norm_f, nnx.state(shared.norm_f))
    for own, block in zip(plain.layers, shared.blocks, strict=True):
        nnx.update(own, nnx.state(block))

    def gradients(backbone):
        graphdef, params = nnx.split(backbone)
        run = lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x, rngs=nnx.Rngs(dropout=3)) ** 3)  # noqa: E731
        value, (of_params, of_x) = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(params, x)
        return value, of_x, [jax.tree.leaves(of_params["layers"][i]) for i in range(len(backbone.layers))]

    value, of_x, apart = gradients(plain)
    depths = [[depth for depth, layer in enumerate(shared.order) if layer == i] for i in range(5)]
    summed = [[sum(leaves) for leaves in zip(*(apart[depth] for depth in those), strict=True)] for those in depths]
    for switches in ({}, {"remat": True, "scan_layers": True}):
        switched = make_backbone(pattern=pattern, **options, **switches)
        nnx.update(switched, nnx.state(shared))
        assert_close(gradients(switched), (value, of_x, summed), name=str(switches))


def test_a_shared_block_is_stored_once_and_has_a_state_at_each_depth():
    config = dataclasses.replace(SMALL, pattern="mamba@a attn/mlp@b", n_layers=5)
    shared = nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0)))
    once = nnx.eval_shape(lambda: zoo.Backbone(dataclasses.replace(config, n_layers=2), rngs=nnx.Rngs(0)))
    assert [p for p, _ in nnx.to_flat_state(nnx.state(shared))] == [p for p, _ in nnx.to_flat_state(nnx.state(once))]
    backbone, x = make_backbone(pattern="attn@a"), make_input()
    state, outputs, extend = backbone.init_state(2, 6), [], jax.jit(backbone.extend)
    assert len(state) == 3
    for piece in jnp.split(x, [4, 5], axis=1):
        y, state = extend(piece, state)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), jax.jit(backbone)(x))


def test_a_shared_first_block_cannot_go_without_its_norm():
    with pytest.raises(ValueError, match="first_norm=False, expected pattern='attn@a' to begin with a block of"):
        zoo.BackboneConfig(pattern="attn@a", first_norm=False)


def program_size(pattern, n_layers, scan_layers=True, **options):
    """Matrix products in the program that is compiled."""
    config = dataclasses.replace(SMALL, pattern=pattern, n_layers=n_layers, scan_layers=scan_layers, **options)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))))
    lowered = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)).lower(params, make_input())
    return sum("dot_general" in line for line in lowered.as_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "words"), [("mamba attn/mlp", 2), ("-/mlp*3 attn/mlp", 4)])
def test_scan_layers_compiles_every_word_once_whatever_the_depth(pattern, words):
    once = program_size(pattern.replace("*3", ""), 2, scan_layers=False)
    assert program_size(pattern, 2 * words) == program_size(pattern, 4 * words) == once
    assert program_size(pattern.replace("attn/mlp", "attn/mlp@a"), 3 * words) == once
    assert program_size(pattern.replace("*3", ""), 8, scan_layers=False) == 4 * once


@pytest.mark.slow
def test_scan_layers_finds_what_repeats_in_a_pattern_without_a_period():
    pattern = zoo.hybrid_pattern(24).replace("mamba2", "-/mlp[d_ff=5]")  # cheap in its place
    assert pattern.count("mlp") == 9
    assert pattern.count("attn") == 2
    mlp, attention = program_size("-/mlp", 1), program_size("attn", 1)
    assert program_size(pattern, 24) == 9 * mlp + 2 * attention
    assert program_size(pattern, 24, scan_layers=False) == 22 * mlp + 2 * attention


def test_scan_layers_leaves_out_the_first_block_where_it_is_not_like_the_others():
    pattern, options = "attn[window=2]/mlp attn/mlp", {"first_norm": False}
    once = program_size("attn/mlp", 1, **options)
    assert program_size(pattern, 5, **options) == program_size(pattern, 9, **options) == 3 * once


def test_remat_keeps_less_for_the_backward_pass():
    def temporary_bytes(remat, keeps="nothing"):
        options = {"n_layers": 6, "scan_layers": True, "remat": remat, "remat_keeps": keeps}
        backbone = make_backbone(pattern="-/mlp", mlp=zoo.MLPConfig(d_ff=256), **options)
        graphdef, params = nnx.split(backbone)
        loss = jax.jit(jax.grad(lambda params, x: nnx.merge(graphdef, params)(x).sum()))
        return loss.lower(params, make_input(64)).compile().memory_analysis().temp_size_in_bytes

    nothing, matmuls, everything = temporary_bytes(True), temporary_bytes(True, "matmuls"), temporary_bytes(False)
    assert nothing < 0.5 * everything
    assert nothing < matmuls < 0.8 * everything


@pytest.mark.parametrize("pattern", ["-/mlp", "-/monarch", "-/monarch[order=2]", "-/moe"])
def test_remat_multiplies_no_linear_map_again_where_it_keeps_what_they_give(pattern):
    def products(**options):
        config = dataclasses.replace(SMALL, pattern=pattern, n_layers=1, **options)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))))
        loss = lambda params, x: nnx.merge(graphdef, params)(x).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, make_input())
        return str(jaxpr).count("dot_general")

    kept, anew = products(remat=True, remat_keeps="matmuls"), products(remat=True)
    # Of two factors the first, that the gradient in the second reads; of experts the sum over those of a position.
    assert kept == products() + {"-/monarch[order=2]": 2, "-/moe": 1}.get(pattern, 0)
    assert anew > kept


def test_blocks_may_read_the_stream_rounded_and_keep_half_of_it():
    def program(**more):
        options = {"pattern": "-/mlp", "n_layers": 6, "scan_layers": True, "remat": True, **more}
        graphdef, params = nnx.split(make_backbone(**options))
        return jax.value_and_grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) ** 2)), params

    def kept(**more):  # of all blocks, between the two passes
        function, params = program(**more)
        text = str(jax.make_jaxpr(function)(params))
        return [dtype for dtype in ("f32", "bf16") if f"{dtype}[6,2,6,8]" in text]

    x = make_input()
    assert kept(dtype="bfloat16") == ["f32"]
    assert kept(dtype="bfloat16", remat_rounds=True) == ["bf16"]
    exact, rounded = (jax.jit(f)(p) for f, p in (program(dtype="bfloat16", remat_rounds=r) for r in (False, True)))
    assert_close(rounded[0], exact[0], tolerance=2e-2)  # blocks compute in bfloat16
    assert_close(rounded[1], exact[1], tolerance=5e-2)


def test_dropout_is_off_without_rngs_and_a_function_of_the_key_with_them():
    options = {"pattern": "mamba -/mlp", "n_layers": 2}
    backbone, plain = make_backbone(**options, dropout=0.5), make_backbone(**options)
    run = jax.jit(lambda x, key: backbone(x, rngs=nnx.Rngs(dropout=key)))
    x = make_input()
    off = jax.jit(plain)(x)
    assert np.array_equal(jax.jit(backbone)(x), off)
    assert np.array_equal(jax.jit(plain)(x, rngs=nnx.Rngs(dropout=0)), off)
    once, again, other = (run(x, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(once, again)
    assert not np.allclose(once, off, atol=1e-3)
    assert not np.allclose(once, other, atol=1e-3)


def test_dropout_inside_a_words_channel_mixer_is_on_with_rngs():
    backbone = make_backbone(pattern="-/mlp -/mlp[dropout=0.5]", n_layers=2)
    x = make_input()
    once, again, other = (backbone(x, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1))
    assert np.array_equal(once, again)
    assert not np.allclose(once, other, atol=1e-3)


@pytest.mark.parametrize("pattern", ["attn", "-/mlp"])
def test_dropout_zeroes_the_given_share_of_each_mixers_output(pattern):
    block = make_backbone(pattern=pattern, n_layers=1, dropout=0.25).layers[0]
    x = make_input(500)
    added = np.asarray(jax.jit(block)(x, key=jax.random.key(0)) - x)
    kept = np.asarray(jax.jit(block)(x) - x) / 0.75
    dropped = np.abs(added) < 1e-6
    assert abs(dropped.mean() - 0.25) < 0.02
    assert np.allclose(added[~dropped], kept[~dropped], atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_layers_drop_independently(scan_layers):
    options = {"n_layers": 2, "dropout": 0.5, "scan_layers": scan_layers}
    backbone = make_backbone(pattern="-/mlp", mlp=zoo.MLPConfig(d_ff=4, bias=True), **options)
    for block in backbone.layers:  # each block adds a constant where it does not drop
        block.mlp.down_proj.kernel[...] = jnp.zeros((4, D_MODEL))
        block.mlp.down_proj.bias[...] = jnp.ones(D_MODEL)
    y = jax.jit(backbone)(jnp.zeros((2, 6, D_MODEL)), rngs=nnx.Rngs(dropout=0)) / backbone.norm_f.scale[...]
    by_one_alone = (y > 0) & (y < 0.9 * y.max(axis=-1, keepdims=True))
    assert 0.3 < by_one_alone.mean() < 0.6


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_keeps_the_residual_stream_in_float32_unless_told(residual_in_fp32):
    backbone = make_backbone(pattern="mamba attn/mlp", dtype="bfloat16", residual_in_fp32=residual_in_fp32)
    x, state = make_input(), backbone.init_state(2, 6)
    stream = []

    class Watched(zoo.Block):
        def run(self, x, **kwargs):
            y, loss = super().run(x, **kwargs)
            stream.extend([x.dtype, y.dtype])
            return y, loss

        def extend(self, x, state, **kwargs):
            y, state = super().extend(x, state, **kwargs)
            stream.extend([x.dtype, y.dtype])
            return y, state

    for block in backbone.layers:
        object.__setattr__(block, "__class__", Watched)
    jax.eval_shape(backbone, x)
    jax.eval_shape(backbone.extend, x, state)
    assert set(stream) == {jnp.dtype("float32" if residual_in_fp32 else "bfloat16")}
    assert len(stream) == 2 * 2 * 3


def test_bfloat16_is_float32_rounded():
    x = make_input()
    y = jax.jit(make_backbone(pattern="mamba attn/mlp", n_layers=2, dtype="bfloat16"))(x)
    assert_close(y, jax.jit(make_backbone(pattern="mamba attn/mlp", n_layers=2))(x), tolerance=2e-2)


def test_state_has_one_entry_a_block_of_its_mixers_shape():
    backbone = make_backbone(pattern="mamba -/mlp attn/mlp")
    mamba, nothing, attention = backbone.init_state(2, 10)
    assert (mamba.conv.shape, mamba.ssm.shape) == ((2, 2, 16), (2, 16, 4))
    assert nothing == ()
    assert attention.key.shape == attention.value.shape == (2, 10, 2, 4)
    _, after = jax.jit(backbone.extend)(make_input(), (mamba, nothing, attention))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), after)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), (mamba, nothing, attention))


def test_extend_is_the_whole_call_whatever_the_switches(x64):
    options = {"pattern": "mamba -/mlp attn/mlp", "dtype": "float64", "param_dtype": "float64"}
    backbone = make_backbone(**options, scan_layers=True, remat=True, dropout=0.5)
    y, _ = jax.jit(backbone.extend)(make_input(), backbone.init_state(2, 6))
    assert_close(y, jax.jit(backbone)(make_input()))


def test_exactly_norms_biases_and_state_spaces_go_without_weight_decay():
    backbone = make_backbone(
        pattern="mamba attn/mlp",
        n_layers=2,
        norm="layer",
        mamba=ssm.MambaConfig(bias=True),
        attn=zoo.AttentionConfig(bias=True),
        mlp=zoo.MLPConfig(bias=True),
    )
    for path, param in nnx.to_flat_state(nnx.state(backbone)):
        spared = path[-1] in ("bias", "scale", "A_log", "D")
        assert (param.get_metadata("decay", True) is False) == spared, path


def test_output_projections_start_scaled_by_one_over_root_depth():
    def ends(n_layers):
        config = dataclasses.replace(SMALL, n_layers=n_layers)
        first, second = (zoo.Block(config, word, rngs=nnx.Rngs(0)) for word in zoo.parse_pattern("mamba attn/mlp", 2))
        return [linear.kernel[...] for linear in (first.mixer.out_proj, second.mixer.o_proj, second.mlp.down_proj)]

    assert_close(ends(8), jax.tree.map(lambda kernel: kernel / 2, ends(2)))
