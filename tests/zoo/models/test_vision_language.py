"""A language model that reads images: where they stand, what is left out exactly, and generation after them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssm
import zoo
from tests.numerics import assert_close, normal, with_random_parameters
from zoo.models.build import abstract

IMAGE = 9
VISION = zoo.ImageClassifierConfig(
    d_model=8,
    n_layers=2,
    n_classes=0,
    image_size=8,
    patch_size=2,
    attn=zoo.AttentionConfig(n_heads=2, position="none", bias=True),
    mlp=zoo.MLPConfig(d_ff=8, gated=False, activation="gelu", bias=True),
)
TEXT = zoo.CausalLMConfig(
    d_model=16,
    n_layers=2,
    vocab_size=24,
    pattern="mamba2 attn/mlp",
    attn=zoo.AttentionConfig(n_heads=2),
    mlp=zoo.MLPConfig(d_ff=16),
    mamba2=ssm.Mamba2Config(head_dim=8, d_state=4),
)
CONFIG = zoo.VisionLanguageConfig(
    vision=VISION, text=TEXT, connector=zoo.ConnectorConfig(shuffle=2), image_token_id=IMAGE
)  # 4 x 4 patches, 2 x 2 tokens an image


DEEP = {
    "text": dataclasses.replace(TEXT, n_layers=4),
    "deepstack": 2,
    "connector": zoo.ConnectorConfig(kind="linear"),
}


def build(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    return with_random_parameters(lambda: zoo.VisionLanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return build()


def pictures(*shape):
    return normal(jax.random.key(7), *shape, 8, 8, 3)


PLACES = [IMAGE] * 4
ROW = [1, *PLACES, 2, 3, *PLACES, 4]


def spoken(model, rows, images, **more):
    return jax.jit(lambda ids, images: model(ids, images=images, **more))(jnp.asarray(rows), images)


def test_an_image_s_tokens_stand_in_its_places(model):
    images = pictures(1, 2)
    tokens, _ = model.encode(images[0])
    x = model.language.embed(jnp.asarray([ROW]))
    x = jnp.concatenate([x[:, :1], tokens[0, :1], x[:, 5:7], tokens[0, 1:], x[:, 11:]], axis=1)
    assert_close(spoken(model, [ROW], images), jax.jit(lambda x: model.language(inputs_embeds=x))(x))


def test_text_alone_is_the_language_model(model):
    ids = jnp.asarray([[1, 2, 3, 4, 5]])
    alone = jax.jit(model.language)(ids)
    np.testing.assert_array_equal(jax.jit(model)(ids), alone)
    assert_close(spoken(model, ids, pictures(1, 1)), alone)


def test_a_row_with_fewer_images_leaves_the_others_out_exactly(model):
    """Whatever lies there, to the bit, and no gradient of a parameter is touched by it."""
    rows = [ROW, [*ROW[:5], 2, 3, 4, 5, 6, 7, 8]]
    images = pictures(2, 2)
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradients(params, images):
        def loss(params):
            y = nnx.merge(graphdef, params)(jnp.asarray(rows), images=images)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(params)

    one, other = (gradients(params, images.at[1, 1].set(value)) for value in (1.0, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert_close(one[1][1:], spoken(model, rows[1:], images[1:, :1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"vision_layer": 1},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(DEEP, marks=pytest.mark.slow),
    ],
    ids=["an earlier layer", "plain", "deepstack"],
)
def test_a_prompt_cut_between_images_and_steps_are_the_whole(fields):
    model = build(**fields)
    images, ids = pictures(2, 2), jnp.asarray([ROW, ROW[::-1]])
    mask = jnp.asarray([[True] * 12, [False] + [True] * 11])

    @jax.jit
    def pieces(images):
        logits, state = model.extend(ids[:, :6], model.init_state(2, 12), mask=mask[:, :6], images=images[:, :1])
        parts = [logits]
        for a, b, shown in ((6, 11, images[:, 1:]), (11, 12, None)):
            logits, state = model.extend(ids[:, a:b], state, mask=mask[:, a:b], images=shown)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    whole = jax.jit(lambda images: model(ids, mask, images=images))(images)
    assert_close(pieces(images)[mask], whole[mask])


def test_deepstack_adds_groups_before_deeper_blocks():
    model = build(**DEEP)
    assert model.config.image_tokens == 4
    row, images = [1, *PLACES, 2], pictures(1, 1)
    every, _ = jax.jit(lambda images: model.vision.patch_vectors(images))(images[0])
    tokens = model.connector(every, (4, 4)).reshape(4, 4, 16)
    x = model.language.embed(jnp.asarray([row]))
    added = {}
    for group, (s, t) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        there = jnp.zeros_like(x).at[0, 1:5].set(tokens[s::2, t::2].reshape(4, 16))
        added[group] = there
    x = x.at[:, 1:5].set(0) + added.pop(0)
    expected = jax.jit(lambda x, added: model.language(inputs_embeds=x, layer_inputs=added))(x, added)
    assert_close(spoken(model, [row], images), expected)


@pytest.mark.parametrize("normed", [True, False])
def test_vectors_of_several_layers_lie_end_to_end(normed):
    """A patch's are what each layer gives by itself, in the order that is asked for."""
    vision = with_random_parameters(lambda: zoo.ImageClassifier(VISION, rngs=nnx.Rngs(0)))

    @jax.jit
    def read(images):
        each = [vision.patch_vectors(images, layer=layer, normed=normed)[0] for layer in (2, 0, -2)]
        return vision.patch_vectors(images, layer=(2, 0, -2), normed=normed)[0], jnp.concatenate(each, axis=-1)

    several, one_by_one = read(pictures(1))
    assert several.shape == (1, 16, 24)
    assert_close(several, one_by_one)


