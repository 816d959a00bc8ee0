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

import gzip
import inspect
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from softcache import images
from softcache.cache import Cache
from softcache.cache.header import INPUTS
from softcache.cache.reader import open_trainable
from softcache.errors import DataError, SettingsError
from softcache.tables import read_table
from softcache.util.callables import call_user, import_callable
from softcache.util.spec import check_options, query_of, split_options

DEFAULT_SPLIT = "train"

UNLABELLED = -1

FORMS = (
    "idx:DIR, npz:FILE, folder:DIR, hfds:ID_OR_FOLDER, csv:FILE, parquet:FILE or FILE.py:CALLABLE, each "
    "with @SPLIT at the end if wanted"
)


class Source(Protocol):
    """Anything that gives samples by index, a batch at a time."""

    @property
    def name(self) -> str:
        """The specification without folders: what may be written into a shared file."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty if the source has none."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Raw inputs (B, *shape) and labels (B,) of the samples at `indices`."""


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
        return _open_dataset(where, split or DEFAULT_SPLIT)
    place, options = split_options(rest)
    if kind == "hfds":
        from softcache.hub_data import open_hub_data

        return open_hub_data(place, split, options)
    path = Path(place)
    if kind == "folder":
        check_options(options, images.OPTIONS, where)
        return _open_folder(path, split, options)
    if kind in ("csv", "parquet"):
        return _open_table(kind, path, split, options)
    check_options(options, (), where)
    if kind == "idx":
        return _open_idx(path, split or DEFAULT_SPLIT)
    if kind == "npz":
        return _open_npz(path, split or DEFAULT_SPLIT)
    raise SettingsError(f"data {where!r} is of unknown kind {kind!r}; expected {FORMS}")


