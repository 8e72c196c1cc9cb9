"""Image classification as a user runs it: by its command line, interrupted, with several seeds, and in a notebook."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import zoo
from experiments import convert, vit
from experiments.data.augment import AugmentConfig
from experiments.loop import flags, train
from experiments.loop.metrics import read_metrics
from experiments.loop.model_size import count_params
from experiments.loop.train import split_model
from tests.numerics import assert_close

SMALL = [
    *("--model.d-model", "16", "--model.n-layers", "1", "--model.pattern", "attn/mlp", "--model.patch-size", "2"),
    *("--model.attn.head-dim", "8", "--model.mlp.d-ff", "16", "--train.batch-size", "16", "--train.log-every", "5"),
    *("--train.no-tensorboard", "--threads", "2"),
]

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def command(run_command):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, vit)


@pytest.fixture
def squares(tmp_path):
    """A folder with 8 x 8 images whose upper or lower half is white."""
    random = np.random.default_rng(0)
    for split, n in (("train", 32), ("validation", 8), ("test", 8)):
        labels = np.arange(n) % 2
        images = random.integers(0, 60, (n, 8, 8))
        for i, label in enumerate(labels):
            images[i, 4 * label : 4 * label + 4] += 190
        (tmp_path / "squares").mkdir(exist_ok=True)
        np.savez(tmp_path / f"squares/{split}.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path / "squares"


def parameters(folder):
    model, _ = vit.load_model(folder)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(split_model(model)[1])}


def test_learns_and_predicts_from_its_folder(squares, tmp_path, command):
    rate = ("--optim.learning-rate", 0.01, "--epochs", 20, "--augment.crop", "none")
    status, out, err = command("tiny", "--data.path", squares, "--run-dir", "run", *SMALL, *rate)
    assert status == 0, err
    assert "2 classes: 32 train, 8 validation, 8 test images of 8 x 8" in out
    rows = [line.split() for line in out.split("after the last step:")[1].splitlines()]
    assert rows[1:4] == [["accuracy"], ["validation", "1.0000"], ["test", "1.0000"]]
    run = tmp_path / "run"
    assert {"confusion.png", "mistakes.png", "curves.png", "results.json"} <= {path.name for path in run.iterdir()}
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(p["split"], p["row"]) for p in predictions] == [(s, i) for s in ("validation", "test") for i in range(8)]
    assert all(p["label"] == p["predicted"] and 0.5 < p["probability"] <= 1 for p in predictions)
    results = json.loads((run / "results.json").read_text())
    assert results["images_per_second"] > 0
    assert results["peak_memory_bytes"] > 1e7
    assert any("images_per_second" in record for record in read_metrics(run))

    images = np.load(squares / "test.npz")["images"]
    said = vit.predict(run, [Image.fromarray(images[0]), images[1]])
    assert [p.label for p in said] == ["0", "1"]
    assert sum(said[0].probabilities.values()) == pytest.approx(1)
    assert vit.predict(run, []) == []

    # Another head on it where classes are others; the same one where they are as many.
    status, out, err = command("tiny", "--init", run, "--evaluate-only", "--data.path", squares)
    assert (status, out.splitlines()[1].split()) == (0, ["validation", "1.0000"]), err
    status, _, err = command("tiny", "--init", run, "--run-dir", "more", "--epochs", "None", "--steps", 1)
    assert status == 0, err
    assert vit.load_model(tmp_path / "more")[0].config.n_classes == 10


def test_a_stopped_run_goes_on_bit_for_bit(squares, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = ("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--augment.erase", 0.5, "--model.drop-path", 0.3)
    arguments = ("tiny", "--data.path", squares, *SMALL, *change, "--train.ema", 0.9, "--train.save-every", 2)
    assert command(*arguments, "--run-dir", "whole", "--epochs", 2)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "_stop_signals", _stop_after(3))
        status, out, _ = command(*arguments, "--run-dir", "parts", "--epochs", 2)
        assert (status, "stopped at step" in out) == (0, True)
    status, out, _ = command(*arguments, "--run-dir", "parts", "--epochs", 2)
    assert "resumed from step" in out
    whole, parts = parameters(tmp_path / "whole"), parameters(tmp_path / "parts")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def _stop_after(n):
    """In place of the loop's signals: stops it at its n-th question."""

    class Stop:
        asked = 0

        @property
        def requested(self):
            Stop.asked += 1
            return Stop.asked >= n

    class Manager:
        def __call__(self):
            return self

        def __enter__(self):
            return Stop()

        def __exit__(self, *exception):
            pass

    return Manager()


