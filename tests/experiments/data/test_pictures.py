"""Every kind of picture looks as it should: bit depths, palettes, transparency, CMYK, EXIF; damaged ones are named."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.data.augment import Preprocess, PreprocessConfig
from experiments.data.pictures import flatten, from_array, open_picture, plain
from experiments.loop.flags import UsageError

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every value of 8 bits, in 16
RED = (200, 30, 10)


def saved(image, kind="PNG", **options):
    """What a picture is after it has been written and read."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return open_picture(file.getvalue(), "a")


def pixels(image, mode="RGB", background=(255, 255, 255)):
    return np.asarray(flatten(image, mode, background))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut_off(kind):
    image = saved(Image.fromarray(RAMP), kind)
    np.testing.assert_array_equal(pixels(image, "L").ravel(), np.arange(256))
    array = Preprocess(PreprocessConfig((0.0,), (1.0,)), 16, 3)(Image.fromarray(RAMP))
    assert array.mean() == pytest.approx(0.5, abs=1e-6)


def test_32_bit_integers_are_those_of_16_and_floats_are_refused():
    image = Image.fromarray(RAMP.astype(np.int32))
    np.testing.assert_array_equal(pixels(image, "L").ravel(), np.arange(256))
    with pytest.raises(ValueError, match="its pixels go from 0 to 70000, expected 8 or 16 bits"):
        plain(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(UsageError, match=r"the image 'a' cannot be read .*floating-point numbers"):
        saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")


def test_what_is_transparent_shows_the_background():
    see_through = np.zeros((2, 2, 4), np.uint8)
    see_through[0] = (*RED, 255)
    see_through[1] = (*RED, 102)  # 40 %
    image = saved(Image.fromarray(see_through))
    over_white = pixels(image)
    assert over_white[0, 0].tolist() == list(RED)
    assert over_white[1, 0].tolist() == [round(0.4 * c + 0.6 * 255) for c in RED]
    assert pixels(image, background=(0,))[1, 0].tolist() == [round(0.4 * c) for c in RED]
    assert pixels(image, background=(0, 100, 50))[1, 0].tolist() == [80, 72, 34]
    grey = Image.fromarray(np.stack([np.full((2, 2), 50), np.full((2, 2), 0)], -1).astype(np.uint8), "LA")
    assert pixels(saved(grey), "L", (9,)).tolist() == [[9, 9], [9, 9]]
    shown = Preprocess(PreprocessConfig((0.0,), (1.0,), background=(51,)), 2, 1)(grey)
    np.testing.assert_allclose(shown, 0.2, atol=1e-6)


def test_palettes_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image)).tolist() == [[list(RED), [0, 0, 255]]]
    for kind in ("PNG", "GIF"):
        assert pixels(saved(image, kind, transparency=1)).tolist() == [[list(RED), [255, 255, 255]]]
    rgb = Image.new("RGB", (1, 1), RED)
    assert pixels(saved(rgb, transparency=RED)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("LAB", "TIFF")])
def test_other_colours_become_red_green_and_blue(mode, kind):
    if mode == "LAB":
        image = Image.new("LAB", (8, 8), (137, 128, 128))  # a middle grey
        expected = (127, 127, 127)
    else:
        image, expected = Image.new("RGB", (8, 8), RED).convert(mode), RED
    np.testing.assert_allclose(pixels(saved(image, kind))[4, 4], expected, atol=4)


def test_black_and_white_and_grey_stay_what_they_are():
    assert pixels(saved(Image.new("1", (1, 1), 1)), "L").tolist() == [[255]]
    assert pixels(saved(Image.new("L", (1, 1), 77))).tolist() == [[[77, 77, 77]]]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 5)), (6, (0, 3)), (8, (5, 0))])
def test_pictures_are_upright(orientation, corner):
    image = Image.new("L", (6, 4), 0)
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(saved(image, exif=exif))
    assert upright[corner] == 255
    assert upright.shape == ((4, 6) if orientation in (1, 3) else (6, 4))


def test_a_damaged_picture_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UsageError, match=r"the image 'cut.jpg' cannot be read \(image file is truncated"):
        open_picture(path, "cut.jpg")
    path.write_bytes(b"text")
    with pytest.raises(UsageError, match=r"the image 'cut.jpg' cannot be read \(no picture that Pillow knows\)"):
        open_picture(path, "cut.jpg")


def test_arrays_of_8_and_16_bits():
    assert np.asarray(from_array(RAMP)).ravel().tolist() == list(range(256))
    assert from_array(np.full((2, 3, 1), 7.0)).mode == "L"
    assert from_array(np.zeros((2, 3, 4), int)).mode == "RGBA"
    with pytest.raises(ValueError, match="an image of int64 from 0 to 300, expected 0 to 255"):
        from_array(np.array([[0, 300]]))
    with pytest.raises(ValueError, match=r"an image of shape \(1, 2, 5\), expected"):
        from_array(np.zeros((1, 2, 5)))
