"""Images as a model takes them: cropped, normalised, and in training changed at random, each in its own way.

Pillow resizes and turns. What is random is a function of a generator that is given, so that a batch is a function of
seed and step. Crop, erasing, MixUp, CutMix and `rand_augment` are of the sizes that timm gives them in DeiT's recipe.

Axes: x image height, y image width, c channels.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from experiments.data.pictures import flatten
from experiments.data.rand_augment import RandAugment

Crop = Literal["none", "shift", "resized"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class PreprocessConfig:
    """From any image to an array."""

    mean: tuple[float, ...] = (0.5,)
    """Of the pixels, 0 to 1, that becomes 0; one, or one for each channel."""
    std: tuple[float, ...] = (0.5,)
    """Distance from it, 0 to 1, that becomes 1; likewise."""
    crop_fraction: float = 1.0
    """In evaluation, the side of the middle square that is seen, as a share of the image's shorter side."""
    background: tuple[int, ...] = (255, 255, 255)
    """Red, green and blue, 0 to 255, that show where an image is transparent; or one number, for a grey."""

    def __post_init__(self):
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction={self.crop_fraction}, expected above 0 and at most 1")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std={self.std}, expected more than 0")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean={self.mean}, expected finite numbers")
        if len(self.background) not in (1, 3) or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background={self.background}, expected one or three numbers from 0 to 255")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to an image in training, in this order. The defaults do nothing."""

    crop: Crop = "none"
    """none: as in evaluation. shift: moved by up to `shift`. resized: a rectangle of random size and shape, resized."""
    shift: float = 0.1
    """With crop="shift", the furthest move along each side, as a share of it; what comes in is black."""
    min_area: float = 0.08
    """With crop="resized", the smallest rectangle, as a share of the image; between 3:4 and 4:3."""
    flip: float = 0.0
    """Probability that left and right are swapped."""
    rotate: float = 0.0
    """Largest turn to either side, in degrees."""
    rand_augment: int = 0
    """RandAugment's number of operations."""
    magnitude: int = 9
    """RandAugment's strength, as timm counts: 10 turns by 30 degrees, and more counts as 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the strength from one operation to the next."""
    erase: float = 0.0
    """Probability that a rectangle of 2 to 33 % of the image becomes noise."""
    mixup: float = 0.0
    """Parameter of the Beta distribution of the share at which each image is blended with another. 0: never."""
    cutmix: float = 0.0
    """The same, for a rectangle of another image put into each. With both, either has its turn at random."""
    smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    repeats: int = 1
    """How often an image comes in a batch, changed in its own way each time; an epoch sees so many fewer of them."""

    def __post_init__(self):
        if self.crop not in ("none", "shift", "resized"):
            raise ValueError(f"crop={self.crop!r}, expected 'none', 'shift' or 'resized'")
        for name in ("flip", "erase", "shift", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 0 to 1")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area={self.min_area}, expected above 0 and at most 1")
        for name in ("mixup", "cutmix", "rotate", "rand_augment", "magnitude_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 0")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude={self.magnitude}, expected 0 to 30")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}, expected at least 1")


