"""Folders of others: what leads out of them, and what is no file, is named and left out."""

import logging
import os

import numpy as np
import pytest

from experiments.data.documents import DataConfig, open_source
from experiments.data.image_folders import find_images
from experiments.data.images import ImagesConfig, load_images
from experiments.data.inside import what_is_wrong
from experiments.data.labelled import LabelledConfig, load_labelled


@pytest.fixture
def folder(tmp_path):
    """What others might pack: a file, links within and out, a circle, a pipe, a device."""
    (tmp_path / "secret.txt").write_text("of this machine")
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("a text of its own")
    (root / "b.txt").symlink_to("sub/a.txt")
    (root / "out.txt").symlink_to("../secret.txt")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "circle.txt").symlink_to("circle.txt")
    (root / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.txt")
    return root


def test_what_is_within_is_told_from_what_is_not(folder):
    names = ("sub", "sub/a.txt", "b.txt", "out.txt", "gone.txt", "circle.txt", "zero.txt", "pipe.txt")
    said = {name: what_is_wrong(folder / name, folder) for name in names}
    device = "is a pipe, a socket or a device"
    assert said == dict(
        zip(names, ("", "", "", "leads out of the folder", *["leads nowhere"] * 2, device, device), strict=True)
    )


def test_a_snapshot_of_the_hubs_cache_is_within_though_all_of_it_are_links(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1f")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/1f")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "models--x" / "refs")
    assert what_is_wrong(snapshot / "tokenizer.json", snapshot) == ""
    assert what_is_wrong(snapshot / "1_Pooling" / "config.json", snapshot) == ""
    assert what_is_wrong(snapshot / "vocab.txt", snapshot) == "leads nowhere"
    linked = tmp_path / "mine"
    linked.symlink_to(snapshot)
    assert what_is_wrong(linked / "tokenizer.json", linked) == ""


@pytest.mark.parametrize("pattern", ["", "/*.txt"])
def test_texts_are_read_within_the_folder(pattern, folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = open_source(DataConfig(path=f"{folder}{pattern}"))
        texts = [document.text for document in source.documents()]
    assert texts == ["a text of its own"] * (1 if pattern else 2)
    said = caplog.text
    for name in (
        "'out.txt' leads out of the folder",
        "'pipe.txt' is a pipe",
        "'zero.txt' is a pipe",
        "'gone.txt' leads",
    ):
        assert said.count(name) == 1, name


def test_a_pipe_is_no_text(folder):
    with pytest.raises(ValueError, match="is a pipe, a socket or a device; expected a text file"):
        open_source(DataConfig(path=str(folder / "pipe.txt")))


def test_tables_and_arrays_are_found_within_the_folder(folder, tmp_path, caplog):
    (folder / "train.csv").write_text("text,label\n" + "".join(f"a{i},{i % 2}\nb{i},{i % 2}\n" for i in range(9)))
    (folder / "test.csv").symlink_to("../secret.txt")
    os.mkfifo(folder / "validation.csv")
    with caplog.at_level(logging.WARNING):
        assert load_labelled(LabelledConfig(path=str(folder))).splits["train"]
    for said in ("'test.csv' leads out of the folder; left out", "'validation.csv' is a pipe, a socket or a device"):
        assert caplog.text.count(said) == 1
    arrays, images = tmp_path / "arrays", np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    arrays.mkdir()
    np.savez(arrays / "train.npz", images=images, labels=np.arange(4) % 2)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(4) % 2)
    (arrays / "test.npz").symlink_to("../test.npz")
    with caplog.at_level(logging.WARNING):
        assert "test" not in load_images(ImagesConfig(path=str(arrays), validation_fraction=0.5)).splits
    assert "'test.npz' leads out of the folder; left out" in caplog.text


def test_images_are_found_within_the_folder(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "3.png").touch()
    root = tmp_path / "photos"
    for name in ("cat/1.png", "dog/2.png"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "dog" / "all").symlink_to(root)
    (root / "dog" / "tame.png").symlink_to("2.png")
    (root / "dog" / "out.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "cat" / "pipe.png")
    with caplog.at_level(logging.WARNING):
        (files,) = find_images(root, "--data.path photos").values()
    assert [path.relative_to(root).as_posix() for path in files.paths] == ["cat/1.png", "dog/2.png", "dog/tame.png"]
    for said in ("'owl' leads out of the folder", "'dog/out.png' leads out", "'cat/pipe.png' is a pipe"):
        assert said in caplog.text
