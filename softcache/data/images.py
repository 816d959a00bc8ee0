"""Images from files and data sets as arrays of one size and mode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.layout import on_white
from softcache.data.notes import inform_once
from softcache.errors import DataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.messages import one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
WIDE_SUFFIXES = (".tif", ".tiff")  # the only ones of them whose integers may have 32 bits
OPTIONS = ("size", "mode", "depth")
MODES = {"rgb": "RGB", "grey": "L"}  # value of the option: Pillow's mode
DEPTHS = {"16": 16, "32": 32}  # value of the option: bits
LARGEST = {16: 2**16 - 1, 32: 2**31 - 1}  # by depth; Pillow's 32-bit integers are signed
MASK_MODES = ("P", "L", "1")
GREY_MODES = ("L", "LA", "La", "1")
NARROW_FORMATS = ("PNG", "PPM")  # Pillow's mode I never holds more than 16 bits in these
DEPTH_SAMPLES = 256  # images that decide on the depth of all, at most
BRIGHTEST = 1.5  # images in [0, 1] stay below this, also after slight sharpening
ORIENTATION, BITS_PER_SAMPLE, SAMPLE_FORMAT = 0x0112, 258, 339  # tags of Exif and TIFF
SIDEWAYS = (5, 6, 7, 8)  # values of the tag ORIENTATION
UNSIGNED = 1  # a value of the tag SAMPLE_FORMAT

Image = Any  # a PIL.Image.Image


@dataclass(frozen=True)
class Pixels:
    """The size, mode and depth that every image is converted to when it is read."""

    size: tuple[int, int] | None = None  # height, width
    crop: bool = False  # centre-crop a square first, so that the aspect ratio is kept
    mode: str | None = None  # Pillow's mode; None keeps grey images grey and makes all others RGB
    depth: int | None = None  # of Pillow's mode I, 16 or 32 bits; None: see as_array()


def parse_pixels(options: Mapping[str, str], spec: str) -> Pixels:
    """Parse the options of images.

    These are `size=256` (resize the shorter side, crop the centre) or `size=192x256`, `mode=rgb|grey`, and
    `depth=16|32` for images of 32-bit integers.

    Raises:
        SettingsError: an option has another form.
    """
    size, mode, depth = options.get("size"), options.get("mode"), options.get("depth")
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", size) if size else None
    if size is not None and not match:
        raise SettingsError(
            f"{spec!r}: size {size!r}; expected size=N (resize the shorter side to N, then crop the centre) "
            "or size=HEIGHTxWIDTH"
        )
    if mode is not None and mode not in MODES:
        raise SettingsError(f"{spec!r}: mode {mode!r}; expected rgb or grey")
    if depth is not None and depth not in DEPTHS:
        raise SettingsError(f"{spec!r}: depth {depth!r}; expected 16 or 32, the bits of a pixel")
    height = int(match[1]) if match else 0
    return Pixels(
        (height, int(match[2] or height)) if match else None,
        crop=bool(match and not match[2]),
        mode=MODES[mode] if mode else None,
        depth=DEPTHS[depth] if depth else None,
    )


def read_image(path: Path, pixels: Pixels) -> npt.NDArray[Any]:
    """Read an image file into an array, as `as_array` does.

    Raises:
        SettingsError: Pillow is not installed, or an image has more bits than the data set.
        DataError: the file cannot be read as an image.
    """
    try:
        return decode(path, pixels)
    except DataError as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error


def decode(path: Path, pixels: Pixels) -> npt.NDArray[Any]:
    """Read an image file as `read_image` does; the DataError has the reason alone, without the path."""
    image = import_extra("PIL.Image", extra="vision", what="reading images")
    try:
        with image.open(path) as opened:
            _say_if_cut_to_eight_bits(opened)
            return as_array(opened, pixels)
    except DataError:
        raise
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    except Exception as error:  # Pillow raises errors of many types on damaged files
        reason = one_line(error).replace(f" {str(path)!r}", "")
        if isinstance(error, image.UnidentifiedImageError) and _is_tiff(path):
            reason = (
                "a TIFF that is damaged, or has pixels that Pillow cannot hold, such as 64-bit "
                "floats; save it with 8 or 16 bits per pixel"
            )
        raise DataError(reason) from error


def as_array(image: Image, pixels: Pixels) -> npt.NDArray[Any]:
    """Convert an image to an array, as it is meant to be seen.

    The image is turned upright by its EXIF orientation before anything else. Transparent pixels become
    white. Images in grey, or in black and white, have one channel, all others become RGB, unless
    `pixels.mode` says otherwise:

    - 8-bit images: uint8.
    - 16-bit grey: uint16, whatever the byte order of the file.
    - 32-bit floats (mode F): float32, with their own values.
    - 32-bit integers (mode I): float32, divided by 65535 if they have 16 bits, else by 2^31 - 1. A file whose
      format holds no more than 16 bits (PNG, PGM, signed 16-bit TIFF) has 16. For others the depth is
      `pixels.depth`, which is that of the whole data set: stated with ?depth=, or found by `decided` in
      images spread over the data set, where one value beyond 65535 makes it 32. A dark image is thus
      divided by the same number as a bright one. Only if `pixels.depth` is None, the image's own largest
      value decides.

    Args:
        image: a PIL image, loaded or not.
        pixels: the size, mode and depth to convert it to.

    Returns:
        (C, H, W) uint8, uint16 or float32, in native byte order.

    Raises:
        DataError: the image has a kind of pixel that Pillow cannot hold or convert.
        SettingsError: the image has more than the 16 bits of `pixels.depth`.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_array(image, pixels)
    _check_eight_bits(image)
    image = _opaque(_upright(image))
    mode = pixels.mode or ("L" if image.mode in GREY_MODES else "RGB")
    if image.mode != mode:
        if pixels.mode is None and mode == "RGB":
            inform_once(f"images of mode {image.mode} are converted to RGB")
        try:
            image = image.convert(mode)
        except ValueError as error:
            raise DataError(
                f"its mode is {image.mode}: {one_line(error)}; save it as RGB"
            ) from error
    if pixels.size:
        image = _resized(image, pixels.size, crop=pixels.crop)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode_mask(path: Path, size: tuple[int, int], pixels: Pixels) -> npt.NDArray[np.int64]:
    """Read the classes of the pixels of an image: the values of a paletted, 8-bit grey or bilevel one.

    Args:
        path: the mask.
        size: height and width that it must have, those of its image.
        pixels: the size that both become; a mask takes the nearest pixel, since classes cannot be mixed.

    Returns:
        (H, W), as stored; 255 usually means no class.

    Raises:
        DataError: it cannot be read, has another size, or other pixels; the reason alone, without the path.
    """
    image = import_extra("PIL.Image", extra="vision", what="reading images")
    try:
        with image.open(path) as opened:
            mask = _upright(opened)
    except Exception as error:  # Pillow raises errors of many types on damaged files
        raise DataError(one_line(error).replace(f" {str(path)!r}", "")) from error
    if mask.mode not in MASK_MODES:
        raise DataError(
            f"its mode is {mask.mode}; expected a paletted or 8-bit grey image, whose values are numbers of "
            "classes, and 255 for none"
        )
    if mask.size != (size[1], size[0]):
        raise DataError(
            f"it has {mask.size[1]} x {mask.size[0]} pixels, and its image {size[0]} x {size[1]}; expected "
            "the same size"
        )
    if pixels.size:
        mask = _resized(mask, pixels.size, crop=pixels.crop, nearest=True)
    return np.array(mask).astype(np.int64)


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file as it is meant to be seen; its pixels are not read.

    Raises:
        DataError: the file cannot be read as an image; the reason alone, without the path.
    """
    image = import_extra("PIL.Image", extra="vision", what="reading images")
    try:
        with image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION) in SIDEWAYS
    except Exception as error:  # Pillow raises errors of many types on damaged files
        raise DataError(one_line(error).replace(f" {str(path)!r}", "")) from error
    return (width, height) if turned else (height, width)


def decided(pixels: Pixels, images: Iterable[Image]) -> Pixels:
    """The pixels with the depth of a data set, decided from images of it; unchanged if it is stated.

    Args:
        pixels: the options of the data set.
        images: PIL images; not more than needed are taken from the iterable.
    """
    if pixels.depth is not None:
        return pixels
    for image in images:
        depth = _integer_depth(image)
        if depth is not None:
            pixels = replace(pixels, depth=depth)
        if depth == 32:
            break
    return pixels


def depth_sample(count: int) -> range:
    """Indices of the images that decide on the depth of all `count`: at most DEPTH_SAMPLES, spread evenly."""
    return range(0, count, count // DEPTH_SAMPLES + 1)


def _deep_array(image: Image, pixels: Pixels) -> npt.NDArray[Any]:
    """An image of 16-bit or 32-bit pixels, whose values convert() would clip at 255."""
    depth = _depth(image, pixels) if image.mode == "I" else 0
    image = _upright(image)
    if pixels.size:
        image = _resized(image, pixels.size, crop=pixels.crop)
    array = np.array(image)  # (H, W)
    if depth:
        array = (array / LARGEST[depth]).astype(np.float32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if image.mode == "F" and array.max(initial=0) > BRIGHTEST:
        inform_once(
            f"float images keep their values, which go beyond 1 (up to {array.max():.4g} in the first such "
            "image); most models expect 0 to 1"
        )
    return np.repeat(array[None], 3 if pixels.mode == "RGB" else 1, axis=0)


def _depth(image: Image, pixels: Pixels) -> int:
    """The depth, 16 or 32, by which an image of mode I is divided."""
    low, high = image.getextrema()
    tags = getattr(image, "tag_v2", {})
    if tags and low < 0 and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        raise DataError(
            f"it has unsigned values above {LARGEST[32]}, which Pillow cannot hold; save it with 16 bits"
        )
    if _is_narrow(image):
        return 16
    largest = max(-low, high)
    if pixels.depth == 16 and largest > LARGEST[16]:
        raise SettingsError(
            f"an image with values up to {largest}, in a data set of 16-bit images, whose values are up to "
            f"{LARGEST[16]}; save all with 16 bits, or add ?depth=32 to divide all by {LARGEST[32]}"
        )
    return pixels.depth or (16 if largest <= LARGEST[16] else 32)


def _integer_depth(image: Image) -> int | None:
    """The depth that an image of mode I needs, if its format leaves that open; None for all other images."""
    if image.mode != "I" or _is_narrow(image):
        return None
    low, high = image.getextrema()
    return 16 if max(-low, high) <= LARGEST[16] else 32


def _is_narrow(image: Image) -> bool:
    """Whether an image of mode I comes from a file that cannot hold more than 16 bits."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    return image.format in NARROW_FORMATS or bits == (16,)


