"""Image classifiers: their tokens in order, positions at any size, what is dropped, and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from m2 import HyenaFilterConfig, M2Config
from ssm import MambaConfig, SS2DConfig
from tests.numerics import assert_close, jitted, with_random_parameters
from zoo.layers.image_tokens import PatchEmbedding, grid_of, resize_positions, sincos_positions

TINY = {
    "d_model": 16,
    "n_layers": 2,
    "image_size": 12,
    "patch_size": 4,
    "channels": 2,
    "n_classes": 3,
    "attn": zoo.AttentionConfig(n_heads=2, position="none", bias=True),
    "mamba": MambaConfig(d_state=4),
    "vim": MambaConfig(d_state=4),
    "ss2d": SS2DConfig(d_state=4),
    "m2": M2Config(l_max=9, filter=HyenaFilterConfig(order=6)),
}
MEAN = {"class_token": "none", "pool": "mean"}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 2)), jnp.float32)


def make(**fields):
    config = zoo.ImageClassifierConfig(**TINY | fields)
    return with_random_parameters(lambda: zoo.ImageClassifier(config, rngs=nnx.Rngs(0)))


def run(model, images, method="__call__"):
    call, params = jitted(model, method)
    return call(params, images)


def test_patches_are_cut_row_by_row_and_mapped_alike():
    embed = PatchEmbedding(5, patch_size=4, stride=4, channels=2, rngs=nnx.Rngs(0))
    tokens = embed(IMAGES)
    assert tokens.shape == (2, 3, 3, 5)
    patch = IMAGES[1, 4:8, 8:12]
    expected = jnp.einsum("yxc,yxcd->d", patch, embed.projection.kernel[...]) + embed.projection.bias[...]
    assert_close(tokens[1, 1, 2], expected)


def test_patches_may_overlap():
    embed = PatchEmbedding(5, patch_size=4, stride=2, channels=2, rngs=nnx.Rngs(0))
    assert embed(IMAGES).shape == (2, 5, 5, 5)
    assert grid_of(12, 10, 4, 2) == (5, 4)
    apart = PatchEmbedding(5, patch_size=4, stride=4, channels=2, rngs=nnx.Rngs(0))
    nnx.update(apart, nnx.state(embed))
    assert_close(embed(IMAGES)[:, ::2, ::2], apart(IMAGES))


def test_pixels_that_no_patch_covers_are_left_out_where_it_says_so():
    """What lies there changes nothing; otherwise such images are refused."""
    model = make(crop_to_patches=True, image_size=14)
    assert model.config.grid == (3, 3)
    wide = jnp.pad(IMAGES, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=jnp.nan)
    assert_close(run(model, wide, "hidden"), run(model, IMAGES, "hidden"))
    with pytest.raises(ValueError, match="expected patch_size=4 and a multiple of 4 more"):
        make(image_size=14)
    with pytest.raises(ValueError, match="crop_to_patches=True, expected False with stem='conv'"):
        make(crop_to_patches=True, stem="conv")


def test_a_stem_of_convolutions_has_a_token_for_each_patch_too():
    model = make(stem="conv", **MEAN)
    assert [layer.kernel.shape for layer in model.patch_embedding.stem] == [(3, 3, 2, 8), (3, 3, 8, 16)]
    assert run(model, IMAGES, "hidden").shape == (2, 9, 16)


@pytest.mark.parametrize("class_token", ["first", "middle"])
def test_the_class_token_is_where_it_says(class_token):
    """Without mixing, each token is what it was: its own vector and its position's, normalised."""
    model = make(class_token=class_token, pattern="-/mlp", mlp=zoo.MLPConfig(d_ff=4))
    nnx.update(model.backbone.layers, jax.tree.map(jnp.zeros_like, nnx.state(model.backbone.layers)))
    at, position = {"first": 0, "middle": 4}[class_token], model.position_embeddings[...]
    patches = model.patch_embedding(IMAGES).reshape(2, 9, 16)
    token = jnp.broadcast_to(model.class_token[...], (2, 1, 16))
    x = jnp.concatenate([patches[:, :at], token, patches[:, at:]], axis=1) + position
    hidden = model.backbone.norm_f(x)
    assert_close(run(model, IMAGES, "hidden"), hidden)
    assert_close(run(model, IMAGES, "features"), hidden[:, at])
    logits = hidden[:, at] @ model.classifier.kernel[...] + model.classifier.bias[...]
    assert_close(run(model, IMAGES), logits)


