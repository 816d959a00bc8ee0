"""The kinds of data sources, and how each is written on the command line."""

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

# each handler takes a Spec and returns a Source
KINDS = {
    "idx": Kind(
        "idx:DIR",
        "IDX files with MNIST's own names, plain or gzipped",
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
    """Parse a data specification; nothing is opened.

    Raises:
        SettingsError: it has no known form, or an option that its kind does not take.
    """
    unsplit, _, split = text.rpartition("@")
    if not unsplit:
        unsplit, split = text, ""
    name, _, place_and_options = unsplit.partition(":")
    if not place_and_options:
        raise SettingsError(
            f"data {text!r} is not a data specification; expected {forms(KINDS)}, followed by @SPLIT "
            "if needed"
        )
    if name.endswith(".py"):
        place, attribute = split_callable(unsplit)
        return Spec(text, CODE, place, attribute, split=split)
    if name not in KINDS or name == CODE:
        raise SettingsError(
            f"data {text!r} is of unknown kind {name!r}; expected {forms(KINDS)}, followed by @SPLIT "
            "if needed"
        )
    place, options = split_options(place_and_options)
    kind = KINDS[name]
    check_options(options, kind.options or (), unsplit)
    return Spec(text, name, place, options=options, split=split, file=kind.file)