def _check_eight_bits(image: Image) -> None:
    """Raise DataError for a TIFF with several channels of 16 bits, which Pillow cuts to 8."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, ())
    if bits and max(bits) > 8:
        raise DataError(
            f"a TIFF with {len(bits)} channels of {max(bits)} bits, of which Pillow can hold 8; save it with "
            "8 bits per channel, or read it with your own Dataset"
        )


def _say_if_cut_to_eight_bits(image: Image) -> None:
    """Note that the upper 8 of 16 bits of a colour PNG are read, which only a file not yet loaded tells."""
    raw_modes = [part[3] for part in image.tile if isinstance(part[3], str)]
    colour = image.format == "PNG" and not image.mode.startswith("I")
    if colour and any(";16" in raw_mode for raw_mode in raw_modes):
        inform_once("colour PNGs of 16 bits per channel are read with their upper 8 bits")


def _upright(image: Image) -> Image:
    """Turn an image as its EXIF orientation says, as PIL.ImageOps.exif_transpose does.

    Damaged EXIF data does not make an image unreadable: it then stays as it is.
    """
    from PIL.Image import Transpose

    image.load()  # before its tags are read: the plug-in for TIFF turns the image itself
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raises errors of many types
        return image
    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(methods[orientation]) if orientation in methods else image


def _opaque(image: Image) -> Image:
    """Composite an image with transparent pixels on white; return any other one unchanged."""
    from PIL.Image import fromarray

    if not _has_alpha(image):
        return image
    straight = image.convert({"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode))
    rgba = np.array(straight.convert("RGBA"))  # (H, W, 4)
    colours = rgba[..., :3]
    if rgba[..., 3].min(initial=255) < 255:
        inform_once("images have transparent pixels, which become white")
        colours = on_white(rgba, 255)
    return fromarray(np.ascontiguousarray(colours[..., 0] if image.mode in GREY_MODES else colours))


def _has_alpha(image: Image) -> bool:
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return True
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    key = image.info.get("transparency")
    kinds = {"P": int | bytes, "L": int, "1": int, "RGB": tuple}
    return image.mode in kinds and isinstance(key, kinds[image.mode])


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in WIDE_SUFFIXES


def _resized(image: Image, size: tuple[int, int], *, crop: bool, nearest: bool = False) -> Image:
    """Resize bilinearly, with Pillow's antialiasing when the image gets smaller; or to the nearest pixel."""
    from PIL.Image import Resampling

    height, width = size
    box = None
    if crop:
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
    how = Resampling.NEAREST if nearest else Resampling.BILINEAR
    return image.resize((width, height), how, box)


def stack_images(images: list[npt.NDArray[Any]], names: list[str], where: str) -> npt.NDArray[Any]:
    """Stack images (C, H, W) into one array (B, C, H, W).

    Args:
        images: the arrays, one for each image.
        names: the names of the images, for the error message.
        where: the data set or folder that they come from, for the error message.

    Raises:
        DataError: an image differs from the first one in shape or dtype.
    """
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name} in {where} has shape {image.shape}, {names[0]} has {images[0].shape}; all images of "
                "a data set need the same size and mode: add ?size=256 (resize and crop the centre), "
                "?size=256x256 or ?mode=rgb to its specification"
            )
        if image.dtype != images[0].dtype:
            raise DataError(
                f"{name} in {where} has {image.dtype} pixels, {names[0]} has {images[0].dtype}; all images "
                "of a data set need the same depth: save them all with 8 bits, or all with 16"
            )
    return np.stack(images)
