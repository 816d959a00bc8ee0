"""Images of any mode and size as arrays of one layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.data.images import Pixels, as_array, parse_pixels, read_image
from softcache.data.open import open_source
from softcache.errors import DataError, SettingsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; images of different sizes."""
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(20, 30), (31, 17), (24, 24)]):
        path = tmp_path / "pets" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pets"


def test_images_of_different_sizes_are_made_alike_by_an_option(folder: Path) -> None:
    for spec, shape in (("?size=16", (3, 16, 16)), ("?size=12x18", (3, 12, 18))):
        source = open_source(f"folder:{folder}{spec}")
        assert source.fetch(range(3))[0].shape == (3, *shape)
        assert source.name == f"folder:pets{spec}@train"
    grey = open_source(f"folder:{folder}?mode=grey&size=9").fetch(range(3))[0]
    assert grey.shape == (3, 1, 9, 9)


def test_without_it_the_message_says_which(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"a/2\.png in .* has shape \(3, 24, 24\), .*add \?size=256"
    ):
        open_source(f"folder:{folder}").fetch(range(3))


def test_a_single_size_keeps_the_ratio_and_takes_the_middle() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # the square in the middle
    square = as_array(Image.fromarray(wide), parse_pixels({"size": "10"}, "x"))
    assert square.shape == (3, 10, 10)
    assert (square == 255).all()
    whole = as_array(Image.fromarray(wide), parse_pixels({"size": "10x10"}, "x"))
    assert whole[0, 5, 0] == 0
    assert whole[0, 5, 5] == 255


@pytest.mark.parametrize(
    ("mode", "shape", "dtype"),
    [("L", (1, 4, 6), "uint8"), ("I;16", (1, 4, 6), "uint16"), ("RGBA", (3, 4, 6), "uint8"),
     ("P", (3, 4, 6), "uint8")],
)  # fmt: skip
def test_every_kind_of_image_has_its_layout(mode: str, shape: tuple[int, ...], dtype: str) -> None:
    array = as_array(Image.new(mode, (6, 4)), Pixels())
    assert array.shape == shape
    assert array.dtype == dtype


@pytest.mark.parametrize("size", ["0", "12x", "-3", "1e3", "axb"])
def test_an_odd_size_is_refused(folder: Path, size: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"size '{size}'; expected size=N \(resize the shorter"
    ):
        open_source(f"folder:{folder}?size={size}")


@pytest.mark.parametrize(
    ("query", "message"),
    [("mode=cmyk", "mode 'cmyk'; expected rgb or grey"),
     ("sice=3", "unknown option 'sice'; expected size, mode")],
)  # fmt: skip
def test_an_odd_option_is_refused(folder: Path, query: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        open_source(f"folder:{folder}?{query}")


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"no image"])
def test_a_damaged_image_is_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "a" / "0.png"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"a/0\.png cannot be read as an image \("):
        read_image(file, Pixels())