def test_several_seeds_have_a_mean(squares, tmp_path, command):
    status, out, err = command(
        "tiny", "--data.path", squares, "--run-dir", "seeds", *SMALL, "--epochs", 1, "--seeds", 3, 4
    )
    assert status == 0, err
    assert "mean of 2 seeds ± their standard deviation" in out
    assert {path.name for path in (tmp_path / "seeds").iterdir()} == {
        "seed-3",
        "seed-4",
        "config.json",
        "results.json",
    }
    one, other = (parameters(tmp_path / f"seeds/seed-{seed}") for seed in (3, 4))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_loss_is_that_of_both_images_by_their_shares(monkeypatch):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    config = zoo.ImageClassifierConfig(d_model=8, n_layers=1, pattern="-/mlp", image_size=4, patch_size=4, n_classes=5)
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(zoo.ImageClassifier, "read", lambda self, hidden: logits)
    labels, partners, share = np.array([0, 1, 2]), np.array([4, 4, 2]), np.array([1.0, 0.3, 0.6], np.float32)
    batch = {"images": jnp.zeros((3, 4, 4, 3)), "labels": labels, "partners": partners, "share": share}
    loss = vit.image_loss(model, batch, None, smoothing=0.1)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)

    def nats(i, label):
        return -(0.9 * log_p[i, label] + 0.1 * log_p[i].mean())

    expected = sum(share[i] * nats(i, labels[i]) + (1 - share[i]) * nats(i, partners[i]) for i in range(3))
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert float(loss.weight) == 3


def test_a_mixture_of_experts_is_trained_with_its_balance():
    images, labels = np.random.default_rng(0).random((3, 8, 8, 1), np.float32), np.array([0, 1, 2])
    batch = {"images": jnp.asarray(images), "labels": labels, "partners": labels, "share": np.ones(3, np.float32)}
    losses = []
    for pattern in ("attn/moe[n_experts=3,d_ff=8,balance_weight=0.5]", "attn/mlp"):
        config = zoo.ImageClassifierConfig(
            **{"d_model": 16, "n_layers": 1, "pattern": pattern, "image_size": 8, "patch_size": 4, "channels": 1},
            n_classes=3,
            attn=zoo.AttentionConfig(n_heads=2),
        )
        model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
        losses.append(vit.image_loss(model, batch, None, smoothing=0.0))
        if "moe" in pattern:
            assert losses[0].auxiliary == model.run(batch["images"])[1] > 0.4
    assert losses[1].auxiliary is None


def test_scores_count_ranks():
    logits = np.array([[6, 5, 4, 3, 2, 1, 0.0]] * 3, np.float32)
    scores = vit.score(logits, np.array([0, 4, 5]))
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["top5"] == pytest.approx(2 / 3)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, np.array([0, 4, 5])).mean()
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert "top5" not in vit.score(logits[:, :5], np.array([0, 1, 2]))


def test_a_batch_depends_on_seed_and_step_alone(squares):
    config = dataclasses.replace(vit.PRESETS["tiny"][1], augment=AugmentConfig(crop="shift", rotate=5, mixup=0.8))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(squares)))
    prepared = vit.prepare(config)
    images, rows = prepared.data.splits["train"], np.array([3, 1, -1, 2])
    one, again, other = (
        vit.training_batch(images, rows, prepared.preprocess, seed, step) for seed, step in ((0, 1), (0, 1), (0, 2))
    )
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["images"], other["images"])
    assert set(one["labels"][2:3]) <= set(images.labels[[3, 1, 2]])


@pytest.mark.parametrize("pattern", ["attn/mlp", "m2/monarch", "vim", "ss2d/mlp[d_ff=64]"])
def test_the_mixers_of_the_mnist_preset_are_of_equal_size(pattern):
    model = dataclasses.replace(vit.PRESETS["mnist"][1].model, pattern=pattern, n_classes=10)
    assert count_params(model) == pytest.approx(128_400, rel=0.02)


@pytest.mark.parametrize("name", vit.PRESETS)
def test_presets_fit_their_images(name):
    config = vit.PRESETS[name][1]
    model = dataclasses.replace(config.model, n_classes=10, n_layers=1)
    size = (config.image_size or model.image_size,) * 2
    images = jax.ShapeDtypeStruct((1, *size, model.channels), jnp.float32)
    logits = nnx.eval_shape(lambda images: zoo.ImageClassifier(model, rngs=nnx.Rngs(0))(images), images)
    assert logits.shape == (1, 10)
    assert len(config.preprocess.mean) in (1, model.channels)


