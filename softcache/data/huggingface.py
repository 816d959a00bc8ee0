"""Hugging Face `datasets`: from the hub, a save_to_disk folder, or Parquet and other files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data.columns import class_labels
from softcache.data.documents import COLUMNS, is_documents, source_of_records
from softcache.data.images import (
    Image,
    Pixels,
    as_array,
    decided,
    depth_sample,
    parse_pixels,
    stack_images,
)
from softcache.data.rows import TokenSource
from softcache.data.source import DEFAULT_SPLIT, UNLABELLED
from softcache.data.spec import named_classes
from softcache.data.text import encode
from softcache.errors import DataError, SettingsError, SoftcacheError
from softcache.util.extras import import_extra
from softcache.util.log import inform
from softcache.util.spec import Spec

FILES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
LABELS = ("label", "labels")  # label columns to look for if no column is a ClassLabel
FOLDERS = ("dataset_info.json", "dataset_dict.json")  # files that mark a save_to_disk folder

Table = Any  # a datasets.Dataset
Module = Any


@dataclass(frozen=True)
class HubSource:
    """The images, texts or numbers of one column, with the labels of another."""

    name: str
    dataset: Any = field(repr=False)  # a datasets.Dataset with one column
    column: str
    kind: str  # image, text or numbers
    labels: npt.NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    pixels: Pixels
    length: int  # of texts, in characters; longer texts are cut

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def text(self) -> bool:
        """Whether the samples are texts, whose keys do not depend on their padding."""
        return self.kind == "text"

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        rows = np.asarray(indices, np.int64)
        try:
            values = self.dataset[rows.tolist()][self.column]
        except Exception as error:  # the stored bytes may not be an image
            raise DataError(
                f"{self.name}: samples {rows[0]} to {rows[-1]} cannot be read "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error
        for row, value in zip(rows, values, strict=True):
            if value is None:
                raise DataError(f"{self.name}: sample {row} has no {self.column}")
        return self._tensor(values, rows), self.labels[rows]

    def _tensor(self, values: Sequence[Any], rows: npt.NDArray[np.int64]) -> Tensor:
        if self.kind == "text":
            return encode(values, self.length)
        names = [f"sample {row}" for row in rows]
        if self.kind == "image":
            arrays = [self._array(value, row) for value, row in zip(values, rows, strict=True)]
            return torch.from_numpy(stack_images(arrays, names, self.name))
        try:
            return torch.from_numpy(np.stack([np.asarray(value) for value in values]))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.name}: {self.column} of samples {rows[0]} to {rows[-1]} have different shapes, or "
                "are not numbers; expected numbers of one shape"
            ) from error

    def _array(self, image: Image, row: int) -> npt.NDArray[Any]:
        try:
            # only 32-bit integers have a depth to decide, for which other images need not be read
            return as_array(image, self._deep_pixels if image.mode == "I" else self.pixels)
        except (DataError, SettingsError) as error:
            raise type(error)(f"{self.name}: sample {row} cannot be read: {error}") from error

    @cached_property
    def _deep_pixels(self) -> Pixels:
        """`pixels` with the depth of 32-bit images, which images from all over the table decide."""
        return decided(self.pixels, self._opened(depth_sample(len(self))))

    def _opened(self, rows: Sequence[int]) -> Iterator[Image]:
        """Those images of the rows that can be read."""
        for row in rows:
            try:
                image = self.dataset[row][self.column]
            except Exception:  # an unreadable image is reported where it is fetched
                continue
            if image is not None:
                yield image


def open_hub_data(data: Spec) -> HubSource | TokenSource:
    """Open a data set from the hub, a save_to_disk folder or a file.

    Options: input=COLUMN, label=COLUMN (`label=` for none), name=CONFIG, classes=X,Y (the class names in
    order); for images also size= and mode=; for texts length=, the number of characters to cut them at. With
    text=, messages=, or words= and tags=, the samples are tokens; see softcache.data.documents.

    Raises:
        SettingsError: a column or a split does not exist, or must be named; or the classes are not those of
            the label column.
        DataError: the data set cannot be loaded.
    """
    spec, options = f"hfds:{data.place}", data.options
    table = load(data.place, data.split, options.get("name"))
    if is_documents(options):
        columns = [options[name] for name in COLUMNS if name in options]
        for column in columns:
            _check_column(table, column, spec)
        tags = options.get("tags")
        classes = getattr(getattr(table.features.get(tags), "feature", None), "names", None) or ()
        named = replace(data, split=data.split or DEFAULT_SPLIT)
        records = list(table.select_columns(columns))
        return source_of_records(named, records, tuple(map(str, classes)))
    label = _label_column(table, options, spec)
    column = _input_column(table, label, options, spec)
    kind = _kind(table.features[column])
    if kind is None:
        raise SettingsError(
            f"{spec}: column {column!r} holds {table.features[column]}; expected images, texts or numbers"
        )
    labels, names = _labels(table, label, options, spec)
    name = replace(data, split=data.split or DEFAULT_SPLIT).public_name
    inputs = table.select_columns([column])
    return HubSource(
        name,
        inputs.with_format("numpy") if kind == "numbers" else inputs,
        column,
        kind,
        labels,
        names,
        parse_pixels(options, spec),
        _length(inputs, column, options, spec) if kind == "text" else 0,
    )


def load(place: str, split: str, config: str | None = None) -> Table:
    """Load one split of a data set.

    Args:
        place: a hub id, a folder or a file.
        split: the split, which may be a slice such as `train[:1000]`; empty for train.
        config: the configuration of a data set on the hub; None for the default.

    Returns:
        A `datasets.Dataset`.

    Raises:
        SettingsError: the data set has no such split.
        DataError: the data set cannot be loaded.
    """
    datasets = import_extra("datasets", extra="data", what="hfds:")
    path, split_name = Path(place).expanduser(), split or "train"
    bars_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if any((path / name).is_file() for name in FOLDERS):
            return _slice(datasets, datasets.load_from_disk(str(path)), split_name, bool(split))
        if path.is_file():
            if path.suffix not in FILES:
                raise SettingsError(f"hfds:{place}: expected a folder or one of {', '.join(FILES)}")
            return datasets.load_dataset(FILES[path.suffix], data_files=str(path), split=split_name)
        where = str(path) if path.is_dir() else place
        return datasets.load_dataset(
            where, config, split=split_name, **_no_code(datasets.load_dataset)
        )
    except SoftcacheError:
        raise
    except Exception as error:  # the library raises errors of many types
        raise DataError(
            f"hfds:{place}@{split_name} cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); expected a hub id, a save_to_disk folder or a file such "
            "as .parquet, and one of its splits"
        ) from error
    finally:
        if bars_enabled:
            datasets.enable_progress_bars()


def _no_code(load_dataset: Callable[..., Table]) -> dict[str, bool]:
    """The argument that forbids a data set's own code; versions of the library without it run none."""
    accepts = "trust_remote_code" in inspect.signature(load_dataset).parameters
    return {"trust_remote_code": False} if accepts else {}


