"""Folders of images, one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data import images
from softcache.data.source import DEFAULT_SPLIT
from softcache.data.spec import named_classes
from softcache.errors import DataError, MissingDataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.log import inform
from softcache.util.progress import Advance, progress
from softcache.util.spec import Spec

# names that a user gives to the parts of a data set, not to classes
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev")
SKIP = "skip"  # the value of the option `unreadable`
SHOWN = 10  # files or classes that a message lists
THREADS = min(32, os.cpu_count() or 1)
CHUNK = 4096  # files handed to the threads at a time


@dataclass(frozen=True)
class FolderSource:
    """Images in `folder`, one sub-folder per class; the classes are sorted by name.

    Attributes:
        files: the paths of the images below `folder`, with slashes, class by class.
        labels: (N,), the class of each.
    """

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
        try:
            arrays = [self._read(file) for file in files]
        except DataError as error:
            raise self._unreadable_error(error) from error
        inputs = images.stack_images(arrays, files, str(self.folder))
        return torch.from_numpy(inputs), self.labels[np.asarray(indices, np.int64)]

    def _read(self, file: str) -> npt.NDArray[np.generic]:
        path = self.folder / file
        try:
            return images.decode(path, self._pixels)
        except DataError as error:
            raise DataError(
                f"{path} cannot be read as an image ({error}; repair or remove it, or leave it out with "
                "?unreadable=skip)"
            ) from error

    def unreadable(self, advance: Advance | None = None) -> list[str]:
        """Read every file and list those that cannot be read as images.

        Args:
            advance: called with the number of files read since the last call.

        Returns:
            The relative path of each such file with the reason, such as `cat/0.png (it is truncated)`.
        """
        return [f"{self.files[i]} ({reason})" for i, reason in self._reasons(advance).items()]

    def without_unreadable(self) -> FolderSource:
        """The source without the files that cannot be read; all others keep their labels.

        Raises:
            DataError: no file can be read.
        """
        with progress("reading images", len(self), "images") as advance:
            reasons = self._reasons(advance)
        if not reasons:
            return self
        unreadable = [f"{self.files[index]} ({reason})" for index, reason in reasons.items()]
        text = f"{len(reasons):,} of {len(self):,} files cannot be read as images"
        if len(reasons) == len(self):
            raise DataError(f"{self.name}: {text}: {shown(unreadable)}; expected some that can be")
        inform(f"{self.name}: {text} and are left out: {shown(unreadable)}")
        rows = [index for index in range(len(self)) if index not in reasons]
        files = tuple(self.files[index] for index in rows)
        return replace(self, files=files, labels=self.labels[rows], pixels=self._pixels)

    def _reasons(self, advance: Advance | None = None) -> dict[int, str]:
        """Why files cannot be read, by their index."""
        reasons = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self), CHUNK):
                files = self.files[start : start + CHUNK]
                for index, reason in enumerate(pool.map(self._reason, files), start):
                    if reason:
                        reasons[index] = reason
                    if advance:
                        advance(1)
        return reasons

    def _reason(self, file: str) -> str:
        """Why a file cannot be read; empty if it can."""
        try:
            images.decode(self.folder / file, self._pixels)
        except DataError as error:
            return str(error)
        return ""

    def _unreadable_error(self, error: DataError) -> DataError:
        """An error that names all unreadable files of the folder, after the first one was met."""
        if len(self) > CHUNK:
            inform(f"{error}; reading all {len(self):,} files of {self.name} to find others")
        unreadable = self.unreadable()
        if len(unreadable) < 2:
            return error
        return DataError(
            f"{len(unreadable):,} of the {len(self):,} files in {self.folder} cannot be read as images: "
            f"{shown(unreadable)}; repair or remove them, or leave them out with ?unreadable=skip"
        )

    @cached_property
    def _pixels(self) -> images.Pixels:
        """`pixels` with the depth of 32-bit images, which images from all over the folder decide."""
        wide = [file for file in self.files if file.lower().endswith(images.WIDE_SUFFIXES)]
        return images.decided(
            self.pixels, self._opened([wide[i] for i in images.depth_sample(len(wide))])
        )

    def _opened(self, files: Sequence[str]) -> Iterator[images.Image]:
        """Those of the files that can be opened."""
        for file in files:
            image = import_extra("PIL.Image", extra="vision", what="reading images")
            try:
                with image.open(self.folder / file) as opened:
                    opened.load()
                    yield opened
            except Exception:  # an unreadable file is reported where it is fetched
                continue


def open_folder(spec: Spec) -> FolderSource:
    """Open the images of one split: in the sub-folder of that name, or in the folder itself.

    Images are searched in all folders below that of their class, in sorted order. Files and folders that
    begin with a dot are no data.

    Raises:
        SettingsError: an option is invalid, or `classes` does not name all classes.
        DataError: there is no such folder, or it contains no images.
    """
    folder, split = spec.path, spec.split
    pixels = images.parse_pixels(spec.options, f"folder:{folder}")
    names = named_classes(spec.options, f"folder:{folder}")
    skip = spec.options.get("unreadable")
    if skip not in (None, SKIP):
        raise SettingsError(f"'folder:{folder}': unreadable {skip!r}; expected {SKIP}")
    if split or (folder / DEFAULT_SPLIT).is_dir():
        folder = folder / (split or DEFAULT_SPLIT)
    if not folder.is_dir():
        raise MissingDataError(
            f"folder:{folder}: no such folder; expected one sub-folder of images per class"
        )
    class_names = _class_names(folder, names)
    class_files = [images_below(folder / name) for name in class_names]  # below their class
    files = [
        f"{name}/{file}"
        for name, files in zip(class_names, class_files, strict=True)
        for file in files
    ]
    if not files:
        raise DataError(f"folder:{folder} holds no images; expected one sub-folder per class")
    _check_not_splits(folder, class_names, files)
    root = folder.parent if folder.name == (split or DEFAULT_SPLIT) else folder
    options = {name: value for name, value in spec.options.items() if name != "unreadable"}
    named = replace(spec, place=str(root.resolve()), options=options, split=split or DEFAULT_SPLIT)
    counts = [len(files) for files in class_files]
    labels = np.repeat(np.arange(len(class_names)), counts).astype(np.int64)
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        inform(f"{named.public_name}: classes without images, which stay classes: {shown(empty)}")
    source = FolderSource(named.public_name, folder, class_names, tuple(files), labels, pixels)
    return source.without_unreadable() if skip else source


def _count_classes(numbers: Sequence[str]) -> bool:
    """Whether numbers as text count classes, as 0 to 11 do, also with some missing; 0, 90, 180 do not."""
    values = [int(number) for number in numbers]
    return max(values) - min(values) < 2 * len(values)


def _class_names(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The classes in the order of their labels: as named, or sorted; numbers that count them, by value.

    Args:
        folder: the folder of the classes.
        names: the names that the user gave; empty for those of the sub-folders.

    Raises:
        SettingsError: a sub-folder is not among the names.
    """
    folders = sorted(e.name for e in folder.iterdir() if e.is_dir() and not _is_hidden(e.name))
    if folders and all(name.isdecimal() for name in folders):
        if _count_classes(folders):
            folders.sort(key=int)
        elif not names:
            inform(
                f"note: folder:{folder}: the classes are numbers that do not count from one to the next, and "
                f"are sorted as text, as torchvision does: {shown(folders)} (?classes=A,B,... gives another "
                "order)"
            )
    unnamed = [name for name in folders if name not in names]
    if names and unnamed:
        raise SettingsError(
            f"folder:{folder}: sub-folder {unnamed[0]!r} is not in classes={','.join(names)}; expected the "
            f"names of all sub-folders, in the order of their labels: {shown(folders)}"
        )
    return names or tuple(folders)