def test_published_preprocessing_is_read(tmp_path):
    default = vit.PreprocessConfig()
    assert vit.read_preprocess(tmp_path, default) is default
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 256, "crop_size": 224}
    for change, fraction in (({"do_center_crop": True}, 0.875), ({"do_center_crop": False}, 1.0)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | change))
        assert vit.read_preprocess(tmp_path, default) == vit.PreprocessConfig(
            (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), fraction
        )
    sizes = {"size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | sizes))
    assert vit.read_preprocess(tmp_path, default).crop_fraction == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "preset 'tinny'"),
        (["tiny", "--data.path", "nowhere"], "--data.path nowhere is no folder"),
        (["tiny", "--model.n-classes", "7"], "--model.n-classes 7, but scikit-learn's digits has 10 classes"),
        (["tiny", "--image-size", "9", "--model.patch-size", "2"], "patch_size=2"),
        (["tiny", "--image-size", "9"], "images of 9 x 9 pixels are 81 tokens, --model.m2.l-max 64"),
        (["tiny", "--init", "nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (["tiny", "--steps", "7"], "--steps 7 with --epochs 30; --epochs None goes by the steps"),
        (["tiny", "--evaluate-only"], "--evaluate-only is for an --init"),
        (["tiny", "--augment.crop", "middle"], "middle"),
        (["mnist"], "python -m experiments.data fetch mnist-5k"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, command, arguments, message):
    status, _, err = command(*arguments)
    assert status != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_flags_come_back_from_their_file(tmp_path):
    config = vit.PRESETS["deit-tiny"][1]
    flags.save_config(config, tmp_path / "config.json")
    assert flags.load_config(vit.Config, tmp_path / "config.json") == config


def test_the_average_is_what_is_evaluated(tmp_path):
    """The running mean of the parameters, by hand, is what the run's checkpoint gives."""
    config = zoo.ImageClassifierConfig(
        d_model=8, n_layers=1, n_classes=2, image_size=4, patch_size=2, channels=1, attn=zoo.AttentionConfig(n_heads=1)
    )
    model = zoo.ImageClassifier(config, rngs=nnx.Rngs(0))
    seen = []
    _, params, _ = split_model(model)
    optimizer = optax.sgd(0.1)
    loss = functools.partial(vit.image_loss, smoothing=0.0)
    step = train.make_train_step(model, loss, optimizer, ema=0.3)
    images = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1])
    batch = {"images": images, "labels": labels, "partners": labels, "share": np.ones(2, np.float32)}
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)  # noqa: E731
    state = train.TrainState(
        jnp.int32(0), copy(params), optimizer.init(params), jax.random.key(0), average=copy(params)
    )
    expected = jax.tree.map(np.asarray, params)
    for i in range(5):
        state, _ = step(state, batch)
        seen.append(jax.tree.map(np.asarray, state.params))
        decay = min(0.3, (1 + i) / (10 + i))
        expected = jax.tree.map(lambda a, p, decay=decay: decay * a + (1 - decay) * p, expected, seen[-1])
    assert_close(jax.tree.leaves(state.average), jax.tree.leaves(expected))


def test_a_run_in_a_published_layout_is_as_good(squares, run_command, tmp_path):
    shape = ("--model.class-token", "first", "--model.pool", "token", "--preprocess.mean", 0.4, "--preprocess.std", 0.3)
    arguments = ("tiny", "--data.path", squares, "--run-dir", "run", *SMALL, *shape, "--epochs", 8)
    assert run_command(vit, *arguments, "--optim.learning-rate", 0.01)[0] == 0
    status, out, err = run_command(convert, "run", "out")
    assert (status, "read back and equal" in out) == (0, True), err
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "0", "1": "1"}
    scores = json.loads((tmp_path / "run/results.json").read_text())["runs"][0]
    config = dataclasses.replace(
        vit.PRESETS["tiny"][1], data=vit.ImagesConfig(path=str(squares)), init="out", evaluate_only=True
    )
    again = vit.evaluate_only(config)
    assert again["test"]["loss"] == pytest.approx(scores["test"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", "vim"])
def test_bfloat16_trains_both_directions_without_nan(tmp_path, pattern):
    """Users of Vision Mamba meet NaN in half precision; the loop would raise FloatingPointError at the first one."""
    _, config = vit.PRESETS["tiny"]
    shape = vit.small_classifier(32, 2, 8, 2, pattern=pattern, dtype="bfloat16", residual_in_fp32=False)
    trained = vit.fit(
        dataclasses.replace(
            config,
            model=shape,
            epochs=None,
            train=dataclasses.replace(config.train, steps=2000, batch_size=32, eval_every=1000, save_every=2000),
        ),
        tmp_path / "run",
    )
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert np.isfinite(losses).all()
    assert trained.scores["test"]["accuracy"] > 0.85


def test_help_is_worth_reading(command):
    status, out, _ = command("mnist", "--help")
    assert status == 0
    for words in ("--augment.mixup", "--data.hub", "--model.pattern", "--train.ema", "Share of the target"):
        assert words in out
