"""RandAugment as DeiT's recipe has it: "rand-m9-mstd0.5-inc1", in which every operation is the stronger the greater m.

Each of a few operations, drawn anew for every image, is done half of the time, at a strength around m of 10.

Source: Cubuk et al. 2019, arXiv:1909.13719; Touvron et al. 2020, arXiv:2012.12877, table 9. The strengths are those
that timm computes, which differ from the paper's and from torchvision's: 9 turns by 27 degrees, not by 9.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Strength that counts as 1.
FULL = 10.0
# How often an operation that was drawn is done.
PROBABILITY = 0.5
Fill = int | tuple[int, ...]


class Operation(NamedTuple):
    """A way to change an image."""

    value: Callable[[float], float]
    """What `apply` is given at a share of the full strength, 0 to 1."""
    apply: Callable[[Image.Image, float, Fill], Image.Image]
    """apply(image, value, colour of what comes in from outside)."""
    signed: bool = False
    """Whether half of the time minus the share is given instead."""


def _enhanced(kind: Any) -> Operation:
    """Less or more of something, by up to 90 %."""
    return Operation(
        lambda share: max(0.1, 1 + 0.9 * share), lambda image, value, _: kind(image).enhance(value), signed=True
    )


def _moved(value: Callable[[float], float], matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Operation:
    """An affine map of the plane."""

    def apply(image: Image.Image, value: float, fill: Fill) -> Image.Image:
        by, bicubic = matrix(value, image.size), Image.Resampling.BICUBIC
        return image.transform(image.size, Image.Transform.AFFINE, by, bicubic, fillcolor=fill)

    return Operation(value, apply, signed=True)


def _posterized(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest bits of each pixel. The full strength leaves none, which Pillow's own does not take."""
    table = [pixel & -1 << (8 - bits) for pixel in range(256)]
    return image.point(table * len(image.getbands()))


def _brighten_dark(image: Image.Image, value: float, _: Fill) -> Image.Image:
    """Adds to all pixels below 128."""
    table = [min(255, pixel + int(value)) if pixel < 128 else pixel for pixel in range(256)]
    return image.point(table * len(image.getbands()))


def _unsized(function: Callable[[Image.Image], Image.Image]) -> Operation:
    """An operation that has no strength."""
    return Operation(lambda share: share, lambda image, value, fill: function(image))


OPERATIONS: dict[str, Operation] = {
    "auto-contrast": _unsized(ImageOps.autocontrast),
    "equalize": _unsized(ImageOps.equalize),
    "invert": _unsized(ImageOps.invert),
    "rotate": Operation(  # degrees
        lambda share: 30 * share,
        lambda image, value, fill: image.rotate(value, Image.Resampling.BICUBIC, fillcolor=fill),
        signed=True,
    ),
    "posterize": Operation(  # bits that are left
        lambda share: 4 - int(4 * share), lambda image, value, _: _posterized(image, int(value))
    ),
    "solarize": Operation(  # pixels from here on are inverted
        lambda share: 256 - int(256 * share), lambda image, value, _: ImageOps.solarize(image, int(value))
    ),
    "solarize-add": Operation(lambda share: int(110 * share), _brighten_dark),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear-x": _moved(lambda share: 0.3 * share, lambda value, size: (1, value, 0, 0, 1, 0)),
    "shear-y": _moved(lambda share: 0.3 * share, lambda value, size: (1, 0, 0, value, 1, 0)),
    "translate-x": _moved(lambda share: 0.45 * share, lambda value, size: (1, 0, value * size[0], 0, 1, 0)),
    "translate-y": _moved(lambda share: 0.45 * share, lambda value, size: (1, 0, 0, 0, 1, value * size[1])),
}


class RandAugment:
    """Changes images in mode L or RGB at random.

    Args:
      n_operations: how many are drawn for an image; one may come twice.
      magnitude: mean strength; above 10 counts as 10.
      std: its standard deviation from one operation to the next.
      fill: colour of what comes in from outside, of one number or a number for each channel, 0 to 255.
    """

    def __init__(self, n_operations: int, magnitude: float, *, std: float = 0.5, fill: tuple[int, ...] = (128,)):
        self.n_operations, self.magnitude, self.std, self.fill = n_operations, magnitude, std, fill

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        n_bands = len(image.getbands())
        fill = self.fill[0] if n_bands == 1 else (self.fill * n_bands)[:n_bands]
        operations = list(OPERATIONS.values())
        for number in random.integers(len(operations), size=self.n_operations):
            if random.random() < PROBABILITY:
                operation = operations[number]
                strength = np.clip(random.normal(self.magnitude, self.std), 0, FULL) / FULL
                sign = -1 if operation.signed and random.random() < 0.5 else 1
                image = operation.apply(image, operation.value(sign * float(strength)), fill)
        return image
