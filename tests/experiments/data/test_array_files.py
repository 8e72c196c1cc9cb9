"""Archives of arrays: what they hold, or one line, in the memory that the file's bytes allow."""

import io
import zipfile

import numpy as np
import pytest

from experiments.data.array_files import read_arrays

IMAGES, LABELS = np.arange(24, dtype=np.uint8).reshape(6, 2, 2), np.arange(6)


def saved(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def archive(header, body=b""):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)
    return file.getvalue()


def test_arrays_come_out_as_they_went_in(tmp_path):
    (tmp_path / "a.npz").write_bytes(saved(images=IMAGES, labels=LABELS, more=np.zeros(3)))
    images, labels = read_arrays(tmp_path / "a.npz", ("images", "labels"))
    assert images.dtype == np.uint8
    assert (images == IMAGES).all()
    assert (labels == LABELS).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(images=IMAGES)[:-40], "a.npz cannot be read .File is not a zip file"),
        (saved(images=IMAGES).replace(b"NUMPY", b"NUMPX"), "a.npz cannot be read"),
        (saved(labels=LABELS), "There is no item named 'images.npy'"),
        (saved(images=np.array([{}], object)), "has [0-9]+ bytes, which object|Object arrays cannot be loaded"),
        (
            archive(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,)}\n", b"\0"),
            r"has \d+ bytes, w",
        ),
        (archive(b"{}\n", bytes(300 * 2**20)), "unpacks to 314,572,813 bytes, expected at most 268,435,456 of such a"),
        (archive(b"(" * 9000 + b"\n"), "a.npz cannot be read"),
        (b"", "a.npz cannot be read"),
    ],
    ids=["cut", "other magic", "absent", "objects", "huge shape", "zeros", "deep header", "empty"],
)
def test_what_is_not_right_is_one_line_that_names_the_file(content, message, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_arrays(tmp_path / "a.npz", ("images",))
    assert "\n" not in str(error.value)