class Preprocess:
    """Turns images into arrays of one size.

    Args:
      config: normalisation and crop of evaluation.
      size: pixels to a side.
      channels: 1 or 3; images of another kind are converted.
      augment: of training.

    Raises:
      ValueError: channels that images do not have; as many means or standard deviations.
    """

    def __init__(self, config: PreprocessConfig, size: int, channels: int, augment: AugmentConfig = AugmentConfig()):
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}, expected 1 or 3")
        for name in ("mean", "std"):
            if len(getattr(config, name)) not in (1, channels):
                raise ValueError(f"{name}={getattr(config, name)}, expected 1 or {channels} numbers")
        self.config, self.size, self.augment = config, size, augment
        self.mode = "L" if channels == 1 else "RGB"
        self.mean, self.std = (np.array(values, np.float32) for values in (config.mean, config.std))
        fill = tuple(min(255, round(255 * value)) for value in config.mean)
        strength: dict[str, Any] = {"magnitude": augment.magnitude, "std": augment.magnitude_std, "fill": fill}
        self.rand_augment = RandAugment(augment.rand_augment, **strength) if augment.rand_augment else None

    def __call__(self, image: Image.Image, random: np.random.Generator | None = None) -> np.ndarray:
        """(x, y, c) float32: as in training with a generator, as in evaluation without."""
        image = flatten(image, self.mode, self.config.background)
        if random is None:
            return self._normalise(image.resize((self.size, self.size), _BICUBIC, self._middle(image)))
        change = self.augment
        box = _random_box(image.size, change.min_area, random) if change.crop == "resized" else self._middle(image)
        image = image.resize((self.size, self.size), _BICUBIC, box)
        if change.crop == "shift" or change.rotate:
            image = self._move(image, random)
        if random.random() < change.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            image = self.rand_augment(image, random)
        array = self._normalise(image)
        return erase(array, random) if random.random() < change.erase else array

    def _middle(self, image: Image.Image) -> Box:
        side = min(image.size) * self.config.crop_fraction
        left, top = ((length - side) / 2 for length in image.size)
        return left, top, left + side, top + side

    def _move(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        reach = self.augment.shift * self.size if self.augment.crop == "shift" else 0.0
        across, down = np.round(random.uniform(-reach, reach, 2)).astype(int)
        angle = random.uniform(-self.augment.rotate, self.augment.rotate)
        return image.rotate(angle, Image.Resampling.BILINEAR, translate=(int(across), int(down)))

    def _normalise(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image, np.float32).reshape(self.size, self.size, -1)
        return (pixels / 255 - self.mean) / self.std


def _random_box(size: tuple[int, int], min_area: float, random: np.random.Generator) -> Box:
    """A rectangle in an image: area uniform, log of its shape uniform, place uniform.

    Source: Szegedy et al. 2014, arXiv:1409.4842, section 6; ten tries, then the middle, as torchvision does.
    """
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(min_area, 1)
        shape = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * shape), np.sqrt(area / shape)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)  # as much as has such a shape
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def erase(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image with a rectangle of 2 to 33 % of its area, between 3:10 and 10:3, replaced by standard normal noise.

    Source: Zhong et al. 2017, arXiv:1708.04896; per-pixel noise as DeiT has it.
    """
    x, y, c = array.shape
    for _ in range(10):
        area, shape = random.uniform(0.02, 1 / 3) * x * y, np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if 0 < h < x and 0 < w < y:
            top, left = random.integers(x - h + 1), random.integers(y - w + 1)
            array = array.copy()
            array[top : top + h, left : left + w] = random.standard_normal((h, w, c), np.float32)
            break
    return array


class Mixed(NamedTuple):
    """Images of a batch, each with a part of another."""

    images: np.ndarray
    """(b, x, y, c)."""
    partners: np.ndarray
    """(b,) labels of the others."""
    share: np.ndarray
    """(b,) float32: what is left of the first, 0 to 1."""


def mix(images: np.ndarray, labels: np.ndarray, config: AugmentConfig, random: np.random.Generator) -> Mixed:
    """MixUp or CutMix of a batch with itself in reverse; one share for all of it.

    Source: Zhang et al. 2017, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; in turn as in DeiT.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(config, name)]
    if not kinds:
        return Mixed(images, labels, np.ones(len(labels), np.float32))
    kind = kinds[random.integers(len(kinds))]
    share = random.beta(*(2 * [getattr(config, kind)]))
    others = images[::-1]
    if kind == "mixup":
        images = np.float32(share) * images + np.float32(1 - share) * others
    else:
        x, y = images.shape[1:3]
        h, w = int(x * np.sqrt(1 - share)), int(y * np.sqrt(1 - share))
        middle = random.integers(x), random.integers(y)
        top, left = max(0, middle[0] - h // 2), max(0, middle[1] - w // 2)
        bottom, right = min(x, middle[0] - h // 2 + h), min(y, middle[1] - w // 2 + w)
        images = images.copy()
        images[:, top:bottom, left:right] = others[:, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (x * y)
    return Mixed(images, labels[::-1], np.full(len(labels), share, np.float32))