def images_below(folder: Path) -> list[str]:
    """The paths of the images below a folder, with slashes, in the order of torchvision's ImageFolder.

    This is the order of their folders by the whole path, `a-b` before `a/c`, and of the names in each.
    A folder that does not exist has no images.
    """
    names_by_folder = dict(_walk(folder, "", ())) if folder.is_dir() else {}
    return [
        f"{below}/{name}" if below else name
        for below in sorted(names_by_folder)
        for name in names_by_folder[below]
    ]


def _walk(folder: Path, below: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """The names of the images in a folder and in all folders below it, by the path of each folder.

    Args:
        folder: the folder.
        below: its path relative to that of its class.
        above: the real paths of the folders that contain it, which links are not followed back to.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        entries = [
            (e.name, e.is_dir())
            for e in listing
            # reading a pipe or a device might never end
            if not _is_hidden(e.name) and (e.is_dir() or e.is_file() or not Path(e).exists())
        ]
    files = [name for name, is_folder in entries if not is_folder]
    yield below, sorted(f for f in files if Path(f).suffix.lower() in images.SUFFIXES)
    for name in (name for name, is_folder in entries if is_folder):
        yield from _walk(folder / name, f"{below}/{name}" if below else name, (*above, real))


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _check_not_splits(folder: Path, class_names: Sequence[str], files: Sequence[str]) -> None:
    """Raise DataError if the sub-folders are splits with classes below them, not classes."""
    splits = all(name.lower() in SPLITS for name in class_names)
    if splits and all(file.count("/") > 1 for file in files):
        raise DataError(
            f"folder:{folder} holds no images in {shown(class_names)}, which look like splits; expected one "
            f"sub-folder per class: choose a split, such as @{class_names[0]}"
        )


def shown(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
