"""Where images come from: folders, arrays, the hub's layout, scikit-learn; and how they are split."""

import numpy as np
import pytest
from PIL import Image

from experiments.data.image_folders import find_images
from experiments.data.images import ImagesConfig, load_images

pytestmark = pytest.mark.usefixtures("empty_folder")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


def pixels(images):
    return [int(np.asarray(images.read(i)).flat[0]) for i in range(len(images.labels))]


def test_digits_are_there_without_a_download():
    data = load_images(ImagesConfig())
    assert data.classes == tuple("0123456789")
    assert {name: len(split.labels) for name, split in data.splits.items()} == {
        "train": 1287,
        "validation": 150,
        "test": 360,
    }
    image = np.asarray(data.splits["train"].read(0))
    assert image.shape == (8, 8)
    assert image.dtype == np.uint8
    assert image.max() > 200
    counts = np.bincount(data.splits["validation"].labels)
    assert counts.max() - counts.min() <= 2


def test_folders_of_classes(tmp_path):
    for i in range(10):
        write(tmp_path / f"photos/{'cat' if i % 2 else 'dog'}/{i}.png", 10 * i)
    data = load_images(ImagesConfig(path="photos", validation_fraction=0.2))
    assert data.classes == ("cat", "dog")
    train, held_out = data.splits.values()
    assert sorted(pixels(train) + pixels(held_out)) == [10 * i for i in range(10)]
    assert np.bincount(held_out.labels).tolist() == [1, 1]
    for split in (train, held_out):
        assert [data.classes[label] for label in split.labels] == [
            "cat" if value // 10 % 2 else "dog" for value in pixels(split)
        ]


def test_folders_of_splits(tmp_path):
    for split, n in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(n):
            write(tmp_path / f"photos/{split}/{'ab'[i % 2]}/{i}.png", i)
    data = load_images(ImagesConfig(path="photos"))
    assert {name: len(split.labels) for name, split in data.splits.items()} == {
        "train": 4,
        "validation": 2,
        "test": 2,
    }


def test_folders_in_a_class_are_of_that_class(tmp_path):
    for i, name in enumerate(("cat/1", "cat/outside/2", "cat/outside/at night/3", "dog/4", "dog/5", "dog/x/6")):
        write(tmp_path / f"photos/{name}.png", i)
    write(tmp_path / "around/photos/cat/in/1.png", 0)
    write(tmp_path / "around/photos/dog/in/1.png", 1)
    data = load_images(ImagesConfig(path="photos", validation_fraction=0.3))
    assert data.classes == ("cat", "dog")
    kept = {
        value: data.classes[label]
        for s in data.splits.values()
        for value, label in zip(pixels(s), s.labels, strict=True)
    }
    assert kept == {0: "cat", 1: "cat", 2: "cat", 3: "dog", 4: "dog", 5: "dog"}
    with pytest.raises(ValueError, match="2 images, too few to hold some out"):
        load_images(ImagesConfig(path="around"))


def test_a_class_may_be_called_train(tmp_path):
    for i in range(8):
        write(tmp_path / f"vehicles/{('train', 'bus')[i % 2]}/{i}.png", i)
    assert load_images(ImagesConfig(path="vehicles", validation_fraction=0.3)).classes == ("bus", "train")


def test_images_in_no_class_are_counted(tmp_path, caplog):
    for i in range(8):
        write(tmp_path / f"photos/train/{'ab'[i % 2]}/{i}.png", i)
    write(tmp_path / "photos/train/stray.png", 9)
    write(tmp_path / "photos/more/a/1.png", 9)
    data = load_images(ImagesConfig(path="photos", validation_fraction=0.3))
    assert sum(len(split.labels) for split in data.splits.values()) == 8
    said = [record.message.split(": ", 1)[1] for record in caplog.records]
    assert said == [
        "more beside train is left out",
        "1 images lie in no folder of a class and are left out, such as stray.png",
    ]


def test_the_order_is_that_of_the_names_as_it_always_was(tmp_path):
    """The order decides which images are held out; it was found with `datasets`' imagefolder."""
    names = [
        "B/1.png",
        "B/10.png",
        "B/2.png",
        "B/A.png",
        "B/_x.png",
        "B/a b.png",
        "B/é.png",
        "cat/1.png",
        "cat/img-1.png",
    ]
    names += ["cat/img.2.png", "dog/1.jpg"]
    for i, name in enumerate(reversed(names)):
        write(tmp_path / "photos" / name, i)
    files = find_images(tmp_path / "photos", "photos")["train"]
    assert [path.relative_to(tmp_path / "photos").as_posix() for path in files.paths] == names


