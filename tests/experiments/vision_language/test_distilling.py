"""A vision-language teacher and its student: what is compared, and a run in stages that leaves the rest alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import vlm
from experiments.causal.pair import layer_error
from experiments.causal.stages import STAGES, stage_model
from experiments.causal.student import Stage
from experiments.data.image_texts import ImageTextsConfig
from experiments.loop.train import TrainConfig
from experiments.vision_language import distilling
from experiments.vision_language.distilling import Config, PicturePair, default_run_dir
from experiments.vision_language.presets import Config as Taught
from experiments.vision_language.presets import small
from experiments.vision_language.task import prepare

VISION = zoo.ImageClassifierConfig(
    d_model=8, n_layers=1, n_classes=0, pattern="-/mlp", image_size=8, patch_size=2, mlp=zoo.MLPConfig(d_ff=8)
)
TEXT = zoo.CausalLMConfig(
    d_model=8, n_layers=4, pattern="attn/mlp", vocab_size=20, attn=zoo.AttentionConfig(n_heads=2), mlp=zoo.MLPConfig(8)
)


@pytest.fixture(scope="module")
def pair():
    config = zoo.VisionLanguageConfig(vision=VISION, text=TEXT, deepstack=2)
    teacher = zoo.VisionLanguageModel(config, rngs=0)
    return PicturePair(teacher, zoo.seed_from_attention(teacher, [1, 3], rngs=nnx.Rngs(1)))


def batch(pair):
    places = pair.teacher.config.image_tokens
    tokens = np.tile([*[0] * places, 5, 6, 7, 3], (2, 1)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[:, -1] = False
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, -3:-1] = 1  # the second row counts for nothing
    images = np.random.default_rng(0).normal(size=(2, 1, 8, 8, 3)).astype(np.float32)
    prompt = np.zeros(tokens.shape, bool)
    arrays = {"tokens": tokens, "mask": mask, "weights": weights, "images": images, "prompt": prompt}
    return jax.tree.map(jnp.asarray, arrays)


@pytest.mark.slow
def test_blocks_are_compared_on_what_enters_the_teacher_s_with_its_deeper_image_tokens(pair):
    given = batch(pair)
    states = pair.teacher.hidden_states(given["tokens"], given["mask"], images=given["images"])
    compared = pair.compare(given)
    assert [each.layer for each in compared] == [1, 3]
    there = np.asarray(given["mask"])
    added, _ = pair.teacher.inputs(given["tokens"], given["mask"], images=given["images"])
    entering = states[1] + added["layer_inputs"][1]
    np.testing.assert_allclose(compared[0].x[there], entering[there], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compared[0].teacher.out[there], states[2][there], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_places_of_images_count_and_padding_and_empty_rows_do_not(pair):
    given = batch(pair)
    assert pair.counted(given).sum(axis=1).tolist() == [pair.teacher.config.image_tokens + 3, 0]
    images = given["images"]
    alone = layer_error(pair, given)
    np.testing.assert_allclose(layer_error(pair, given | {"images": images.at[1].set(3.0)}), alone, rtol=1e-5)
    assert layer_error(pair, given | {"images": images.at[0].set(3.0)}) != alone


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_parts_of_the_language_model_s_converted_mixers_alone(pair, name):
    held = stage_model(pair, STAGES[name])
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(held, nnx.Param))}
    assert trained
    for path in trained:
        assert path[:4] == ("student", "language", "backbone", "layers")
        assert path[4] in (1, 3)
        assert path[5] == "mixer"
    parts = {path[6] for path in trained}
    assert ("o_proj" in parts) == (name in ("hidden", "logits"))
    assert ("q_proj" in parts) == (name != "layers")


@pytest.mark.slow
def test_a_run_ends_in_a_student_that_has_learned_in_its_mixers_alone(tmp_path):
    shape = small(16, 2, 16, 8)
    taught = Taught(
        model=dataclasses.replace(shape, text=dataclasses.replace(shape.text, pattern="attn/mlp")),
        data=ImageTextsConfig(scenes=20, held_out_scenes=6, scene_size=16),
        tokenizer="bytes",
        threads=1,
        pictures=2,
        train=TrainConfig(steps=1, batch_size=4, tensorboard=False),
    )
    teacher = vlm.fit(taught, tmp_path / "teacher").model
    one, none = Stage(1, 1e-2), Stage(0, 1e-2)
    loop = dataclasses.replace(Config("x").train, batch_size=4, tensorboard=False)
    config = Config(
        str(tmp_path / "teacher"),
        "attn linear_attn",
        layers=one,
        qkv=none,
        logits=one,
        train=loop,
        threads=1,
    )
    folder = tmp_path / "run"
    run = distilling.fit(config, folder)
    assert list(run.rows) == ["teacher", "random", "seeded", "layers", "logits"]
    assert {"nats", "exact", "shape"} <= run.rows["teacher"].keys()
    assert {"layer_error", "kl"} <= run.rows["layers"].keys()
    student = zoo.from_pretrained(folder / "student", kind=zoo.VisionLanguageModel)
    assert student.config.pattern == "attn/mlp linear_attn/mlp"
    theirs = dict(nnx.to_flat_state(nnx.state(teacher, nnx.Param)))
    moved = set()
    for path, value in nnx.to_flat_state(nnx.state(student, nnx.Param)):
        if path[0] == "language" and path[3:5] == (1, "mixer"):
            moved.add(path[5])
        else:
            np.testing.assert_array_equal(value[...], theirs[path][...], err_msg=str(path))
    assert "q_proj" in moved
    prepare(taught).data.held_out.read(0).save(tmp_path / "picture.png")
    asked = vlm.Ask(str(folder / "student"), (str(tmp_path / "picture.png"), "which digit is there?"), max_new_tokens=2)
    assert isinstance(vlm.ask(asked), str)
    again = distilling.fit(config, folder)  # nothing is left to do
    assert again.rows == json.loads((folder / "results.json").read_text())["rows"] == run.rows


def test_a_run_is_named_after_its_teacher_s(tmp_path):
    named = default_run_dir(Config(str(tmp_path / "tiny"), "attn linear_attn*3"))
    assert named == tmp_path / "tiny-attn-linear-attn-3-mimic"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"threads": 0}, "--threads 0"), ({"warmup_fraction": 1.0}, "--warmup-fraction 1.0")],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Config("teacher", **fields)
