"""Questions about pictures as a task: rows, what counts, stages that leave the rest alone, and a run of the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from experiments import vlm
from experiments.data.image_texts import ImageTextsConfig
from experiments.loop.flags import UsageError
from experiments.loop.optim import OptimConfig, make_optimizer
from experiments.loop.train import TrainConfig, init_state, make_train_step
from experiments.vision_language import encoder
from experiments.vision_language.presets import PRESETS, Config, small
from experiments.vision_language.results import answers
from experiments.vision_language.rows import Rows
from experiments.vision_language.task import answer_loss, guesses, make_model, prepare, scores_of
from tests.places import PUBLISHED

MODEL = small(16, 1, 16, 8)
CONFIG = Config(
    model=MODEL,
    data=ImageTextsConfig(scenes=40, held_out_scenes=14, scene_size=16),
    tokenizer="bytes",
    threads=1,
    pictures=4,
    train=TrainConfig(steps=2, batch_size=4, log_every=1, eval_every=2, save_every=2, tensorboard=False),
)


@pytest.fixture(scope="module")
def prepared():
    return prepare(CONFIG)


@pytest.fixture(scope="module")
def model(prepared):
    return make_model(prepared, "all", nnx.Rngs(0))


def assert_equal(one, other):
    for mine, theirs in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (one, other)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_row_is_the_image_s_places_the_question_and_the_answer(prepared):
    rows = prepared.rows[0]
    assert prepared.model.image_tokens == 4
    assert prepared.model.image_token_id == 257
    batch = rows([3, -1])
    example = rows.example(3)
    text = list(f"{example.question} {example.answer}".encode())
    size = 4 + len(text) + 1
    assert batch["tokens"][0, :size].tolist() == [257] * 4 + text + [256]
    assert batch["mask"].sum(axis=1)[0] == size
    guessed = batch["targets"][0][batch["weights"][0] > 0]
    assert bytes(guessed[:-1].tolist()).decode() == f" {example.answer}"
    assert guessed[-1] == 256
    places = np.flatnonzero(batch["weights"][0])
    np.testing.assert_array_equal(batch["tokens"][0, places + 1], guessed)
    assert batch["prompt"][0].sum() == len(example.question)
    assert batch["weights"][1].sum() == 0
    assert batch["images"].shape == (2, 1, 16, 16, 3)


def test_a_row_is_right_where_greedy_generation_says_the_answer(prepared, model):
    """Rows whose answers are the three tokens that the model says, but for one."""
    held_out = prepared.rows[1]
    images = np.stack([held_out.image(i) for i in range(4)])[:, None]
    said = zoo.generate(model, [held_out.prompt(i) for i in range(4)], 3, images=images)
    made = held_out.data._replace(examples=held_out.data.examples[:4])
    rows = Rows(made, prepared.tokenizer, places=4, image_token=257, preprocess=prepared.preprocess)
    rows.answers = [np.asarray(np.asarray(row)[-3:], np.int32) for row in said]
    rows.answers[1] = rows.answers[1] + 1 - 2 * (rows.answers[1] == 255)
    right = guesses(model, rows, 4).right
    np.testing.assert_array_equal(right, [True, False, True, True])


def test_scores_are_by_kind_of_question(prepared, model):
    rows = prepared.rows[1]
    said = guesses(model, rows, 4)
    kinds = [rows.example(i).kind for i in range(len(rows))]
    assert len(said.right) == len(rows) == 14
    scores = scores_of(said._replace(right=np.array([kind == "there" for kind in kinds])), kinds)
    assert scores["there"] == 1
    assert scores["shape"] == 0
    assert scores["exact"] == pytest.approx(kinds.count("there") / 14)
    assert all(isinstance(text, str) for text in answers(model, rows, [0, 1], prepared))


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "moved"), [("connector", {"connector"}), ("language", {"connector", "language"})])
def test_a_stage_leaves_the_rest_alone_to_the_bit(prepared, trained, moved):
    model = make_model(prepared, trained, nnx.Rngs(0))
    before = {path: np.array(value[...]) for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, warmup_steps=0), 3, model)
    step = make_train_step(model, lambda *given: answer_loss(*given, trained=trained), optimizer)
    state, metrics = step(init_state(model, optimizer, jax.random.key(0)), prepared.rows[0]([0, 1, 2, 3]))
    after = dict(jax.tree_util.tree_leaves_with_path(state.params))
    after = {tuple(key.key for key in path): value for path, value in after.items()}
    changed = {path[0] for path, value in before.items() if not np.array_equal(value, after[path])}
    assert changed == moved
    assert metrics["grad_norm"] > 0


def test_a_stage_s_loss_and_gradient_are_those_of_the_whole(prepared, model):
    """What learns gets the same gradient, whether or not the rest has one."""
    batch = jax.tree.map(jnp.asarray, prepared.rows[0]([0, 1]))
    graphdef, params = nnx.split(model)

    def gradients(trained):
        def loss(params):
            return answer_loss(nnx.merge(graphdef, params), batch, nnx.Rngs(dropout=0), trained=trained).total

        return jax.jit(jax.grad(loss))(params)

    part, whole = gradients("connector"), gradients("all")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), part.connector, whole.connector)
    assert all(float(np.abs(x).max()) == 0 for x in jax.tree.leaves((part.vision, part.language)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_len": 2}, "--text-len 2: no example train is as short as that"),
        (
            {"model": dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, vocab_size=200))},
            "--model.text.vocab-size has 200 rows of tokens, expected 258",
        ),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(CONFIG, **fields))


def test_presets_are_made_of_what_there_is():
    assert {"tiny", "scenes", "mamba2-130m"} <= set(PRESETS)
    with pytest.raises(ValueError, match="--init is a whole model"):
        Config(init="a", vision_init="b")


@pytest.mark.slow
def test_a_run_ends_in_scores_pictures_and_a_model_that_is_asked(tmp_path):
    """And a second stage goes on from it."""
    run = vlm.fit(CONFIG, tmp_path / "one")
    assert {"loss", "exact", "caption"} <= run.scores["held out"].keys()
    lines = [json.loads(line) for line in (tmp_path / "one/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 14
    assert sum("said" in line for line in lines) == 4
    assert (tmp_path / "one/predictions.png").stat().st_size > 10_000
    loaded = zoo.from_pretrained(tmp_path / "one", kind=zoo.VisionLanguageModel)
    assert_equal(loaded, run.model)
    prepared = prepare(CONFIG)
    prepared.data.held_out.read(0).save(tmp_path / "picture.png")
    asked = vlm.Ask(str(tmp_path / "one"), (str(tmp_path / "picture.png"), "which digit is there?"), max_new_tokens=3)
    assert isinstance(vlm.ask(asked), str)
    second = dataclasses.replace(CONFIG, init=str(tmp_path / "one"), trained="connector")
    after = vlm.fit(second, tmp_path / "two").model
    assert_equal(after.language, run.model.language)
    assert not np.array_equal(
        after.connector.projector.layers[0].kernel[...], run.model.connector.projector.layers[0].kernel[...]
    )


def test_what_does_not_fit_is_told_before_the_lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm.clip, "fit", None)
    config = dataclasses.replace(CONFIG, encoder_steps=1, language_init=str(PUBLISHED / "vit_model"))
    with pytest.raises(UsageError, match="unknown model_type 'vit'"):
        vlm.with_encoder(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_encoder_has_its_lesson_once_and_several_seeds_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "BATCH_SIZE", 4)
    config = dataclasses.replace(CONFIG, encoder_steps=1, trained="language", seeds=(0, 1))
    runs = vlm.fit_seeds(config, tmp_path)
    lesson = zoo.from_pretrained(tmp_path / "encoder/images", kind=zoo.ImageClassifier)
    for run in runs:
        for mine, theirs in zip(
            *(jax.tree.leaves(nnx.state(m.backbone, nnx.Param)) for m in (run.model.vision, lesson)), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    monkeypatch.setattr(vlm.clip, "fit", None)  # not again
    assert vlm.with_encoder(config, tmp_path).vision_init == str(tmp_path / "encoder/images")
    assert [run.scores for run in vlm.fit_seeds(config, tmp_path)] == [run.scores for run in runs]
