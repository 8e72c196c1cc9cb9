"""Pictures as they come: files of any kind, upright, in eight bits of grey or colour, with nothing to see through.

16-bit pixels are scaled, 65,535 to 255; palettes, CMYK, LAB and the like become RGB; transparent ones show a colour.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from experiments.data.tokenizers import first_line
from experiments.loop.flags import UsageError


def open_picture(source: str | Path | bytes, name: str) -> Image.Image:
    """Decodes a picture, turned as its EXIF says, into one of mode L, LA, RGB or RGBA.

    Args:
      source: a file, or what is in it.
      name: for messages.

    Raises:
      UsageError: it is no picture, or a damaged one; it is named with the reason.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return plain(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise of many kinds
        reason = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no picture that Pillow knows"
        raise UsageError(f"the image '{name}' cannot be read ({reason})") from error


def plain(image: Image.Image) -> Image.Image:
    """The same picture in mode L, LA, RGB or RGBA.

    Raises:
      ValueError: pixels that have no known range.
    """
    if image.mode.startswith("I"):
        return _eight_bits(np.asarray(image))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range, expected 8 or 16 bits")
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("La", "RGBa"):
        return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(pixels: np.ndarray) -> Image.Image:
    """Grey of 16 bits in 8; Pillow itself cuts all above 255 off."""
    low, high = int(pixels.min(initial=0)), int(pixels.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}, expected 8 or 16 bits")
    return Image.fromarray(np.round(pixels.astype(np.float32) / 257).astype(np.uint8))


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None
    return converted


def flatten(image: Image.Image, mode: str, background: Sequence[int]) -> Image.Image:
    """A picture in mode L or RGB, in front of a colour where it is transparent.

    Args:
      background: red, green and blue, or one number for all, 0 to 255.
    """
    image = plain(image)
    if image.mode in ("LA", "RGBA"):
        red, green, blue = (*background, *background, *background)[:3]
        behind = Image.new("RGBA", image.size, (red, green, blue, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def from_array(pixels: np.ndarray) -> Image.Image:
    """The picture of an array (x, y), or (x, y, c) of 1, 3 or 4 channels, of 8 or 16 bits.

    Raises:
      ValueError: another shape, or numbers that are not 0 to 255 (65,535 in uint16).
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (2, 3, 4)):
        raise ValueError(f"an image of shape {pixels.shape}, expected (x, y) or (x, y, c)")
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels.astype(np.float32) / 257)
    elif pixels.size and not (pixels.min() >= 0 and pixels.max() <= 255):
        raise ValueError(f"an image of {pixels.dtype} from {pixels.min()} to {pixels.max()}, expected 0 to 255")
    return Image.fromarray(pixels.astype(np.uint8))
