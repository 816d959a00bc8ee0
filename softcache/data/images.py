"""Images from files and data sets as arrays of one size and mode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.errors import DataError, SettingsError
from softcache.util.extras import import_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
OPTIONS = ("size", "mode")
MODES = {"rgb": "RGB", "grey": "L"}  # value of the option: Pillow's mode

Image = Any  # a PIL.Image.Image


@dataclass(frozen=True)
class Pixels:
    """The size and mode that every image is converted to when it is read."""

    size: tuple[int, int] | None = None  # height, width
    crop: bool = False  # centre-crop a square first, so that the aspect ratio is kept
    mode: str | None = None  # Pillow's mode; None keeps grey images grey and makes all others RGB


def parse_pixels(options: Mapping[str, str], spec: str) -> Pixels:
    """Parse `size=256` (resize the shorter side, crop the centre), `size=192x256` and `mode=rgb|grey`.

    Raises:
        SettingsError: an option has another form.
    """
    size, mode = options.get("size"), options.get("mode")
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", size) if size else None
    if size is not None and not match:
        raise SettingsError(
            f"{spec!r}: size {size!r}; expected size=N (resize the shorter side to N, then crop the centre) "
            "or size=HEIGHTxWIDTH"
        )
    if mode is not None and mode not in MODES:
        raise SettingsError(f"{spec!r}: mode {mode!r}; expected rgb or grey")
    height = int(match[1]) if match else 0
    return Pixels(
        (height, int(match[2] or height)) if match else None,
        crop=bool(match and not match[2]),
        mode=MODES[mode] if mode else None,
    )


def read_image(path: Path, pixels: Pixels) -> npt.NDArray[Any]:
    """Read an image file into an array, as `as_array` does.

    Raises:
        SettingsError: Pillow is not installed.
        DataError: the file cannot be read as an image.
    """
    image = import_extra("PIL.Image", extra="vision", what="reading images")
    try:
        with image.open(path) as opened:
            return as_array(opened, pixels)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({' '.join(str(error).split())})"
        ) from error


def as_array(image: Image, pixels: Pixels) -> npt.NDArray[Any]:
    """Convert an image to an array: grey to (1, H, W) uint8 or uint16, any other to RGB (3, H, W) uint8."""
    # 16-bit grey stays as it is: convert() would clip its values at 255
    grey = image.mode.startswith("I;16") or image.mode == "L"
    if pixels.mode or not grey:
        image = image.convert(pixels.mode or "RGB")
    if pixels.size:
        image = _resized(image, pixels.size, crop=pixels.crop)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _resized(image: Image, size: tuple[int, int], *, crop: bool) -> Image:
    """Resize bilinearly, with Pillow's antialiasing when the image gets smaller."""
    from PIL.Image import Resampling

    height, width = size
    box = None
    if crop:
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
    return image.resize((width, height), Resampling.BILINEAR, box)


def stack_images(images: list[npt.NDArray[Any]], names: list[str], where: str) -> npt.NDArray[Any]:
    """Stack images (C, H, W) into one array (B, C, H, W).

    Args:
        images: the arrays, one for each image.
        names: the names of the images, for the error message.
        where: the data set or folder that they come from, for the error message.

    Raises:
        DataError: an image differs from the first one in shape.
    """
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name} in {where} has shape {image.shape}, {names[0]} has {images[0].shape}; all images of "
                "a data set need the same size and mode: add ?size=256 (resize and crop the centre), "
                "?size=256x256 or ?mode=rgb to its specification"
            )
    return np.stack(images)