def test_a_mean_is_over_patches_alone():
    model = make(pool="mean")
    hidden = run(model, IMAGES, "hidden")
    assert hidden.shape == (2, 10, 16)
    assert_close(run(model, IMAGES, "features"), hidden[:, 1:].mean(axis=1))
    middle = make(pool="mean", class_token="middle")
    hidden = run(middle, IMAGES, "hidden")
    assert_close(run(middle, IMAGES, "features"), (hidden.sum(axis=1) - hidden[:, 4]) / 9)


@pytest.mark.parametrize("pattern", ["attn/mlp", "mamba", "vim", "ss2d/mlp", "m2/monarch", "m2[conv=2d]/monarch"])
def test_every_mixer_sees_the_whole_image(pattern):
    model = make(pattern=pattern, **MEAN)
    call, params = jitted(model, "hidden")
    before = call(params, IMAGES)
    for corner in (np.s_[:, 0, 0], np.s_[:, -1, -1]):
        after = call(params, IMAGES.at[corner].add(1.0))
        assert np.abs(after - before).max(axis=(0, 2)).min() > 1e-6


def test_a_mixer_of_images_wants_to_know_the_grid():
    backbone = zoo.Backbone(zoo.BackboneConfig(d_model=8, n_layers=1, pattern="ss2d", causal=False), rngs=nnx.Rngs(0))
    assert backbone(jnp.zeros((1, 6, 8)), grid=(2, 3)).shape == (1, 6, 8)
    with pytest.raises(ValueError, match=r"SS2D mixes images, expected grid=\(rows, columns\)"):
        backbone(jnp.zeros((1, 6, 8)))
    config = zoo.BackboneConfig(d_model=8, n_layers=1, pattern="m2", causal=False, m2=M2Config(conv="2d"))
    with pytest.raises(ValueError, match=r"M2Mixer mixes images, expected grid=\(rows, columns\)"):
        nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 6, 8))))


def test_positions_are_read_off_between_those_learned():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    assert_close(resize_positions(jnp.ones((12, 2)), (3, 4), (5, 9)), jnp.ones((45, 2)))
    larger = resize_positions(table, (3, 4), (5, 9)).reshape(5, 9, 5)
    turned = resize_positions(jnp.flip(table, 0), (3, 4), (5, 9)).reshape(5, 9, 5)
    assert_close(jnp.flip(turned, (0, 1)), larger)
    # Where two points in three fall between old ones, the third falls on one.
    assert_close(resize_positions(table, (3, 4), (9, 12)).reshape(9, 12, 5)[1::3, 1::3], table.reshape(3, 4, 5))


def test_other_sizes_keep_the_class_tokens_own_position():
    for class_token, at in (("first", 0), ("middle", 6)):
        model = make(class_token=class_token)
        old = model.config.n_tokens and (0 if class_token == "first" else 4)
        positions = model._positions((3, 4), at)
        assert positions.shape == (13, 16)
        np.testing.assert_array_equal(positions[at], model.position_embeddings[...][old])


def test_filters_in_a_row_are_extended_for_larger_images(unchecked):
    model, larger = make(pattern="m2", **MEAN), jnp.zeros((1, 12, 20, 2))  # 3 x 5 patches
    message = r"images of 12 x 20 pixels: 15 tokens, expected at most m2.l_max=9; `extend_positions` makes filters"
    with pytest.raises(ValueError, match=message):
        model(larger)
    longer = zoo.extend_positions(model, 15)
    assert (longer.config.max_tokens, longer.config.image_size) == (15, 12)
    assert longer.position_embeddings[...] is model.position_embeddings[...]
    filters, its = (m.backbone.layers[0].mixer.filter_fn for m in (longer, model))
    np.testing.assert_array_equal(filters.z[...], np.resize(its.z[...], (15, 5)))
    assert run(longer, larger).shape == (1, 3)
    with pytest.raises(ValueError, match="13 x 16 pixels"):
        longer(jnp.zeros((1, 13, 16, 2)))