def _slice(datasets: Module, table: Table, split: str, named: bool) -> Table:
    """A split such as `train[:1000]` of a save_to_disk folder."""
    base = split.partition("[")[0]
    if isinstance(table, datasets.DatasetDict):
        if base not in table:
            raise SettingsError(f"the folder has no split {base!r}; it has {', '.join(table)}")
        table = table[base]
    elif named and table.split is not None and base != str(table.split):
        raise SettingsError(f"the folder holds the split {str(table.split)!r}, not {base!r}")
    if base == split:
        return table
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(table)})
    rows = [
        np.arange(
            0 if part.from_ is None else part.from_, len(table) if part.to is None else part.to
        )
        for part in parts
    ]
    return table.select(np.concatenate(rows))


def _label_column(table: Table, options: Mapping[str, str], spec: str) -> str | None:
    if "label" in options:
        if options["label"]:
            _check_column(table, options["label"], spec)
        return options["label"] or None
    # only the library's ClassLabel has str2int
    columns = [name for name, feature in table.features.items() if hasattr(feature, "str2int")]
    columns = columns or [name for name in LABELS if name in table.features]
    if len(columns) > 1:
        raise SettingsError(
            f"{spec} has labels in columns {', '.join(columns)}; choose one with ?label=COLUMN"
        )
    return columns[0] if columns else None


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
        name: _kind(feature) for name, feature in table.features.items() if name != label
    }
    for preferred in ("image", "text", "numbers"):
        columns = [name for name, kind in kinds.items() if kind == preferred]
        if len(columns) == 1:
            return columns[0]
        if columns:
            break
    raise SettingsError(
        f"{spec} has columns {', '.join(table.column_names)}; choose the input with ?input=COLUMN"
    )


