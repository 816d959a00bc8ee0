"""Data sets of Hugging Face's `datasets`: a hub's, a save_to_disk folder, or Parquet and other files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data import text
from softcache.data.images import Pixels, as_array, parse_pixels, stack_images
from softcache.data.source import DEFAULT_SPLIT, UNLABELLED
from softcache.data.tables import class_labels
from softcache.errors import DataError, SettingsError, SoftcacheError
from softcache.util.extras import import_extra
from softcache.util.spec import Spec

FILES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}

LABELS = ("label", "labels")  # columns that are taken if no other says that it is one

FOLDERS = ("dataset_info.json", "dataset_dict.json")  # of save_to_disk

Table = Any  # a Dataset of the library

Module = Any


@dataclass(frozen=True)
class HubSource:
    """Images, texts or numbers of one column, with the labels of another."""

    name: str
    dataset: Any = field(repr=False)  # of one column
    column: str
    kind: str  # image, text or numbers
    labels: npt.NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    pixels: Pixels
    length: int  # of texts, in characters

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        at = np.asarray(indices, np.int64)
        try:
            values = self.dataset[at.tolist()][self.column]
        except Exception as error:  # what is stored may be no image
            raise DataError(
                f"{self.name}: samples {at[0]} to {at[-1]} cannot be read "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error
        for number, value in zip(at, values, strict=True):
            if value is None:
                raise DataError(f"{self.name}: sample {number} has no {self.column}")
        return self._tensor(values, at), self.labels[at]

    def _tensor(self, values: Sequence[Any], at: npt.NDArray[np.int64]) -> Tensor:
        if self.kind == "text":
            return text.encode(values, self.length)
        names = [f"sample {number}" for number in at]
        if self.kind == "image":
            arrays = [as_array(value, self.pixels) for value in values]
            return torch.from_numpy(stack_images(arrays, names, self.name))
        try:
            return torch.from_numpy(np.stack([np.asarray(value) for value in values]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.name}: {self.column} of samples {at[0]} to {at[-1]} have different shapes, or are no "
                "numbers; expected one shape"
            ) from error


def open_hub_data(data: Spec) -> HubSource:
    """Open a data set of the hub, a folder of save_to_disk, or a file.

    Options: input=COLUMN, label=COLUMN (`label=` for none), name=CONFIG, classes=X,Y; size= and
    mode= of images; length= cuts texts at so many characters.

    Raises:
        SettingsError: a column or a split is not there, or must be named.
        DataError: it cannot be loaded.
    """
    spec, options = f"hfds:{data.place}", data.options
    table = load(data.place, data.split, options.get("name"))
    label = _label_column(table, options, spec)
    column = _input_column(table, label, options, spec)
    kind = _kind(table.features[column])
    if kind is None:
        raise SettingsError(
            f"{spec}: column {column!r} holds {table.features[column]}; expected images, texts or numbers"
        )
    labels, names = _labels(table, label, options, spec)
    name = replace(data, split=data.split or DEFAULT_SPLIT).public_name
    part = table.select_columns([column])
    return HubSource(
        name,
        part.with_format("numpy") if kind == "numbers" else part,
        column,
        kind,
        labels,
        names,
        parse_pixels(options, spec),
        _length(part, column, options, spec) if kind == "text" else 0,
    )


def load(place: str, split: str, config: str | None = None) -> Table:
    """One split of a data set, as the library has it.

    Raises:
        SettingsError: it has no such split.
        DataError: it cannot be loaded.
    """
    datasets = import_extra("datasets", extra="data", what="hfds:")
    path, wanted = Path(place).expanduser(), split or "train"
    shown, quiet = datasets.is_progress_bar_enabled(), datasets.disable_progress_bars
    quiet()
    try:
        if any((path / name).is_file() for name in FOLDERS):
            return _slice(datasets, datasets.load_from_disk(str(path)), wanted, bool(split))
        if path.is_file():
            if path.suffix not in FILES:
                raise SettingsError(f"hfds:{place}: expected a folder or one of {', '.join(FILES)}")
            return datasets.load_dataset(FILES[path.suffix], data_files=str(path), split=wanted)
        where = str(path) if path.is_dir() else place
        return datasets.load_dataset(where, config, split=wanted)
    except SoftcacheError:
        raise
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"hfds:{place}@{wanted} cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); expected the id of a data set on the hub, a folder of "
            "save_to_disk, or a file such as .parquet, and one of its splits"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _slice(datasets: Module, found: Table, split: str, named: bool) -> Table:
    """A split such as `train[:1000]` of what lies in a folder."""
    base = split.partition("[")[0]
    if isinstance(found, datasets.DatasetDict):
        if base not in found:
            raise SettingsError(f"the folder has no split {base!r}; it has {', '.join(found)}")
        found = found[base]
    elif named and found.split is not None and base != str(found.split):
        raise SettingsError(f"the folder holds the split {str(found.split)!r}, not {base!r}")
    if base == split:
        return found
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(found)})
    rows = [
        np.arange(
            0 if part.from_ is None else part.from_, len(found) if part.to is None else part.to
        )
        for part in parts
    ]
    return found.select(np.concatenate(rows))


def _label_column(table: Table, options: Mapping[str, str], spec: str) -> str | None:
    if "label" in options:
        if options["label"]:
            _check_column(table, options["label"], spec)
        return options["label"] or None
    found = [name for name, kind in table.features.items() if hasattr(kind, "str2int")]
    found = found or [name for name in LABELS if name in table.features]
    if len(found) > 1:
        raise SettingsError(
            f"{spec} has labels in columns {', '.join(found)}; say which with ?label=COLUMN"
        )
    return found[0] if found else None


def _input_column(
    table: Table,
    label: str | None,
    options: Mapping[str, str],
    spec: str,
) -> str:
    if "input" in options:
        _check_column(table, options["input"], spec)
        return options["input"]
    kinds: dict[str, str | None] = {
        name: _kind(kind) for name, kind in table.features.items() if name != label
    }
    for wanted in ("image", "text", "numbers"):
        found = [name for name, kind in kinds.items() if kind == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise SettingsError(
        f"{spec} has columns {', '.join(table.column_names)}; say which holds the input with "
        "?input=COLUMN"
    )


def _check_column(table: Table, column: str, spec: str) -> None:
    if column not in table.features:
        raise SettingsError(
            f"{spec} has no column {column!r}; it has {', '.join(table.column_names)}"
        )


def _kind(feature: object) -> str | None:
    if type(feature).__name__ == "Image":
        return "image"
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return "text"
    inner: Any = feature
    while hasattr(inner, "feature"):
        inner = inner.feature
    nested = inner is not feature or type(feature).__name__.startswith("Array")
    dtype = str(getattr(inner, "dtype", ""))
    numeric = dtype.startswith(("int", "uint", "float", "bool"))
    return "numbers" if nested and numeric else None


def _labels(
    table: Table,
    label: str | None,
    options: Mapping[str, str],
    spec: str,
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if label is None:
        return np.full(len(table), UNLABELLED, np.int64), ()
    names = tuple(getattr(table.features[label], "names", None) or ())
    known = tuple(options["classes"].split(",")) if options.get("classes") else ()
    column = table.select_columns([label]).with_format("arrow")[:].column(label)
    labels, found = class_labels(column, known, f"{spec}: column {label!r}")
    return labels, names or found


def _length(part: Table, column: str, options: Mapping[str, str], spec: str) -> int:
    """Characters of the longest text, or the number at which they are cut."""
    if "length" in options:
        if not re.fullmatch(r"[1-9]\d{0,6}", options["length"]):
            raise SettingsError(
                f"{spec}: length {options['length']!r}; expected a number from 1 up"
            )
        return int(options["length"])
    compute = import_extra("pyarrow.compute", extra="data", what="hfds:")
    longest = 1
    for batch in part.with_format("arrow").iter(10_000):
        longest = max(longest, compute.max(compute.utf8_length(batch.column(column))).as_py() or 1)
    return longest