def check_class_names(source: Source, names: Sequence[str], whose: str) -> None:
    """Raise DataError if the classes of a source are not those of `names`, in their order.

    Where one of them names no classes, or only numbers them, there is nothing to compare.
    """
    mine = source.class_names
    numbered = all(name.isdecimal() for name in (*mine, *names))
    if not mine or not names or numbered or tuple(mine) == tuple(names):
        return
    pairs = zip((*mine, "none"), (*names, "none"), strict=False)
    at, (own, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise DataError(
        f"{source.name} has {len(mine)} classes, and {whose} {len(names)}; class {at} is {own!r} in the one "
        f"and {theirs!r} in the other: labels would be compared with other classes. Give both the same "
        "classes, in the same order"
    )


def all_class_names(cache: Cache) -> tuple[str, ...]:
    """Every class of a cache by name."""
    return tuple(name.decode("utf-8", "replace") for name in cache.arrays["class_names"])


def sample_keys(inputs: Tensor) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each sample's own content: xxh3 over its bytes, seeded by dtype and shape.

    Args:
        inputs: (B, *shape), on the CPU.

    Returns:
        (B,) uint64.
    """
    rows = inputs.contiguous().numpy()
    layout = f"{rows.dtype.newbyteorder('<').str}{rows.shape[1:]}"
    seed = xxhash.xxh3_64_intdigest(layout.encode())
    raw, size = rows.reshape(-1).view(np.uint8).data, rows[:1].nbytes
    digest = xxhash.xxh3_64_intdigest
    keys = (digest(raw[at : at + size], seed) for at in range(0, len(rows) * size, size or 1))
    return np.fromiter(keys, np.uint64, len(rows)) if size else np.full(len(rows), seed, np.uint64)


def check_labels(
    labels: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], classes: int, source: Source
) -> None:
    """Raise DataError if a label is neither a class nor UNLABELLED; (B,) each."""
    wrong = np.flatnonzero((labels >= classes) | (labels < UNLABELLED))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{source.name}: sample {samples[at]} has label {labels[at]}; expected 0 to "
            f"{classes - 1}, or {UNLABELLED} for none"
        )


@dataclass(frozen=True)
class ArraySource:
    """Samples that lie in one array: `inputs` (N, *shape) and `labels` (N,)."""

    name: str
    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        at = np.asarray(indices, np.int64)
        return torch.from_numpy(self.inputs[at]), self.labels[at]


class CacheSource:
    """The samples that a cache was made with --embed-inputs holds itself."""

    def __init__(self, cache: Cache) -> None:
        if not cache.header.embeds_inputs:
            raise SettingsError(
                f"{cache.path} holds soft targets alone; name its samples, {cache.header.data}, with --data, "
                "or dump it with --embed-inputs"
            )
        self.cache, self.name = cache, cache.header.data
        self.class_names = tuple(cache.class_names)

    def __reduce__(self) -> tuple[Callable[[Path], CacheSource], tuple[Path]]:
        return _reopen, (self.cache.path,)  # a map of a file has no copy in another process

    def __len__(self) -> int:
        return self.cache.header.samples

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        at = np.asarray(indices, np.int64)
        return torch.from_numpy(self.cache.arrays[INPUTS][at]), self.cache.labels[at]


def _reopen(path: Path) -> CacheSource:
    return CacheSource(open_trainable(path))


@dataclass(frozen=True)
class FolderSource:
    """Images in `folder`, one sub-folder per class; classes in the order of their names."""

    name: str
    folder: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    pixels: images.Pixels

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        names = [self.files[i] for i in indices]
        arrays = [images.read_image(self.folder / name, self.pixels) for name in names]
        inputs = images.same_shape(arrays, names, str(self.folder))
        return torch.from_numpy(inputs), self.labels[np.asarray(indices, np.int64)]


@dataclass(frozen=True)
class DatasetSource:
    """A user's own map-style Dataset, whose items are an input or (input, label)."""

    name: str
    dataset: Dataset[Any]
    length: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        items = [self._item(i) for i in indices]
        layouts = {(str(item[0].dtype), tuple(item[0].shape)) for item in items}
        if len(layouts) > 1:
            raise DataError(
                f"{self.name}: inputs of one batch have different shapes or types, {sorted(layouts)}; "
                "the Dataset must give all samples one shape and one dtype"
            )
        inputs = torch.stack([item[0] for item in items])
        return inputs, np.array([item[1] for item in items], np.int64)

    def _item(self, index: int) -> tuple[Tensor, int]:
        try:
            item = self.dataset[index]
        except Exception as error:  # a user's code may fail in any way
            raise DataError(
                f"{self.name}: item {index} raised {type(error).__name__}: {_one_line(error)}"
            ) from error
        sample, label = item if isinstance(item, tuple) and len(item) == 2 else (item, UNLABELLED)
        try:
            return _as_input(sample), _as_label(label)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.name}: item {index} is {type(item).__name__}, which is neither an input nor "
                f"a pair (input, label) of a tensor, array or image and a whole number: {error}"
            ) from error


def _as_input(sample: object) -> Tensor:
    if not isinstance(sample, Tensor):
        array = np.asarray(sample)
        if array.ndim == 3 and hasattr(sample, "getbands"):  # Pillow: height, width, bands
            array = array.transpose(2, 0, 1)
        return torch.from_numpy(np.array(array))
    if sample.dtype == torch.bfloat16:
        raise TypeError("numpy knows no bfloat16; give float32")
    return sample.detach()


def _as_label(label: object) -> int:
    if label is None:
        return UNLABELLED
    number = int(label)  # type: ignore[call-overload]  # anything that can be a whole number
    if number != label or abs(number) >= 1 << 62:
        raise ValueError(f"label {label} is no class number")
    return int(number)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_dataset(where: str, split: str) -> DatasetSource:
    make = import_callable(where, what="data")
    takes_split = "split" in inspect.signature(make).parameters
    if split != DEFAULT_SPLIT and not takes_split:
        raise SettingsError(
            f"data {where}@{split}: the callable takes no argument 'split', so it has no split "
            f"{split!r}; give it one, or leave @{split} out"
        )
    arguments = {"split": split} if takes_split else {}
    dataset = call_user(make, what=f"data {where}", **arguments)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"data {where} returned {type(dataset).__name__}; expected a map-style Dataset, with "
            "__getitem__ and __len__"
        )
    names = getattr(dataset, "classes", ())
    names = names if isinstance(names, list | tuple) else ()
    path, _, attribute = where.rpartition(":")
    name = f"{Path(path).name}:{attribute}@{split}"
    return DatasetSource(name, dataset, len(dataset), tuple(str(n) for n in names))