def test_filters_along_rows_and_columns_are_for_images_of_any_size():
    model, larger = make(pattern="m2[conv=2d]", **MEAN), jnp.ones((1, 20, 12, 2))
    assert model.config.max_tokens is None
    extended = zoo.extend_positions(model, 100)  # an l_max of 100 would have stretched its filters
    assert extended.config == model.config
    np.testing.assert_array_equal(run(extended, larger), run(model, larger))


def test_sines_and_cosines_tell_rows_from_columns():
    table = sincos_positions((2, 3), 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[1, :, :4])  # by column
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])  # by row
    omega = np.array([1.0, 1e-4])
    np.testing.assert_allclose(table[1, 2], [*np.sin(2 * omega), *np.cos(2 * omega), *np.sin(omega), *np.cos(omega)])
    model = make(position="sincos")
    assert model.position_embeddings is None
    assert run(model, jnp.zeros((1, 8, 16, 2))).shape == (1, 3)


def test_a_second_classifier_reads_the_second_token():
    model = make(distillation="classifier")
    hidden = run(model, IMAGES, "hidden")
    assert hidden.shape == (2, 11, 16)
    assert_close(run(model, IMAGES, "features"), hidden[:, :2].reshape(2, 32))
    first, second = (
        hidden[:, i] @ layer.kernel[...] + layer.bias[...]
        for i, layer in enumerate((model.classifier, model.distillation_classifier))
    )
    assert_close(run(model, IMAGES), (first + second) / 2)
    unread = make(distillation="token")
    assert run(unread, IMAGES, "features").shape == (2, 16)
    assert unread.distillation_classifier is None


def test_rows_skip_a_block_whole_or_not_at_all():
    """The last block of two is skipped by half of the rows, the first by none; what stays counts twice."""
    config = {"pattern": "-/mlp", "n_layers": 2, **MEAN}
    model, plain = make(**config, drop_path=0.5), make(**config)
    images = jnp.tile(IMAGES[:1], (64, 1, 1, 1))
    first, both = (run_blocks(plain, images, n) for n in (1, 2))
    graphdef, params = nnx.split(model)
    norm_f = nnx.merge(graphdef, params).backbone.norm_f
    call = jax.jit(lambda params, key: nnx.merge(graphdef, params).hidden(images, rngs=nnx.Rngs(dropout=key)))
    y = call(params, jax.random.key(0))
    skipped, kept = norm_f(first), norm_f(first + 2 * (both - first))
    is_skipped = np.abs(y - skipped).max(axis=(1, 2)) < 1e-4
    is_kept = np.abs(y - kept).max(axis=(1, 2)) < 1e-4
    assert np.all(is_skipped ^ is_kept)
    assert 16 < is_skipped.sum() < 48
    np.testing.assert_array_equal(y, call(params, jax.random.key(0)))
    scanned = make(**config, drop_path=0.5, scan_layers=True)
    graphdef, params = nnx.split(scanned)
    call = jax.jit(lambda params, key: nnx.merge(graphdef, params).hidden(images, rngs=nnx.Rngs(dropout=key)))
    assert_close(call(params, jax.random.key(0)), y)


def run_blocks(model, images, n):
    """The residual stream behind the first n blocks."""
    x = model.patch_embedding(images).reshape(len(images), 9, -1) + model.position_embeddings[...]
    for block in list(model.backbone.layers)[:n]:
        x = block(x)
    return x


def test_layer_scale_multiplies_what_a_mixer_gives():
    model, plain = make(layer_scale=0.1), make()
    state = nnx.state(plain)
    nnx.update(model, state)
    for block in model.backbone.layers:
        block.scale[...], block.scale2[...] = (jnp.full(16, value) for value in (0.0, 1.0))
    for block in plain.backbone.layers:
        block.mixer.o_proj.kernel[...] = jnp.zeros((16, 16))
        block.mixer.o_proj.bias[...] = jnp.zeros(16)
    assert_close(run(model, IMAGES), run(plain, IMAGES))
    fresh = zoo.ImageClassifier(model.config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh.backbone.layers[0].scale[...], np.full(16, 0.1, np.float32))