def test_a_bad_image_is_named_and_left_out_on_request(tmp_path, caplog):
    for i in range(20):
        write(tmp_path / f"photos/{'ab'[i % 2]}/{i:02}.png", i)
    whole = (tmp_path / "photos/a/04.png").read_bytes()
    (tmp_path / "photos/a/04.png").write_bytes(whole[:50])
    (tmp_path / "photos/b/05.jpg").write_bytes(b"no picture")
    data = load_images(ImagesConfig(path="photos"))
    with pytest.raises(ValueError, match=r"the image 'a/04.png' cannot be read"):
        [split.read(i) for split in data.splits.values() for i in range(len(split.labels))]
    data = load_images(ImagesConfig(path="photos", skip_bad=True))
    assert sorted(value for split in data.splits.values() for value in pixels(split)) == [*range(4), *range(5, 20)]
    said = " ".join(record.message for record in caplog.records)
    assert "the image 'a/04.png' cannot be read" in said
    assert "the image 'b/05.jpg' cannot be read (no picture that Pillow knows); left out" in said
    assert "2 of 21 images of train were left out, as --data.skip-bad asks" in said


def test_arrays(tmp_path):
    (tmp_path / "arrays").mkdir()
    images = np.arange(24 * 4, dtype=np.uint8).reshape(24, 2, 2)
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        np.savez(tmp_path / f"arrays/{name}.npz", images=images[part], labels=np.arange(24)[part] % 3)
    data = load_images(ImagesConfig(path="arrays", validation_split="test", test_splits=()))
    assert list(data.splits) == ["train", "test"]
    assert data.classes == ("0", "1", "2")
    assert pixels(data.splits["test"]) == [80, 84, 88, 92]


def test_a_data_set_laid_out_as_the_hubs(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["x", "y"])})
    for split, labels in (("train", [0, 1, 0, 1]), ("test", [1, -1])):
        rows = [{"img": Image.fromarray(np.full((2, 2), i, np.uint8)), "fine": label} for i, label in enumerate(labels)]
        table = datasets.Dataset.from_list(rows, features=features)
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
    data = load_images(ImagesConfig(hub="data", validation_fraction=0.5))
    assert data.classes == ("x", "y")
    assert list(data.splits) == ["train", "validation"]  # the test's labels are kept secret


def test_fewer_images_are_the_first_of_more():
    few, more = (load_images(ImagesConfig(train_images=n)).splits["train"] for n in (50, 100))
    assert np.bincount(few.labels).tolist() == pytest.approx([5] * 10, abs=1)
    seen = {np.asarray(more.read(i)).tobytes() for i in range(100)}
    assert {np.asarray(few.read(i)).tobytes() for i in range(50)} <= seen


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "nowhere"}, FileNotFoundError, "--data.path nowhere is no folder"),
        ({"path": "empty"}, ValueError, "--data.path empty holds no images in folders named after their class"),
        (
            {"path": "one"},
            ValueError,
            "--data.path one: all images of train are of the class 'cat', expected at least two",
        ),
        (
            {"path": "ones"},
            ValueError,
            "--data.path ones: all images of train are of the class '1', expected at least two",
        ),
        ({"path": "unseen"}, ValueError, "--data.path unseen: the class 'c' of test is never in train"),
        ({"path": "broken"}, ValueError, "--data.path broken: train.npz cannot be read"),
        ({"path": "floats"}, ValueError, r"train.npz holds images float64\(3, 2, 2\) .*expected uint8"),
        ({"fetched": "mnist-5"}, ValueError, "data set 'mnist-5'.*mnist-5k"),
        ({"fetched": "mnist-5k"}, FileNotFoundError, "python -m experiments.data fetch mnist-5k"),
        ({"hub": "no/such"}, ValueError, "--data.hub no/such cannot be loaded"),
        ({"path": "named", "train_split": "training"}, ValueError, "no images 'training' to train on; there are train"),
    ],
)
def test_mistakes_are_named(tmp_path, options, error, message):
    for name in ("empty", "broken", "floats", "named"):
        (tmp_path / name).mkdir()
    for name in ("one/cat/1", "one/cat/2", "unseen/train/a/1", "unseen/train/b/1", "unseen/test/c/1"):
        write(tmp_path / f"{name}.png", 1)
    (tmp_path / "ones").mkdir()
    np.savez(tmp_path / "ones/train.npz", images=np.zeros((3, 2, 2), np.uint8), labels=np.ones(3, int))
    (tmp_path / "broken/train.npz").write_bytes(b"PK no")
    np.savez(tmp_path / "floats/train.npz", images=np.zeros((3, 2, 2)), labels=np.zeros(3))
    np.savez(tmp_path / "named/train.npz", images=np.zeros((3, 2, 2), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(error, match=message):
        load_images(ImagesConfig(**options))


def test_exclusive_flags():
    with pytest.raises(ValueError, match=r"--data.path and --data.hub exclude each other"):
        ImagesConfig(path="a", hub="b")
