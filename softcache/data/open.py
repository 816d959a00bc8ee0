"""Sample sources: inputs, labels, and the keys by which a cache knows its samples.

A source is opened from a specification:

    idx:DIR              a folder of IDX files under MNIST's own names, plain or gzipped
    npz:FILE             arrays x and y, or x_SPLIT and y_SPLIT
    folder:DIR           images, one sub-folder per class (needs softcache[vision])
    hfds:ID_OR_FOLDER    a data set of Hugging Face (needs softcache[data])
    csv:, parquet:FILE   a table of numbers (needs softcache[data])
    FILE.py:CALLABLE     a callable that returns any map-style torch Dataset

`@SPLIT` at the end names a split; the default is train. Options stand behind a `?` before it.
"""

from __future__ import annotations

from pathlib import Path

from softcache.data import images
from softcache.data.folder import open_folder
from softcache.data.idx import open_idx
from softcache.data.npz import open_npz
from softcache.data.source import DEFAULT_SPLIT, Source
from softcache.data.tables import open_table
from softcache.data.user_dataset import open_dataset
from softcache.errors import DataError, SettingsError
from softcache.util.spec import check_options, split_options

FORMS = (
    "idx:DIR, npz:FILE, folder:DIR, hfds:ID_OR_FOLDER, csv:FILE, parquet:FILE or FILE.py:CALLABLE, each "
    "with @SPLIT at the end if wanted"
)


def open_source(spec: str) -> Source:
    """Open a data specification.

    Raises:
        SettingsError: the specification has none of the known forms.
        DataError: the files are missing or are not what the form says.
    """
    where, _, split = spec.rpartition("@")
    if not where:
        where, split = spec, ""
    kind, _, rest = where.partition(":")
    if not rest:
        raise SettingsError(f"data {spec!r} is no data specification; expected {FORMS}")
    source = _open(kind, rest, where, split)
    if len(source) == 0:
        raise DataError(f"data {spec} holds no samples; expected at least one")
    return source


def _open(kind: str, rest: str, where: str, split: str) -> Source:
    if kind.endswith(".py"):
        return open_dataset(where, split or DEFAULT_SPLIT)
    place, options = split_options(rest)
    if kind == "hfds":
        from softcache.data.huggingface import open_hub_data

        return open_hub_data(place, split, options)
    path = Path(place)
    if kind == "folder":
        check_options(options, images.OPTIONS, where)
        return open_folder(path, split, options)
    if kind in ("csv", "parquet"):
        return open_table(kind, path, split, options)
    check_options(options, (), where)
    if kind == "idx":
        return open_idx(path, split or DEFAULT_SPLIT)
    if kind == "npz":
        return open_npz(path, split or DEFAULT_SPLIT)
    raise SettingsError(f"data {where!r} is of unknown kind {kind!r}; expected {FORMS}")
