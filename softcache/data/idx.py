"""The IDX files of MNIST and data sets like it."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.source import DEFAULT_SPLIT, ArraySource, array_source
from softcache.errors import DataError, MissingDataError, SettingsError
from softcache.util.messages import one_line
from softcache.util.spec import Spec

STEMS = {"train": "train", "test": "t10k"}
TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def open_idx(spec: Spec) -> ArraySource:
    """Open the images and labels of one split, train or test.

    Raises:
        SettingsError: the split is neither train nor test.
        DataError: a file is missing, damaged or not an IDX file.
    """
    folder, split = spec.path, spec.split or DEFAULT_SPLIT
    if split not in STEMS:
        raise SettingsError(f"idx:{folder}@{split}: no such split; expected @train or @test")
    stem = STEMS[split]
    images = read_idx(_idx_file(folder, f"{stem}-images-idx3-ubyte"))
    labels = read_idx(_idx_file(folder, f"{stem}-labels-idx1-ubyte"))
    name = replace(spec, split=split).public_name
    return array_source(name, images[:, None] if images.ndim == 3 else images, labels)


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise MissingDataError(
        f"no file {name} or {name}.gz in {folder}; expected the IDX files of MNIST"
    )


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read an IDX file: two zero bytes, type, rank, big-endian sizes, values (LeCun's MNIST page).

    Raises:
        DataError: the file is damaged, or not an IDX file.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", raw)
        if zero or kind not in TYPES:
            raise DataError(f"{path} begins with {raw[:4].hex()}; it is not an IDX file")
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        values = np.frombuffer(raw, TYPES[kind], offset=4 + 4 * rank)
        return values.reshape(shape).astype(values.dtype.newbyteorder("="))
    except DataError:  # it is a ValueError too
        raise
    except (struct.error, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({one_line(error)}); download it again") from error