def test_class_tokens_take_places_too():
    model = build(class_tokens=True, connector=zoo.ConnectorConfig())
    assert model.with_places([1, IMAGE]) == [1, *[IMAGE] * 17]
    images = pictures(1)
    tokens, _ = model.encode(images)
    assert_close(tokens[0], model.connector(model.vision.hidden(images), (4, 4)))
    plain = build(connector=zoo.ConnectorConfig())
    assert_close(plain.encode(images)[0], tokens[:, :, 1:])


def test_tokens_of_images_are_multiplied():
    model, images = build(), pictures(1)
    plain, _ = model.encode(images)
    model.config = dataclasses.replace(model.config, image_multiplier=2.5)
    assert_close(model.encode(images)[0], 2.5 * plain)


@pytest.mark.slow
def test_images_see_the_question_behind_them_and_not_the_answer():
    text = dataclasses.replace(TEXT, pattern="attn/mlp")
    model = build(text=text, mutual_attention=True)
    images, asked = pictures(1, 1), jnp.asarray([[True] * 6 + [False] * 2])
    run = jax.jit(lambda ids: model(ids, images=images, prompt_mask=asked))
    plain, question, answer = (run(jnp.asarray([[1, *PLACES, a, b, 3]])) for a, b in ((5, 6), (7, 6), (5, 8)))
    assert float(jnp.abs(plain - question)[:, 1:5].max()) > 1e-4
    assert_close(plain[:, :1], question[:, :1])
    assert_close(plain[:, :6], answer[:, :6])
    with pytest.raises(ValueError, match="without prompt_mask: images would see the answers"):
        model(jnp.asarray([[1, *PLACES, 5]]), images=images)
    ids = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(
        jax.jit(model)(ids), jax.jit(model.language)(ids)
    )  # text alone has nobody who looks ahead
    with pytest.raises(ValueError, match=r"mutual_attention=True with mamba2, which reads from left to right"):
        dataclasses.replace(CONFIG, mutual_attention=True)


@pytest.mark.slow
def test_prompts_of_unequal_length_and_images_continue_as_alone(model):
    prompts = [model.with_places([1, IMAGE, 2, IMAGE, 3]), model.with_places([5, IMAGE, 6]), [7, 8]]
    a, b, c = pictures(3)
    together = zoo.generate(model, prompts, 4, images=[[a, b], [c], []])
    for row, (prompt, images) in enumerate(zip(prompts, ([a, b], [c], None), strict=True)):
        alone = zoo.generate(model, prompt, 4, images=images)
        np.testing.assert_array_equal(together[row, -4:], alone[0, -4:])
    streamed = np.stack(list(zoo.generate_stream(model, prompts[1], 4, images=[c])), axis=1)
    np.testing.assert_array_equal(streamed[0], together[1, -4:])