def block_flops(pattern, side):
    """FLOPs of one block on an image of side x side patches, as the compiler counts them."""
    # It counts the body of a loop once, so a scan takes all places in one chunk, attention all scores at once.
    scan = {"d_state": 2, "chunk_size": side**2, "implementation": "associative"}
    config = zoo.BackboneConfig(
        d_model=8,
        n_layers=1,
        pattern=pattern,
        causal=False,
        attn=zoo.AttentionConfig(n_heads=1, implementation="dense"),
        vim=MambaConfig(**scan),
        ss2d=SS2DConfig(**scan),
        m2=M2Config(l_max=side**2, filter=HyenaFilterConfig(order=6)),
    )
    block, params = nnx.split(nnx.eval_shape(lambda: zoo.Backbone(config, rngs=nnx.Rngs(0)).layers[0]))
    run = jax.jit(lambda params, x: nnx.merge(block, params)(x, grid=(side, side)))
    x = jax.ShapeDtypeStruct((1, side**2, 8), jnp.float32)
    return run.lower(params, x).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("pattern", ["attn", "m2", "m2[conv=2d]", "vim", "ss2d"])
def test_cost_grows_with_the_places_of_an_image(pattern):
    """Four times the places, as at twice the resolution: all but attention are linear in them, to the log."""
    growth = block_flops(pattern, 32) / block_flops(pattern, 16)
    if pattern == "attn":
        assert growth > 13  # 16, less what projections take
    else:
        assert 3.9 < growth < 5.2  # 4, and at most the log's 10 / 8


def test_bfloat16_is_near_float32():
    model = make(dtype="bfloat16")
    logits = run(model, IMAGES)
    assert logits.dtype == jnp.float32
    assert_close(logits, run(make(), IMAGES), tolerance=5e-2)  # two blocks and a head, each rounded to eight bits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 13}, "images of 13 x 13 pixels: height=13, expected patch_size=4 and a multiple of 4 more"),
        ({"image_size": 3}, "height=3, expected patch_size=4"),
        ({"stem": "cnn"}, "stem='cnn', expected one of 'patch', 'conv'"),
        ({"position": "rope"}, "position='rope', expected one of 'learned', 'sincos', 'none'"),
        ({"class_token": "last"}, "class_token='last', expected one of 'none', 'first', 'middle'"),
        ({"class_token": "none"}, "pool='token' with class_token='none', expected pool='mean'"),
        ({"distillation": "classifier", "class_token": "middle"}, "distillation='classifier', expected class_token="),
        ({"stem": "conv", "patch_size": 6}, "patch_size=6, expected a power of 2 with stem='conv'"),
        ({"stem": "conv", "patch_stride": 2}, "patch_stride=2, expected None with stem='conv'"),
        ({"pattern": "ss2d/mlp attn/mlp"}, "ss2d goes by rows and columns, expected class_token='none'"),
        ({"pattern": "m2 m2[conv=2d]"}, r"m2\[conv=2d\] goes by rows and columns, expected class_token='none'"),
        ({"pattern": "m2", "m2": M2Config(conv="2d")}, "m2 goes by rows and columns, expected class_token='none'"),
        ({"n_classes": -1}, "n_classes=-1, expected at least 0"),
        ({"drop_path": 1.0}, "drop_path=1.0, expected 0 <= drop_path < 1"),
        ({"drop_path": 0.1, "mixer_residual": False}, "drop_path=0.1 with mixer_residual=False"),
        ({"embedding_dropout": 1.0}, "embedding_dropout=1.0, expected"),
    ],
)
def test_config_errors_name_the_field(unchecked, fields, message):
    with pytest.raises(ValueError, match=message):
        zoo.ImageClassifierConfig(**TINY | fields)


def test_errors_name_the_images(unchecked):
    model = make()
    with pytest.raises(ValueError, match="images have 3 channels, expected 2 in the last axis"):
        model(jnp.zeros((1, 12, 12, 3)))
    with pytest.raises(ValueError, match="images of 12 x 14 pixels: width=14, expected patch_size=4 and a multiple"):
        model(jnp.zeros((1, 12, 14, 2)))
    with pytest.raises(ValueError, match="n_classes=0: the model has no classifier, expected `features` or `hidden`"):
        make(n_classes=0)(IMAGES)
    with pytest.raises(ValueError, match="d_model=18, expected a multiple of 4, at least 8, with position='sincos'"):
        sincos_positions((2, 2), 18)
