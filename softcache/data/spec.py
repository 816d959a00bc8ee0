"""The kinds of data sources, and how each is written on the command line."""

from __future__ import annotations

from collections.abc import Mapping

from softcache.data.images import OPTIONS as IMAGE_OPTIONS
from softcache.errors import SettingsError
from softcache.util.spec import (
    CODE,
    MASKS,
    Kind,
    Spec,
    check_options,
    forms,
    split_callable,
    split_options,
    unescape,
)

COMMON_OPTIONS = ("classes", "shuffle", "samples")  # of every kind
FOLDER_OPTIONS = (*IMAGE_OPTIONS, MASKS, "unreadable", *COMMON_OPTIONS)
HUB_OPTIONS = (
    "input", "label", "name", "length", "classes", *IMAGE_OPTIONS, "shuffle", "samples", "tokenizer",
    "stride", "loss_on", "text", "messages", "words", "tags",
)  # fmt: skip
TOKEN_OPTIONS = ("tokenizer", "length", "stride", "loss_on", "shuffle", "samples")
TABLE_OPTIONS = ("label", "inputs", "classes", "missing", "shuffle", "samples")
# kinds whose sources take the names of classes themselves, where names also give the order of labels
NAMING_KINDS = ("folder", "hfds", "csv", "parquet")

# each handler takes a Spec and returns a Source
KINDS = {
    "idx": Kind(
        "idx:DIR",
        "IDX files with MNIST's own names, plain or gzipped",
        "softcache.data.idx:open_idx",
        COMMON_OPTIONS,
    ),
    "npz": Kind(
        "npz:FILE",
        "arrays x and y, or x_SPLIT and y_SPLIT",
        "softcache.data.npz:open_npz",
        COMMON_OPTIONS,
        file=True,
    ),
    "folder": Kind(
        "folder:DIR",
        "images, one sub-folder per class; or with masks=DIR2 a class for each pixel (vision extra)",
        "softcache.data.mask_folder:open_images",
        FOLDER_OPTIONS,
    ),
    "hfds": Kind(
        "hfds:ID_OR_FOLDER",
        "a Hugging Face dataset: hub id, save_to_disk folder or Parquet file (data extra)",
        "softcache.data.huggingface:open_hub_data",
        HUB_OPTIONS,
    ),
    "csv": Kind(
        "csv:FILE",
        "a table of numbers and words (data extra)",
        "softcache.data.tables:open_table",
        TABLE_OPTIONS,
        file=True,
    ),
    "parquet": Kind(
        "parquet:FILE",
        "a table of numbers and words (data extra)",
        "softcache.data.tables:open_table",
        TABLE_OPTIONS,
        file=True,
    ),
    "text": Kind(
        "text:FILE_OR_FOLDER",
        "texts for a language model, a document per file (hf extra)",
        "softcache.data.documents:open_text",
        ("documents", *TOKEN_OPTIONS),
        file=True,
    ),
    "jsonl": Kind(
        "jsonl:FILE?text=FIELD",
        "texts, chats (messages=) or labelled words (words= and tags=), one per line (hf extra)",
        "softcache.data.documents:open_jsonl",
        ("text", "messages", "words", "tags", *TOKEN_OPTIONS),
        file=True,
    ),
    "ids": Kind(
        "ids:FILE",
        "token ids in npy, jsonl or Parquet",
        "softcache.data.documents:open_ids",
        TOKEN_OPTIONS,
        file=True,
    ),
    CODE: Kind(
        "FILE.py:CALLABLE",
        "your own callable that returns a map-style torch Dataset",
        "softcache.data.user_dataset:open_dataset",
        COMMON_OPTIONS,
    ),
}


def parse_data(text: str) -> Spec:
    """Parse a data specification; nothing is opened.

    Raises:
        SettingsError: it has no known form, or an option that its kind does not take.
    """
    unsplit, _, split = text.rpartition("@")
    if not unsplit or "/" in split:  # an @ in a folder's name: no split has a slash
        unsplit, split = text, ""
    name, _, place_and_options = unsplit.partition(":")
    if not place_and_options:
        raise SettingsError(
            f"data {text!r} is not a data specification; expected {forms(KINDS)}, followed by @SPLIT "
            "if needed"
        )
    if name.endswith(".py"):
        attribute, options = split_options(place_and_options)
        place, attribute = split_callable(f"{unescape(name)}:{attribute}")
        check_options(options, COMMON_OPTIONS, unsplit)
        return Spec(text, CODE, place, attribute, options, split)
    if name not in KINDS or name == CODE:
        raise SettingsError(
            f"data {text!r} is of unknown kind {name!r}; expected {forms(KINDS)}, followed by @SPLIT "
            "if needed"
        )
    place, options = split_options(place_and_options)
    kind = KINDS[name]
    check_options(options, kind.options or (), unsplit)
    return Spec(text, name, place, options=options, split=split, file=kind.file)


def named_classes(options: Mapping[str, str], spec: str) -> tuple[str, ...]:
    """The names of the option `classes=A,B,C`, in the order of labels 0, 1, 2; empty if it is not given.

    Raises:
        SettingsError: a name is empty or repeated.
    """
    if "classes" not in options:
        return ()
    names = tuple(options["classes"].split(","))
    invalid = [name for name in names if not name or names.count(name) > 1]
    if invalid:
        raise SettingsError(
            f"{spec!r}: classes has {'an empty name' if not invalid[0] else f'{invalid[0]!r} twice'}; "
            "expected different names in the order of labels 0, 1, 2, ..., such as classes=cat,dog"
        )
    return names
