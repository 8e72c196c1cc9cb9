"""RandAugment at the strengths of DeiT's recipe: facts taken from timm 1.0.31's rand-m9-mstd0.5-inc1."""

import numpy as np
import pytest
from PIL import Image

from experiments.data import rand_augment
from experiments.data.rand_augment import OPERATIONS, Operation, RandAugment

# What timm gives each operation at m = 4.5, 9 and 10: the value, or, where it draws a sign, both.
TIMM = {
    "rotate": [(-13.5, 13.5), (-27, 27), (-30, 30)],
    "posterize": [(3,), (1,), (0,)],
    "solarize": [(141,), (26,), (0,)],
    "solarize-add": [(49,), (99,), (110,)],
    "color": [(0.595, 1.405), (0.19, 1.81), (0.1, 1.9)],
    "contrast": [(0.595, 1.405), (0.19, 1.81), (0.1, 1.9)],
    "brightness": [(0.595, 1.405), (0.19, 1.81), (0.1, 1.9)],
    "sharpness": [(0.595, 1.405), (0.19, 1.81), (0.1, 1.9)],
    "shear-x": [(-0.135, 0.135), (-0.27, 0.27), (-0.3, 0.3)],
    "shear-y": [(-0.135, 0.135), (-0.27, 0.27), (-0.3, 0.3)],
    "translate-x": [(-0.2025, 0.2025), (-0.405, 0.405), (-0.45, 0.45)],
    "translate-y": [(-0.2025, 0.2025), (-0.405, 0.405), (-0.45, 0.45)],
}
UNSIZED = {"auto-contrast", "equalize", "invert"}


def picture(mode="RGB", width=40, height=30):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def test_every_operation_is_as_strong_as_timms():
    assert OPERATIONS.keys() == TIMM.keys() | UNSIZED
    for name, facts in TIMM.items():
        operation = OPERATIONS[name]
        for magnitude, expected in zip((4.5, 9, 10), facts, strict=True):
            signs = (-1, 1) if operation.signed else (1,)
            assert [operation.value(sign * magnitude / 10) for sign in signs] == pytest.approx(expected), name


def test_what_operations_do_to_pixels():
    grey = Image.fromarray(np.array([[0, 10, 100, 127, 128, 200, 255]], np.uint8))

    def done(name, value):
        return np.asarray(OPERATIONS[name].apply(grey, value, 0)).ravel().tolist()

    assert done("posterize", 1) == [0, 0, 0, 0, 128, 128, 128]
    assert done("posterize", 0) == [0] * 7
    assert done("solarize", 26) == [0, 10, 155, 128, 127, 55, 0]
    assert done("solarize-add", 99) == [99, 109, 199, 226, 128, 200, 255]
    assert done("brightness", 0.19) == [0, 1, 19, 24, 24, 38, 48]
    assert done("invert", 1) == [255, 245, 155, 128, 127, 55, 0]


def test_what_comes_in_is_of_the_fill_colour():
    image = Image.new("RGB", (40, 40), (200, 0, 0))
    moved = np.asarray(OPERATIONS["translate-x"].apply(image, 0.405, (1, 2, 3)))  # to the left by 16.2 pixels
    assert (moved[:, :23] == (200, 0, 0)).all()
    assert (moved[:, 25:] == (1, 2, 3)).all()
    turned = np.asarray(OPERATIONS["rotate"].apply(image, 27.0, (1, 2, 3)))
    assert turned[0, 0].tolist() == [1, 2, 3]
    assert turned[20, 20].tolist() == [200, 0, 0]


def test_how_often_and_how_strongly(monkeypatch):
    seen = []

    def recorded(name, signed):
        return Operation(lambda share: share, lambda image, value, fill: seen.append((name, value)) or image, signed)

    fakes = {name: recorded(name, operation.signed) for name, operation in OPERATIONS.items()}
    monkeypatch.setattr(rand_augment, "OPERATIONS", fakes)
    change, random = RandAugment(2, 9), np.random.default_rng(0)
    for _ in range(4000):
        change(picture(), random)
    assert len(seen) == pytest.approx(4000, rel=0.05)  # two operations, each half of the time
    counts = np.unique([name for name, _ in seen], return_counts=True)[1]
    assert len(counts) == 15
    assert counts.max() < 1.5 * counts.min()
    values = np.array([value for name, value in seen if fakes[name].signed])
    assert np.mean(values > 0) == pytest.approx(0.5, abs=0.04)
    assert np.mean(np.abs(values)) == pytest.approx(0.9, abs=0.01)
    assert np.std(np.abs(values)) == pytest.approx(0.05, abs=0.01)
    assert np.abs(values).max() == 1
    assert min(value for name, value in seen if not fakes[name].signed) > 0.6


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_keeps_size_and_mode(mode):
    for magnitude in (0, 9, 10):
        for seed in range(40):
            image = RandAugment(4, magnitude, fill=(1, 2, 3))(picture(mode), np.random.default_rng(seed))
            assert (image.size, image.mode) == ((40, 30), mode)
