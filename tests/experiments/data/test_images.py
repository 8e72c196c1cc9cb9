"""Where images come from: folders, arrays, the hub's layout, scikit-learn; and how they are split."""

import numpy as np
import pytest
from PIL import Image

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
    (tmp_path / "broken/train.npz").write_bytes(b"PK no")
    np.savez(tmp_path / "floats/train.npz", images=np.zeros((3, 2, 2)), labels=np.zeros(3))
    np.savez(tmp_path / "named/train.npz", images=np.zeros((3, 2, 2), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(error, match=message):
        load_images(ImagesConfig(**options))


def test_exclusive_flags():
    with pytest.raises(ValueError, match=r"--data.path and --data.hub exclude each other"):
        ImagesConfig(path="a", hub="b")
