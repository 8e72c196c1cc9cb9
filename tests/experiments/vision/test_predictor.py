"""An image classifier answers in its classes' names, from runs and published folders; what is no image is refused."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import zoo
from experiments import convert, vit
from experiments.data.augment import PreprocessConfig
from experiments.data.images import ImagesConfig, load_images
from experiments.loop import runs
from experiments.loop.checkpoints import Checkpoints
from experiments.loop.train import split_model
from experiments.vision.meaning import Meaning, save_meaning
from experiments.vision.predictor import Predictor
from experiments.vision.results import prediction_rows

CLASSES = ("été", "hiver", "mai")
CONFIG = zoo.ImageClassifierConfig(
    d_model=16,
    n_layers=1,
    n_classes=3,
    image_size=8,
    patch_size=4,
    channels=1,
    attn=zoo.AttentionConfig(n_heads=2, position="none", bias=True),
    mlp=zoo.MLPConfig(gated=False, activation="gelu", bias=True, d_ff=16),
)


@pytest.fixture
def run(empty_folder) -> Path:
    """A run's folder, as `vit` leaves it, without any training; and five images beside it."""
    folder = empty_folder / "run"
    folder.mkdir()
    runs.save_model_config(CONFIG, folder)
    save_meaning(Meaning(PreprocessConfig(mean=(0.4,), std=(0.3,)), 8, CLASSES), folder)
    with Checkpoints(folder) as checkpoints:
        params = split_model(zoo.ImageClassifier(CONFIG, rngs=nnx.Rngs(0)))[1]
        checkpoints.save(1, {"params": params}, data_state={})
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 9, 9), np.uint8)):
        (empty_folder / f"images/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(empty_folder / f"images/{'ab'[i % 2]}/{i}.png")
    return folder


def files():
    return sorted(Path("images").rglob("*.png"))


def test_classes_come_by_name_whatever_an_image_is_given_as(run):
    ask = Predictor.from_pretrained(run)
    said = ask(files(), batch_size=2)
    assert len(said) == 5
    for one in said:
        assert list(one.probabilities) == list(CLASSES)
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert one.label == max(one.probabilities, key=one.probabilities.get)
    opened = [Image.open(path) for path in files()]
    for images in ([str(path) for path in files()], opened, np.stack([np.asarray(image) for image in opened])):
        again = ask(images)
        assert [one.label for one in again] == [one.label for one in said]
        np.testing.assert_allclose(
            [max(one.probabilities.values()) for one in again],
            [max(one.probabilities.values()) for one in said],
            atol=1e-5,
        )
    assert ask([]) == []


@pytest.mark.parametrize("layout", ["native", "transformers"])
def test_a_converted_folder_says_what_the_run_said(run, run_command, layout):
    status, _, err = run_command(convert, run, "out", "--layout", layout)
    assert status == 0, err
    assert not Path("out/images.json").exists()
    one, other = (Predictor.from_pretrained(folder)(files()) for folder in (run, "out"))
    assert [said.label for said in one] == [said.label for said in other]
    assert other[0].probabilities == pytest.approx(one[0].probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("images/a/0.png", "images is one str 'images/a/0.png', expected a list of images"),
        (np.zeros((8, 8), np.uint8), "images is one ndarray, expected a list of images"),
        (["missing.png"], r"missing.png does not exist; expected an image"),
        (["run/model.json"], r"run/model.json' cannot be read \(no picture that Pillow knows\)"),
        ([np.zeros((8, 8), np.float32)], r"images\[0\] is float32\(8, 8\), expected .* whole numbers 0 to 255"),
        ([np.full((8, 8), 256)], r"images\[0\]: an image of int64 from 256 to 256, expected 0 to 255"),
    ],
)
def test_what_is_no_image_is_refused(run, images, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Predictor.from_pretrained(run)(images)


def test_the_command_takes_files_and_folders(run, run_command, monkeypatch):
    expected = [one.label for one in Predictor.from_pretrained(run)(files())]
    status, out, err = run_command(vit, "predict", "run", "images", "--out", "out.csv")
    assert (status, out) == (0, "5 predictions in out.csv\n"), err
    rows = list(csv.DictReader(Path("out.csv").read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["path", "predicted", "score", "p(été)", "p(hiver)", "p(mai)"]
    assert [(row["path"], row["predicted"]) for row in rows] == list(zip(map(str, files()), expected, strict=True))
    status, out, err = run_command(vit, "predict", "run", "images", "same.csv")  # as `bert predict` has it
    assert (status, out) == (0, "5 predictions in same.csv\n"), err
    assert Path("same.csv").read_bytes() == Path("out.csv").read_bytes()
    status, _, err = run_command(vit, "predict", "run", "images", "a.csv", "--out", "b.csv")
    assert (status, err.count("\n")) == (2, 1)
    assert "OUT a.csv and --out b.csv, expected one of the two" in err
    status, out, err = run_command(vit, "predict", "run", *files()[:2], "--no-probabilities")
    assert status == 0, err
    assert [json.loads(line)["predicted"] for line in out.splitlines()] == expected[:2]
    status, _, err = run_command(vit, "predict", "run", "missing.png")
    assert (status, err) == (1, "error: missing.png does not exist; expected an image or a folder of them\n")


def test_unreadable_images_are_named_all_at_once_or_left_out(run, run_command):
    Path("images/a/bad.png").write_bytes(b"no picture")
    Path("images/b/cut.png").write_bytes(Path("images/b/1.png").read_bytes()[:60])
    status, out, err = run_command(vit, "predict", "run", "images", "--out", "out.csv")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "the image 'images/a/bad.png' cannot be read (no picture that Pillow knows); the image 'images/b/cut" in err
    assert err.endswith("; 2 of 7 cannot be read; --skip-bad leaves such images out\n")
    assert not Path("out.csv").exists()
    status, out, err = run_command(vit, "predict", "run", "images", "--skip-bad")
    assert (status, len(out.splitlines())) == (0, 5), err
    assert "the image 'images/a/bad.png' cannot be read (no picture that Pillow knows); left out\n" in err
    assert err.endswith("2 of 7 images were left out, as --skip-bad asks\n")
    status, _, err = run_command(vit, "predict", "run", "images/a/bad.png", "--skip-bad")
    assert (status, err.splitlines()[-1]) == (1, "error: none of the images can be read")


def test_a_folder_of_images_is_read_within(run, run_command):
    Image.new("L", (9, 9)).save("secret.png")
    Path("images/a/out.png").symlink_to(Path("secret.png").resolve())
    os.mkfifo("images/a/pipe.png")
    status, out, err = run_command(vit, "predict", "run", "images")
    assert (status, len(out.splitlines())) == (0, 5), err
    assert "images: 'a/out.png' leads out of the folder; left out\n" in err
    assert "images: 'a/pipe.png' is a pipe, a socket or a device; left out\n" in err


def test_predictions_of_a_training_run_say_which_file_each_is(run):
    data = load_images(ImagesConfig(path="images", validation_fraction=0.5))
    held_out = data.splits["validation"]
    rows = list(prediction_rows("validation", held_out, np.zeros((len(held_out.labels), 2)), data.classes))
    assert rows
    for row in rows:
        assert Path(row["path"]).is_file()
        assert Path(row["path"]).parent.name == row["label"]
