"""Arrays in numpy's npz files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softcache.data.layout import layout_of
from softcache.data.rows import MaskSource, without_ignored
from softcache.data.source import DEFAULT_SPLIT, ArraySource, array_source
from softcache.errors import DataError, MissingDataError
from softcache.util.files import refuse_special_file
from softcache.util.log import inform
from softcache.util.messages import one_line
from softcache.util.spec import Spec


def open_npz(spec: Spec) -> ArraySource | MaskSource:
    """Open the arrays x_SPLIT and y_SPLIT, or x and y for the train split; labels are optional.

    Labels (N, H, W) are those of pixels. Images with their channels last, without channels or in wide
    integers are converted (see `layout_of`).

    Raises:
        DataError: there is no such file, or it does not contain such arrays.
    """
    path, split = spec.path, spec.split or DEFAULT_SPLIT
    refuse_special_file(path, DataError)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"npz:{path} is not an npz file; expected one that holds x and y")
            suffix = f"_{split}" if f"x_{split}" in arrays else ""
            if f"x{suffix}" not in arrays or (not suffix and split != DEFAULT_SPLIT):
                raise DataError(
                    f"npz:{path}@{split}: the file holds {sorted(arrays)}; expected x_{split} and "
                    f"y_{split}" + (", or x and y" if split == DEFAULT_SPLIT else "")
                )
            inputs = arrays[f"x{suffix}"]
            labels = arrays.get(f"y{suffix}")
    except FileNotFoundError as error:
        raise MissingDataError(f"npz:{path}: no such file") from error
    except DataError:
        raise
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise DataError(f"npz:{path} cannot be read as arrays ({one_line(error)})") from error
        raise DataError(
            f"npz:{path} has an array of Python objects, which softcache never loads; save numbers, or words "
            "as text of numpy: y.astype(str)"
        ) from error
    except Exception as error:  # numpy raises errors of many types on damaged files
        raise DataError(f"npz:{path} cannot be read as arrays ({one_line(error)})") from error
    name = replace(spec, split=split).public_name
    layout = layout_of(inputs)
    if description := layout.describe(inputs):
        inform(f"{name}: {description}")
    images = layout.apply(inputs)
    if labels is not None and labels.ndim == 3:
        if images.ndim != 4 or labels.shape != (len(images), *images.shape[2:]):
            raise DataError(
                f"{name}: labels have shape {labels.shape}, and images {images.shape}; expected a label for "
                "each pixel, (samples, height, width)"
            )
        return MaskSource(name, images, without_ignored(labels))
    return array_source(name, images, labels)