_IDX_STEMS = {"train": "train", "test": "t10k"}

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _open_idx(folder: Path, split: str) -> ArraySource:
    if split not in _IDX_STEMS:
        raise SettingsError(f"idx:{folder}@{split}: no such split; expected @train or @test")
    stem = _IDX_STEMS[split]
    images = _read_idx(_idx_file(folder, f"{stem}-images-idx3-ubyte"))
    labels = _read_idx(_idx_file(folder, f"{stem}-labels-idx1-ubyte"))
    name = f"idx:{folder.resolve().name}@{split}"
    return _array_source(name, images[:, None] if images.ndim == 3 else images, labels)


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"no file {name} or {name}.gz in {folder}; expected the IDX files of MNIST")


def _read_idx(path: Path) -> npt.NDArray[Any]:
    """An IDX file: two zero bytes, type, rank, big-endian sizes, values (LeCun's MNIST page)."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", raw)
        if zero or kind not in _IDX_TYPES:
            raise DataError(f"{path} begins with {raw[:4].hex()}; it is no IDX file")
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        values = np.frombuffer(raw, _IDX_TYPES[kind], offset=4 + 4 * rank)
        return values.reshape(shape).astype(values.dtype.newbyteorder("="))
    except (struct.error, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({_one_line(error)}); fetch it again") from error


def _open_npz(path: Path, split: str) -> ArraySource:
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
        raise DataError(f"npz:{path} cannot be read as arrays ({_one_line(error)})") from error
    return _array_source(f"npz:{path.name}@{split}", inputs, labels)


def _array_source(
    name: str, inputs: npt.NDArray[Any], labels: npt.NDArray[Any] | None
) -> ArraySource:
    if inputs.ndim < 2 or inputs.dtype.kind not in "uif":
        raise DataError(
            f"{name}: inputs are {inputs.dtype} of shape {inputs.shape}; expected numbers of shape "
            "(samples, ...)"
        )
    if labels is None:
        labels = np.full(len(inputs), UNLABELLED, np.int64)
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(inputs),) or labels.dtype.kind not in "ui":
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected whole numbers of "
            f"shape ({len(inputs)},), one for each input"
        )
    if inputs.dtype.kind == "u" and inputs.dtype.itemsize > 2:
        inputs = inputs.astype(np.int64)  # torch computes with no wider unsigned types
    if inputs.dtype.kind == "f" and inputs.dtype.itemsize > 8:
        inputs = inputs.astype(np.float64)
    inputs = inputs.astype(inputs.dtype.newbyteorder("="), copy=False)
    return ArraySource(name, inputs, labels.astype(np.int64))


def _open_table(kind: str, path: Path, split: str, options: dict[str, str]) -> ArraySource:
    if split:
        raise SettingsError(f"{kind}:{path}@{split}: a table has no splits; name a file for each")
    inputs, labels, names = read_table(kind, path, options)
    return ArraySource(f"{kind}:{path.name}{query_of(options)}", inputs, labels, names)


def _open_folder(folder: Path, split: str, options: dict[str, str]) -> FolderSource:
    pixels = images.parse_pixels(options, f"folder:{folder}")
    if split or (folder / DEFAULT_SPLIT).is_dir():
        folder = folder / (split or DEFAULT_SPLIT)
    if not folder.is_dir():
        raise DataError(f"folder:{folder}: no such folder; expected images, a sub-folder per class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(
            f"{name}/{file.name}"
            for file in (folder / name).iterdir()
            if file.suffix.lower() in images.SUFFIXES
        )
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"folder:{folder} holds no images; expected one sub-folder per class")
    root = folder.parent if folder.name == (split or DEFAULT_SPLIT) else folder
    return FolderSource(
        f"folder:{root.resolve().name}{query_of(options)}@{split or DEFAULT_SPLIT}",
        folder,
        tuple(names),
        tuple(files),
        np.array(labels, np.int64),
        pixels,
    )
