"""Folders of images and of masks, and Datasets of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.data.mask_folder import MaskFolderSource
from softcache.data.open import open_source
from softcache.data.rows import MaskSource, layout_of_source, unit_of
from softcache.data.source import UNLABELLED
from softcache.data.user_dataset import PixelDatasetSource, dataset_source
from softcache.errors import DataError, MissingDataError, SettingsError
from tests.pixels import make_arrays, write_folders


def opened(folder: Path, options: str = "") -> MaskFolderSource:
    source = open_source(f"folder:{folder / 'images'}?masks={folder / 'masks'}{options}")
    assert isinstance(source, MaskFolderSource)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of 12 x 12 pixels, with their masks."""
    write_folders(tmp_path, *make_arrays(6))
    return tmp_path


def test_images_and_masks_of_the_same_names(folder: Path) -> None:
    images, masks = make_arrays(6)
    inputs, labels = opened(folder).fetch([4, 1])
    assert np.array_equal(inputs[:, 0], images[[4, 1]])
    expected = masks[[4, 1]].astype(np.int64)
    expected[:, 0, 0] = UNLABELLED
    assert np.array_equal(labels, expected.reshape(-1))
    layout = layout_of_source(opened(folder))
    assert layout is not None
    assert (layout.samples, layout.rows, unit_of(opened(folder))) == (6, 6 * 144, "pixel")


def test_the_name_has_no_folders(folder: Path) -> None:
    assert opened(folder).name == "folder:images?masks=masks@train"


def test_splits_and_folders_below(tmp_path: Path) -> None:
    for place in ("images/train/a", "masks/train/a", "images/test", "masks/test"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / place / "0.png")
    where = f"folder:{tmp_path / 'images'}?masks={tmp_path / 'masks'}"
    assert open_source(where).name.endswith("@train")
    for split in ("train", "test"):
        assert len(open_source(f"{where}@{split}")) == 1
    with pytest.raises(MissingDataError, match=r"no folder .*val; expected one of images"):
        open_source(f"{where}@val")


def test_masks_are_resized_to_the_nearest_pixel(folder: Path) -> None:
    source = opened(folder, "&size=7x9")
    inputs, labels = source.fetch([2])
    assert inputs.shape[-2:] == (7, 9)
    assert len(labels) == 63
    assert set(labels.tolist()) <= {UNLABELLED, 0, 1}  # nothing in between
    # a square is cropped from both
    wide = np.repeat(np.arange(8, dtype=np.uint8)[None], 4, 0)
    for what in ("images", "masks"):
        for number in range(6):
            Image.fromarray(wide).save(folder / what / f"{number:02}.png")
    inputs, labels = opened(folder, "&size=4").fetch([0])
    assert labels.reshape(4, 4)[0].tolist() == [2, 3, 4, 5]
    assert inputs[0, 0, 0].tolist() == [2, 3, 4, 5]


def test_an_image_without_a_mask_is_unlabelled(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "masks" / "03.png").unlink()
    labels = opened(folder).fetch([3, 4])[1].reshape(2, -1)
    assert (labels[0] == UNLABELLED).all()
    assert (labels[1] != UNLABELLED).sum() == 143
    assert "1 of 6 images have no mask and are unlabelled: 03.png" in capsys.readouterr().out


def test_named_classes_and_a_part(folder: Path) -> None:
    assert opened(folder, "&classes=dark,bright").class_names == ("dark", "bright")
    part = open_source(
        f"folder:{folder / 'images'}?masks={folder / 'masks'}&classes=dark,bright&shuffle=1&samples=3"
    )
    assert part.class_names == ("dark", "bright")
    layout = layout_of_source(part)
    assert layout is not None
    assert layout.rows == 3 * 144


