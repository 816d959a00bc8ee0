"""Images of files and data sets as arrays of one size and one kind."""

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

MODES = {"rgb": "RGB", "grey": "L"}

Image = Any  # of Pillow


@dataclass(frozen=True)
class Pixels:
    """What is made of every image, before anything else sees it."""

    size: tuple[int, int] | None = None  # height, width
    crop: bool = False  # keep the ratio: the shorter side to the size, then the centre of it
    mode: str | None = None  # of Pillow; None: grey stays grey, all else is RGB


def parse_pixels(options: Mapping[str, str], spec: str) -> Pixels:
    """Of the options `size=256` (shorter side, then the centre), `size=192x256`, `mode=rgb|grey`.

    Raises:
        SettingsError: they are written otherwise.
    """
    size, mode = options.get("size"), options.get("mode")
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", size) if size else None
    if size is not None and not found:
        raise SettingsError(
            f"{spec!r}: size {size!r}; expected size=N, the shorter side before a square is cut out of "
            "the middle, or size=HEIGHTxWIDTH"
        )
    if mode is not None and mode not in MODES:
        raise SettingsError(f"{spec!r}: mode {mode!r}; expected rgb or grey")
    height = int(found[1]) if found else 0
    return Pixels(
        (height, int(found[2] or height)) if found else None,
        crop=bool(found and not found[2]),
        mode=MODES[mode] if mode else None,
    )


def read_image(path: Path, pixels: Pixels) -> npt.NDArray[Any]:
    """An image file as as_array() gives it.

    Raises:
        SettingsError: Pillow is not there.
        DataError: the file is no image.
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
    """A grey image of 8 or 16 bits as (1, H, W), any other as RGB (3, H, W) of 8 bits."""
    deep = image.mode.startswith("I;16")  # convert() would cut 16 bits off at 255
    grey = deep or image.mode == "L"
    if pixels.mode or not grey:
        image = image.convert(pixels.mode or "RGB")
    if pixels.size:
        image = _resized(image, pixels.size, crop=pixels.crop)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _resized(image: Image, size: tuple[int, int], *, crop: bool) -> Image:
    """Bilinear with antialiasing, as Pillow does it when it makes images smaller."""
    from PIL.Image import Resampling

    height, width = size
    box = None
    if crop:  # the square in the middle, of which a square is made
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
    return image.resize((width, height), Resampling.BILINEAR, box)


def stack_images(images: list[npt.NDArray[Any]], names: list[str], where: str) -> npt.NDArray[Any]:
    """Images (C, H, W) as one array (B, C, H, W).

    Raises:
        DataError: they have different sizes; the first that differs from the first is named.
    """
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name} in {where} has shape {image.shape}, {names[0]} has {images[0].shape}; images of "
                "one data set need one size and one kind: add ?size=256 (the shorter side, then the middle), "
                "?size=256x256 or ?mode=rgb to it"
            )
    return np.stack(images)