def _check_column(table: Table, column: str, spec: str) -> None:
    if column not in table.features:
        raise SettingsError(
            f"{spec} has no column {column!r}; it has {', '.join(table.column_names)}"
        )


def _kind(feature: object) -> str | None:
    """What a column holds: image, text or numbers; None for anything else."""
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
    given_names = named_classes(options, spec)
    column = table.select_columns([label]).with_format("arrow")[:].column(label)
    where = f"{spec}: column {label!r}"
    labels, column_names = class_labels(column, given_names, where)
    if names and given_names:
        return _reordered(labels, names, given_names, where), given_names
    return labels, names or column_names


def _reordered(
    labels: npt.NDArray[np.int64], names: tuple[str, ...], order: tuple[str, ...], where: str
) -> npt.NDArray[np.int64]:
    """Labels (N,) of the classes `names` as labels of the same names in another order."""
    if sorted(names) != sorted(order):
        absent = [name for name in names if name not in order]
        surplus = [name for name in order if name not in names]
        is_other = f"has {surplus[0]!r}, which is not one of them" if surplus else ""
        problem = is_other or f"leaves out {absent[0]!r}"
        raise SettingsError(
            f"{where} has the classes {', '.join(names)[:200]}; classes={','.join(order)[:200]} {problem}; "
            "expected all of them, in any order"
        )
    known = (labels >= 0) & (labels < len(names))
    positions = np.array([order.index(name) for name in names], np.int64)
    return np.where(known, positions[np.where(known, labels, 0)], labels)


def _length(table: Table, column: str, options: Mapping[str, str], spec: str) -> int:
    """The option `length`, or by default the length of the longest text, in characters."""
    option = options.get("length")
    if option is not None and not re.fullmatch(r"[1-9]\d{0,6}", option):
        raise SettingsError(f"{spec}: length {option!r}; expected a whole number from 1 to 9999999")
    lengths = _text_lengths(table, column)
    longest = int(lengths.max(initial=1))
    if option is None:
        return longest
    cut = int((lengths > int(option)).sum())
    if cut:
        inform(
            f"{spec}: {cut:,} of {len(lengths):,} texts are longer than {option} characters and are cut; "
            f"the longest has {longest:,} (?length={longest} cuts none)"
        )
    return int(option)


def _text_lengths(table: Table, column: str) -> npt.NDArray[np.int64]:
    """The length (N,) of each text in characters; 0 where there is none."""
    compute = import_extra("pyarrow.compute", extra="data", what="hfds:")
    lengths = [np.empty(0, np.int64)]
    for batch in table.with_format("arrow").iter(10_000):
        filled = compute.fill_null(compute.utf8_length(batch.column(column)), 0)
        lengths.append(np.asarray(filled.to_numpy(), np.int64))
    return np.concatenate(lengths)