def rename_masks(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def replaced(image: Image.Image, name: str = "02.png") -> Callable[[Path], None]:
    return lambda folder: image.save(folder / "masks" / name)


def jpegs(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        path.unlink()


def second_mask(folder: Path) -> None:
    Image.open(folder / "masks" / "02.png").save(folder / "masks" / "02.bmp")


def no_masks(folder: Path) -> None:
    (folder / "masks").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_masks, r"no image has a mask in .*; expected files of the same names, such as 00.png for 00"),
        (jpegs, "00.jpg is in a format that changes numbers of classes; save masks as PNG"),
        (second_mask, "has two masks of one name, 02.bmp and 02.png; keep one"),
        (no_masks, "no folder .*masks; expected one of masks"),
        (replaced(Image.new("L", (12, 9))), r"02.png cannot be read as a mask \(it has 9 x 12 pixels"),
        (replaced(Image.new("RGB", (12, 12))), "its mode is RGB; expected a paletted or 8-bit grey image"),
        (lambda f: (f / "masks" / "02.png").write_bytes(b"?"), r"02.png cannot be read as a mask .*repair"),
        (
            lambda f: Image.new("L", (9, 12)).save(f / "images" / "02.png"),
            r"02.png in .* has shape \(1, 12, 9\), 00.png has \(1, 12, 12\)",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=message):
        opened(folder).fetch([0, 1, 2])


def test_one_image_of_another_size_alone_is_told(folder: Path) -> None:
    for what in ("images", "masks"):
        Image.new("L", (9, 12)).save(folder / what / "02.png")
    with pytest.raises(
        DataError, match=r"02.png in .* has 12 x 9 pixels, and 00.png has 12 x 12; all"
    ):
        opened(folder).fetch([2])


def test_unreadable_images_are_left_out_with_their_masks(folder: Path) -> None:
    (folder / "images" / "01.png").write_bytes(b"?")
    source = opened(folder, "&unreadable=skip")
    assert len(source) == 5
    assert np.array_equal(source.fetch([1])[1], opened(folder).fetch([2])[1])
    with pytest.raises(SettingsError, match="unreadable 'no'; expected skip"):
        opened(folder, "&unreadable=no")


def test_an_image_that_is_turned_agrees_with_its_mask(tmp_path: Path) -> None:
    for what, size in (("images", (6, 4)), ("masks", (4, 6))):
        (tmp_path / what).mkdir()
        exif = Image.Exif()
        if what == "images":
            exif[0x0112] = 6  # to be turned by 90 degrees
        Image.new("L", size).save(tmp_path / what / "0.png", exif=exif)
    inputs, labels = opened(tmp_path).fetch([0])
    assert inputs.shape == (1, 1, 6, 4)
    assert len(labels) == 24


# arrays and Datasets
def test_masks_of_arrays_have_the_size_of_the_images(tmp_path: Path) -> None:
    images, masks = make_arrays(4)
    np.savez(tmp_path / "d.npz", x=images, y=masks[:, :, :11])
    with pytest.raises(
        DataError, match=r"labels have shape \(4, 12, 11\), and images \(4, 1, 12, 12\)"
    ):
        open_source(f"npz:{tmp_path / 'd.npz'}")
    np.savez(tmp_path / "d.npz", x=images, y=masks)
    assert isinstance(open_source(f"npz:{tmp_path / 'd.npz'}"), MaskSource)


def pairs(change: Callable[[int, Any], Any] = lambda _, mask: mask) -> list[Any]:
    """Items of images (1, 12, 12) and masks (12, 12)."""
    images, masks = make_arrays(4)
    return [
        (torch.from_numpy(image)[None], change(number, mask))
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]


@pytest.mark.parametrize(
    "convert",
    [
        lambda _, mask: mask,
        lambda _, mask: torch.from_numpy(mask).long(),
        lambda _, mask: torch.from_numpy(mask)[None],  # as torchvision's Mask
        lambda _, mask: Image.fromarray(mask),
    ],
)
def test_a_dataset_of_masks_in_any_form(convert: Callable[[int, Any], Any]) -> None:
    source = dataset_source("d", pairs(convert))
    assert isinstance(source, PixelDatasetSource)
    _, labels = source.fetch([1, 3])
    expected = make_arrays(4)[1][[1, 3]].astype(np.int64)
    expected[:, 0, 0] = UNLABELLED
    assert np.array_equal(labels, expected.reshape(-1))


def test_boolean_masks_have_two_classes() -> None:
    labels = dataset_source("d", pairs(lambda _, mask: mask == 1)).fetch([0])[1]
    assert set(labels.tolist()) == {0, 1}


def test_an_item_without_a_mask_is_unlabelled() -> None:
    source = dataset_source("d", pairs(lambda number, mask: None if number == 2 else mask))
    assert (source.fetch([2, 3])[1][:144] == UNLABELLED).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n, m: m[:, :9] if n == 2 else m,
            r"item 2 has a label of shape \(12, 9\), and item 0 a mask",
        ),
        (lambda n, m: 3 if n == 2 else m, r"item 2 has a label of shape \(\), and item 0 a mask"),
        (lambda _, m: m[:9], r"an input of shape \(1, 12, 12\), and masks have shape \(9, 12\)"),
        (lambda _, m: m / 2, "its mask is float64; expected whole numbers of classes"),
    ],
)
def test_masks_of_a_dataset_that_do_not_fit_are_told(
    change: Callable[[int, Any], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataset_source("d", pairs(change)).fetch([2])
