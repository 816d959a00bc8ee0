"""Which kinds of data there are, and how each is named on the command line."""

from __future__ import annotations

from softcache.data.images import OPTIONS as IMAGE_OPTIONS
from softcache.errors import SettingsError
from softcache.util.spec import (
    CODE,
    Kind,
    Spec,
    check_options,
    forms,
    split_callable,
    split_options,
)

HUB_OPTIONS = ("input", "label", "name", "length", "classes", *IMAGE_OPTIONS)
TABLE_OPTIONS = ("label", "inputs", "classes")

# the handler takes the Spec and returns a Source
KINDS = {
    "idx": Kind(
        "idx:DIR",
        "IDX files under MNIST's own names, plain or gzipped",
        "softcache.data.idx:open_idx",
    ),
    "npz": Kind(
        "npz:FILE",
        "arrays x and y, or x_SPLIT and y_SPLIT",
        "softcache.data.npz:open_npz",
        file=True,
    ),
    "folder": Kind(
        "folder:DIR",
        "images, one sub-folder per class (vision extra)",
        "softcache.data.folder:open_folder",
        IMAGE_OPTIONS,
    ),
    "hfds": Kind(
        "hfds:ID_OR_FOLDER",
        "a Hugging Face dataset: hub id, save_to_disk folder or Parquet file (data extra)",
        "softcache.data.huggingface:open_hub_data",
        HUB_OPTIONS,
    ),
    "csv": Kind(
        "csv:FILE",
        "a table of numbers (data extra)",
        "softcache.data.tables:open_table",
        TABLE_OPTIONS,
        file=True,
    ),
    "parquet": Kind(
        "parquet:FILE",
        "a table of numbers (data extra)",
        "softcache.data.tables:open_table",
        TABLE_OPTIONS,
        file=True,
    ),
    CODE: Kind(
        "FILE.py:CALLABLE",
        "your own callable that returns a map-style torch Dataset",
        "softcache.data.user_dataset:open_dataset",
    ),
}


def parse_data(text: str) -> Spec:
    """Take a data specification apart; nothing is opened.

    Raises:
        SettingsError: it has none of the known forms, or an option that its kind does not take.
    """
    where, _, split = text.rpartition("@")
    if not where:
        where, split = text, ""
    name, _, rest = where.partition(":")
    if not rest:
        raise SettingsError(
            f"data {text!r} is not a data specification; expected {forms(KINDS)}, each with @SPLIT at "
            "the end if needed"
        )
    if name.endswith(".py"):
        place, attribute = split_callable(where)
        return Spec(text, CODE, place, attribute, split=split)
    if name not in KINDS or name == CODE:
        raise SettingsError(
            f"data {text!r} is of unknown kind {name!r}; expected {forms(KINDS)}, each with @SPLIT at "
            "the end if needed"
        )
    place, options = split_options(rest)
    kind = KINDS[name]
    check_options(options, kind.options or (), where)
    return Spec(text, name, place, options=options, split=split, file=kind.file)
