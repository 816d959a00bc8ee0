"""Images with a class for each pixel: a folder of images, and one of masks with the same names.

A mask is a paletted or 8-bit grey image of the size of its image: its values are numbers of classes, and 255
stands for none. An image without a mask is unlabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from torch import Tensor

from softcache.cache.layout import RowLayout, even_layout
from softcache.data import images
from softcache.data.folder import SKIP, FolderSource, images_below, open_folder, shown
from softcache.data.rows import PIXEL, without_ignored
from softcache.data.source import DEFAULT_SPLIT, UNLABELLED
from softcache.data.spec import named_classes
from softcache.errors import DataError, MissingDataError, SettingsError
from softcache.util.log import inform
from softcache.util.spec import MASKS, Spec

LOSSY = (".jpg", ".jpeg", ".webp")  # formats that change the values of pixels


@dataclass(frozen=True)
class MaskFolderSource:
    """Images with the masks of the same names.

    Attributes:
        images: the images alone.
        masks: (N,) the path of each mask below `folder`; None where an image has none.
    """

    images: FolderSource
    folder: Path
    masks: tuple[str | None, ...] = field(repr=False)
    class_names: tuple[str, ...] = ()
    unit: str = PIXEL

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """The specification without folders, safe to write into a shared file."""
        return self.images.name

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.images.fetch([0])[0].shape[-2:]
        return height, width

    @property
    def layout(self) -> RowLayout:
        """A row for each pixel, in reading order."""
        return even_layout(len(self), self.shape[0] * self.shape[1])

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        inputs = self.images.fetch(indices)[0]
        if tuple(inputs.shape[-2:]) != self.shape:
            raise DataError(
                f"{self.images.files[indices[0]]} in {self.images.folder} has {inputs.shape[-2]} x "
                f"{inputs.shape[-1]} pixels, and {self.images.files[0]} has {self.shape[0]} x "
                f"{self.shape[1]}; all images of a data set need the same size: add ?size=256 or "
                "?size=256x256 to its specification"
            )
        masks = [self._mask(int(index)) for index in indices]
        return inputs, without_ignored(np.stack(masks)).reshape(-1)

    def _mask(self, index: int) -> npt.NDArray[np.int64]:
        mask = self.masks[index]
        if mask is None:
            return np.full(self.shape, UNLABELLED, np.int64)
        path = self.folder / mask
        try:
            size = images.upright_size(self.images.folder / self.images.files[index])
            return images.decode_mask(path, size, self.images.pixels)
        except DataError as error:
            raise DataError(
                f"{path} cannot be read as a mask ({error}; repair it, or remove it to leave its image "
                "unlabelled)"
            ) from error


def open_images(spec: Spec) -> FolderSource | MaskFolderSource:
    """Open a folder of images: one sub-folder per class, or with `masks` a class for each pixel.

    Raises:
        SettingsError: an option is invalid.
        DataError: a folder is missing or holds no images, or no image has a mask.
    """
    return open_masks(spec) if MASKS in spec.options else open_folder(spec)


def open_masks(spec: Spec) -> MaskFolderSource:
    """Open the images of one split, at any depth, with the masks of the same names.

    The masks are in the sub-folder of the same split where the images are.

    Raises:
        SettingsError: an option is invalid.
        DataError: a folder is missing or holds no images, no image has a mask, or one has several.
    """
    where, split = f"folder:{spec.path}", spec.split
    pixels, names = images.parse_pixels(spec.options, where), named_classes(spec.options, where)
    skip = spec.options.get("unreadable")
    if skip not in (None, SKIP):
        raise SettingsError(f"{where!r}: unreadable {skip!r}; expected {SKIP}")
    root, mask_root = spec.path.expanduser(), Path(spec.options[MASKS]).expanduser()
    below = split or (DEFAULT_SPLIT if (root / DEFAULT_SPLIT).is_dir() else "")
    for folder, what in ((root / below, "images"), (mask_root / below, "masks")):
        if not folder.is_dir():
            raise MissingDataError(f"{where}: no folder {folder}; expected one of {what}")
    files = images_below(root / below)
    if not files:
        raise DataError(f"{where}: {root / below} holds no images; expected some")
    options = {name: value for name, value in spec.options.items() if name != "unreadable"}
    named = replace(
        spec, place=str(root.resolve()), options=options, split=split or DEFAULT_SPLIT
    ).public_name
    unlabelled = np.full(len(files), UNLABELLED, np.int64)
    source = FolderSource(named, root / below, (), tuple(files), unlabelled, pixels)
    source = source.without_unreadable() if skip else source
    masks = _masks_of(source, mask_root / below)
    return MaskFolderSource(source, mask_root / below, masks, names)


def _masks_of(source: FolderSource, folder: Path) -> tuple[str | None, ...]:
    """The mask of each image, (N,): the file of the same path without its suffix; None without one.

    Raises:
        DataError: no image has a mask, an image has several, or a mask is in a format that changes values.
    """
    masks: dict[str, str] = {}
    for file in images_below(folder):
        stem = str(PurePosixPath(file).with_suffix(""))
        if stem in masks:
            raise DataError(
                f"{source.name}: {folder} has two masks of one name, {masks[stem]} and {file}; keep one"
            )
        masks[stem] = file
    found = tuple(masks.get(str(PurePosixPath(file).with_suffix(""))) for file in source.files)
    missing = [file for file, mask in zip(source.files, found, strict=True) if mask is None]
    if len(missing) == len(found):
        raise DataError(
            f"{source.name}: no image has a mask in {folder}; expected files of the same names, such as "
            f"{PurePosixPath(source.files[0]).with_suffix('.png')} for {source.files[0]}; it holds "
            f"{shown(sorted(masks.values())) or 'no images'}"
        )
    lossy = [mask for mask in found if mask and PurePosixPath(mask).suffix.lower() in LOSSY]
    if lossy:
        raise DataError(
            f"{source.name}: the mask {lossy[0]} is in a format that changes numbers of classes; save masks "
            "as PNG"
        )
    if missing:
        inform(
            f"note: {source.name}: {len(missing):,} of {len(found):,} images have no mask and are "
            f"unlabelled: {shown(missing)}"
        )
    return found
