"""Images with texts from tables, tar files, folders and columns of the hub's kind; what is wrong is named."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.data.image_texts import DESCRIBE, Example, ImageTextsConfig, _texts, load_image_texts


def picture(value):
    return Image.fromarray(np.full((4, 6, 3), value, np.uint8))


def png(value):
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


def table(folder, rows, name="train.jsonl"):
    for value in range(4):
        picture(value).save(folder / f"{value}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ROWS = [
    {"image": "0.png", "question": "what?", "answer": "black"},
    {"image": "1.png", "question": "what?", "answers": [{"answer": "grey"}, {"answer": "blue"}]},
    {"image": "0.png", "caption": "nothing"},
    {"file_name": "3.png", "captions": ["one", "two"]},
]


def test_a_table_names_images_and_texts(tmp_path):
    table(tmp_path, ROWS)
    table(tmp_path, ROWS[:1], "validation.jsonl")
    found = load_image_texts(ImageTextsConfig(path=str(tmp_path)))
    assert found.train.examples == (
        Example(0, "answer", "what?", "black"),
        Example(1, "answer", "what?", "grey"),
        Example(0, "caption", DESCRIBE, "nothing"),
        Example(2, "caption", DESCRIBE, "one"),
        Example(2, "caption", DESCRIBE, "two"),
    )
    assert np.asarray(found.train.read(2)).max() == 3
    assert len(found.held_out.examples) == 1


def test_without_a_split_whole_images_are_held_out(tmp_path):
    table(tmp_path, ROWS * 3, "mine.jsonl")
    config = ImageTextsConfig(path=str(tmp_path / "mine.jsonl"), validation_fraction=0.3)
    found = load_image_texts(config)
    images = [{e.image for e in side.examples} for side in (found.train, found.held_out)]
    assert images[0]
    assert images[1]
    assert not images[0] & images[1]
    assert load_image_texts(config).train.examples == found.train.examples


def tar(file, parts, mode="w"):
    with tarfile.open(file, mode) as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(file)


@pytest.mark.parametrize("folder", ["", "a/", "./", "v1.0/"])
def test_a_tar_has_files_of_one_key_side_by_side(folder, tmp_path):
    parts = {"0.png": png(7), "0.txt": b"\xef\xbb\xbfseven", "1.png": png(9), "._1.png": b"no", "._1.txt": b"no"}
    parts |= {"1.json": json.dumps({"question": "how?", "answer": "so"}).encode(), "readme.md": b"no"}
    tar(tmp_path / "pairs.tar", {folder + name: content for name, content in parts.items()})
    found = load_image_texts(ImageTextsConfig(path=str(tmp_path / "pairs.tar"), validation_fraction=0.5))
    examples = sorted((*found.train.examples, *found.held_out.examples))
    assert examples == [Example(0, "caption", DESCRIBE, "seven"), Example(1, "answer", "how?", "so")]
    assert [np.asarray(found.train.read(i)).max() for i in (0, 1)] == [7, 9]


@pytest.mark.parametrize(
    ("parts", "mode", "message"),
    [
        ({"0.json": b'"a cat"'}, "w", '0.json holds "a cat", expected an object of columns'),
        ({"0.json": b"{"}, "w", "0.json is not JSON"),
        ({"0.txt": b"caf\xe9"}, "w", "0.txt is not UTF-8"),
        ({"0.cls": b"1"}, "w", "0: a row with nothing, expected caption, or question and answer"),
        ({"0.txt": b"a cat"}, "w:gz", "pairs.tar cannot be read .*, expected a .tar, not compressed"),
    ],
)
def test_what_is_wrong_in_a_tar_is_named(parts, mode, message, tmp_path):
    file = tar(tmp_path / "pairs.tar", {"0.png": png(7), **parts}, mode)
    with pytest.raises(ValueError, match=f"^--data.path .*{message}"):
        load_image_texts(ImageTextsConfig(path=file))


def test_a_text_of_a_folder_that_is_no_text_is_named(tmp_path):
    picture(1).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"^--data.path .*: 0.txt is not UTF-8"):
        load_image_texts(ImageTextsConfig(path=str(tmp_path)))


def test_a_folder_of_images_with_texts_beside_them(tmp_path):
    for value in range(3):
        picture(value).save(tmp_path / f"{value}.png")
        (tmp_path / f"{value}.txt").write_text(f"number {value}\n")
    picture(9).save(tmp_path / "alone.png")
    found = load_image_texts(ImageTextsConfig(path=str(tmp_path), validation_fraction=0.4))
    assert len(found.train.examples) + len(found.held_out.examples) == 3


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "q", "multiple_choice_answer": "a", "answers": None}, [("answer", "q", "a")]),
        ({"question": "q", "multiple_choice_answer": "b", "answers": [{"answer": "a"}]}, [("answer", "q", "b")]),
        ({"question": "q", "answers": ["a", "b"]}, [("answer", "q", "a")]),
        ({"caption": ["x", "y"]}, [("caption", DESCRIBE, "x"), ("caption", DESCRIBE, "y")]),
        ({"text": " x "}, [("caption", DESCRIBE, "x")]),
        ({"question": "q", "answer": 3}, [("answer", "q", "3")]),
    ],
)
def test_columns_of_the_hub_s_sets_are_known(row, texts):
    assert list(_texts(row, "here")) == texts


def test_scenes_need_no_files():
    found = load_image_texts(ImageTextsConfig(scenes=5, held_out_scenes=3))
    assert [len(side.examples) for side in (found.train, found.held_out)] == [5, 3]
    assert found.train.read(4).size == (32, 32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "9.png", "caption": "x"}], "names the image '9.png', which is not in"),
        ([{"image": "../x.png", "caption": "x"}], "the image '../x.png' lies outside of"),
        ([{"caption": "x"}], "row 1 of train.jsonl names no image, expected a column 'image'"),
        (
            [{"image": "0.png", "words": "x"}],
            "row 1 of train.jsonl: a row with image, words, expected caption",
        ),
        ([{"image": "0.png", "caption": "x"}], "1 examples, too few to hold some out"),
    ],
)
def test_what_is_wrong_is_named(rows, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_image_texts(ImageTextsConfig(path=str(table(tmp_path, rows))))
