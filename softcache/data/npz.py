"""Arrays in numpy's npz files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from softcache.data.source import DEFAULT_SPLIT, ArraySource, array_source
from softcache.errors import DataError
from softcache.util.messages import one_line


def open_npz(path: Path, split: str) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"npz:{path} is no npz file; expected one that holds x and y")
            suffix = f"_{split}" if f"x_{split}" in arrays else ""
            if f"x{suffix}" not in arrays or (not suffix and split != DEFAULT_SPLIT):
                raise DataError(
                    f"npz:{path}@{split}: the file holds {sorted(arrays)}; expected x_{split} and "
                    f"y_{split}" + (", or x and y" if split == DEFAULT_SPLIT else "")
                )
            inputs = arrays[f"x{suffix}"]
            labels = arrays.get(f"y{suffix}")
    except FileNotFoundError as error:
        raise DataError(f"npz:{path}: no such file") from error
    except DataError:
        raise
    except Exception as error:  # numpy's parsers raise many kinds on damaged files
        raise DataError(f"npz:{path} cannot be read as arrays ({one_line(error)})") from error
    return array_source(f"npz:{path.name}@{split}", inputs, labels)
