"""Folders of images, one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data import images
from softcache.data.source import DEFAULT_SPLIT
from softcache.errors import DataError, MissingDataError
from softcache.util.spec import Spec


@dataclass(frozen=True)
class FolderSource:
    """Images in `folder`, one sub-folder per class; the classes are sorted by name."""

    name: str
    folder: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    pixels: images.Pixels

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        files = [self.files[index] for index in indices]
        arrays = [images.read_image(self.folder / file, self.pixels) for file in files]
        inputs = images.stack_images(arrays, files, str(self.folder))
        return torch.from_numpy(inputs), self.labels[np.asarray(indices, np.int64)]


def open_folder(spec: Spec) -> FolderSource:
    """Open the images of one split: in the sub-folder of that name, or in the folder itself.

    Raises:
        SettingsError: an image option is invalid.
        DataError: there is no such folder, or it contains no images.
    """
    folder, split = spec.path, spec.split
    pixels = images.parse_pixels(spec.options, f"folder:{folder}")
    if split or (folder / DEFAULT_SPLIT).is_dir():
        folder = folder / (split or DEFAULT_SPLIT)
    if not folder.is_dir():
        raise MissingDataError(
            f"folder:{folder}: no such folder; expected one sub-folder of images per class"
        )
    class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        class_files = sorted(
            f"{class_name}/{file.name}"
            for file in (folder / class_name).iterdir()
            if file.suffix.lower() in images.SUFFIXES
        )
        files += class_files
        labels += [label] * len(class_files)
    if not files:
        raise DataError(f"folder:{folder} holds no images; expected one sub-folder per class")
    root = folder.parent if folder.name == (split or DEFAULT_SPLIT) else folder
    return FolderSource(
        replace(spec, place=str(root.resolve()), split=split or DEFAULT_SPLIT).public_name,
        folder,
        tuple(class_names),
        tuple(files),
        np.array(labels, np.int64),
        pixels,
    )