def test_a_prompt_with_an_image_continues_as_its_logits_say(model):
    prompt, image = model.with_places([5, IMAGE, 6]), pictures()
    first = jnp.argmax(spoken(model, [prompt], image[None, None])[0, -1, :24])
    assert int(zoo.generate(model, prompt, 1, images=[image])[0, -1]) == int(first)


def test_a_state_space_carries_the_same_after_any_number_of_images():
    text = dataclasses.replace(TEXT, pattern="mamba2")
    model = nnx.eval_shape(lambda: zoo.VisionLanguageModel(dataclasses.replace(CONFIG, text=text), rngs=nnx.Rngs(0)))
    sizes = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda n=n: model.init_state(1, n)))) for n in (8, 4096)
    ]
    assert sizes[0] == sizes[1]


def test_it_is_saved_and_loaded(model, tmp_path):
    pytest.importorskip("safetensors")
    zoo.save_pretrained(model, tmp_path)
    loaded = zoo.from_pretrained(tmp_path, kind=zoo.VisionLanguageModel)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    low = zoo.from_pretrained(tmp_path, dtype="bfloat16").config
    assert (low.vision.dtype, low.text.param_dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(ValueError, match="is a VisionLanguageModel, expected kind=CausalLM"):
        zoo.from_pretrained(tmp_path, kind=zoo.CausalLM)


def test_trained_parts_are_joined_and_shared(model):
    classifier = zoo.ImageClassifier(dataclasses.replace(VISION, n_classes=3), rngs=nnx.Rngs(1))
    joined = zoo.VisionLanguageModel.of(classifier, model.language, rngs=0, image_token_id=IMAGE)
    assert joined.config.vision == VISION
    assert classifier.classifier is not None
    theirs = classifier.patch_embedding.projection.kernel[...]
    assert joined.vision.patch_embedding.projection.kernel[...] is theirs
    assert joined.config.image_tokens == 16
    other = dataclasses.replace(TEXT, n_layers=3)
    with pytest.raises(ValueError, match="language has another config"):
        zoo.VisionLanguageModel(dataclasses.replace(CONFIG, text=other), rngs=0, language=model.language)


def test_its_attention_becomes_linear_and_all_else_stays(model):
    student = zoo.seed_from_attention(model, rngs=nnx.Rngs(0))
    assert student.config.pattern == "mamba2 linear_attn/mlp"
    assert student.connector.projector is not None
    kept = student.connector.projector.layers[0].kernel[...]
    assert kept is model.connector.projector.layers[0].kernel[...]
    assert model.config.text == TEXT
    row = [1, *PLACES, 2]
    assert bool(jnp.isfinite(spoken(student, [row], pictures(1, 1))).all())


ROUTED = dataclasses.replace(
    TEXT, pattern="attn/mlp attn/mlp:0.5", mod=zoo.MoDConfig(gate="tanh", weighs="symmetric", decides="top_k")
)


@pytest.mark.slow
def test_blocks_with_a_capacity_choose_among_the_places_of_images_alone():
    """Half of the images' tokens go through the second block, and all words; text alone is the plain model."""
    model = build(text=ROUTED)
    ids, images = jnp.asarray([ROW]), pictures(1, 2)
    before, after = model.hidden_states(ids, images=images)[1:]
    block = model.backbone.layers[1]
    weights = block.router.weights(block.router.scores(before))[..., None]
    around = model.backbone.norm_f(before * weights)
    went = np.abs(np.asarray(after - around)[0]).max(axis=-1) > 1e-4
    places = np.asarray(ROW) == IMAGE
    assert went[places].sum() == places.sum() // 2
    assert went[~places].all()

    plain = build(text=dataclasses.replace(ROUTED, pattern="attn/mlp"))
    theirs = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    same = [(path, v.replace(theirs[path][...])) for path, v in nnx.to_flat_state(nnx.state(plain, nnx.Param))]
    nnx.update(plain, nnx.from_flat_state(same))
    words = jnp.asarray([[1, 2, 3, 4, 5]])
    assert_close(model(words), plain(words))
    assert not np.allclose(model(ids, images=images), plain(ids, images=images), atol=1e-3)


def test_tokens_of_images_skip_channel_mixers_by_the_pattern():
    """A block of a channel mixer alone that takes none of them: they stay as they are, words are fed as ever."""
    mod = zoo.MoDConfig(decides="top_k")
    model = build(text=dataclasses.replace(TEXT, pattern="attn -/mlp:0.0001", mod=mod))
    ids, images = jnp.asarray([ROW]), pictures(1, 2)
    before, after = model.hidden_states(ids, images=images)[1:]
    block, places = model.backbone.layers[1], np.asarray(ROW) == IMAGE
    np.testing.assert_array_equal(after[0][places], model.backbone.norm_f(before)[0][places])
    fed = model.backbone.norm_f(before + block.mlp(block.norm2(before)))
    assert_close(after[0][~places], fed[0][~places])


def test_full_rows_leave_out_in_a_program_what_blocks_leave_out():
    """The same numbers, fewer operations; a row with fewer images than it should have is NaN."""
    ids, images = jnp.asarray([ROW]), pictures(1, 2)
    model, full = build(text=ROUTED), build(text=ROUTED, full_rows=True)
    programs = [jax.jit(lambda ids, images, m=m: m(ids, images=images)) for m in (model, full)]
    one, other = (program(ids, images) for program in programs)
    assert_close(other, one)
    flops = [program.lower(ids, images).compile().cost_analysis()["flops"] for program in programs]
    assert flops[1] < flops[0]
    fewer = jnp.asarray([[*ROW[:5], 2, 3, 4, 5, 6, 7, 8]])
    assert bool(jnp.isnan(programs[1](fewer, images)).any())
    assert bool(jnp.isfinite(programs[0](fewer, images)).all())


def test_a_summary_counts_every_parameter_once(model):
    made = zoo.summary(model, show=False)
    assert made.parameters == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    parts = [row.part for row in made.rows]
    assert {"vision.layers.0", "connector", "language.layers.1", "language.head"} <= {*parts}
    alone = zoo.summary(model.language, show=False)
    assert made.state_bytes == alone.state_bytes


@pytest.mark.usefixtures("unchecked")
def test_images_that_do_not_fill_their_places_are_named(model):
    cases = [
        ([[1, IMAGE, IMAGE, 2]], pictures(1, 1), "row 0 has 2 places of images, expected 4 for each of at most 1"),
        ([[1, *PLACES, *PLACES]], pictures(1, 1), "row 0 has 8 places of images, expected 4"),
        ([[1, *PLACES]], None, "ids has 4 places of images in a row, and there are no images"),
        ([[1, *PLACES]], pictures(2, 1), "images are of 2 rows, expected those of ids, 1"),
    ]
    for ids, images, message in cases:
        with pytest.raises(ValueError, match=message):
            model(jnp.asarray(ids), images=images)
    for prompt, images, message in (
        ([1, *PLACES], None, "there are no images"),
        ([[1, *PLACES], [2]], [[pictures()], [pictures()]], "row 1 has 1 images of 4 tokens, and 0 places"),
        (
            [1, *PLACES],
            [np.zeros((8, 8, 3), np.uint8)],
            r"images are of uint8, expected floats \(x, y, c\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.generate(model, prompt, 2, images=images)
    with pytest.raises(ValueError, match="images are given to a CausalLM, expected a VisionLanguageModel"):
        zoo.generate(model.language, [1], 2, images=[pictures()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": dataclasses.replace(VISION, n_classes=2)}, "vision.n_classes=2, expected 0"),
        ({"image_token_id": 24}, "image_token_id=24, expected a token of 24"),
        ({"vision_layer": 3}, "vision_layer=3, expected one of 2 layers"),
        ({"vision_layer": ()}, r"vision_layer=\(\), expected some of 2 layers"),
        ({"vision_layer": (0, -4)}, r"vision_layer=\(0, -4\), expected some of 2 layers"),
        ({"vision_layer": (0, 1), "vision_norm": False}, r"vision_norm=False with vision_layer=\(0, 1\), expected -1"),
        ({"vision_layer": 1, "vision_norm": False}, "vision_norm=False with vision_layer=1, expected -1"),
        ({"class_tokens": True}, "class_tokens=True with deepstack=1, connector.kind='mlp' and connector.shuffle=2"),
        ({"deepstack": 3}, "deepstack=3, expected at least 1, and 9 groups of tokens at most text.n_layers=2"),
        ({"connector": zoo.ConnectorConfig(shuffle=3)}, "shuffle=3 must divide both sides of the 4 x 4 patches"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_shapes_alone_are_made_too():
    assert abstract(CONFIG).language.embedding.embedding.shape == (24, 16)
