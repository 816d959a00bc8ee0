"""Matrices of precomputed teacher outputs, one row per sample."""

from __future__ import annotations

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.cache.layout import RowLayout
from softcache.data.huggingface import load
from softcache.data.rows import layout_of_source, unit_of
from softcache.data.source import Source
from softcache.errors import MissingFileError, ModelError, SettingsError
from softcache.models.weights import file_sha256, read_weights
from softcache.teachers.outputs import TINY, TOLERANCE
from softcache.util.files import refuse_special_file
from softcache.util.spec import Spec


class MissingRowError(ModelError):
    """A matrix has no row for a sample."""


class Matrix(nn.Module):
    """A teacher's outputs for every sample, (N, C); rows are looked up, inputs are ignored.

    Attributes:
        layout: which of the rows belong to which sample, if samples have many; None for one each.
    """

    def __init__(self, values: npt.NDArray[Any]) -> None:
        super().__init__()
        self.values = values
        self.layout: RowLayout | None = None

    def numbers_at(
        self, samples: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The numbers (R,), for rows(), of the rows of samples (R,) at positions (R,) within them."""
        return samples if self.layout is None else self.layout.find(samples, positions)

    def match(self, spec: str, source: Source, *, strict: bool = False) -> None:
        """Learn which of its rows belong to which sample of the data.

        Args:
            spec: of the teacher, for messages.
            source: the data.
            strict: refuse rows that cannot belong to the data; of a matrix, only their number is known.

        Raises:
            ModelError: it has another number of rows than the data.
        """
        layout, unit = layout_of_source(source), unit_of(source) or "sample"
        expected = len(source) if layout is None else layout.rows
        if len(self.values) != expected:
            raise ModelError(
                f"teacher {spec} has {len(self.values):,} rows, {source.name} has {expected:,} {unit}s; "
                f"expected a row for each {unit} of the data, in the same order"
            )
        self.layout = layout

    def rows(self, samples: npt.NDArray[np.int64]) -> Tensor:
        """Look up the rows of sample ids (B,): (B, C) float32.

        Raises:
            MissingRowError: a sample id is beyond the last row.
        """
        if len(samples) and int(samples.max()) >= len(self.values):
            raise MissingRowError(
                f"the matrix has {len(self.values):,} rows, too few for sample {int(samples.max())}; "
                "expected one row per sample of the data, in the same order"
            )
        return torch.from_numpy(np.asarray(self.values[samples], np.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        raise ModelError("a matrix has rows only for the samples of --data; leave --eval-data out")


class TopRows(Matrix):
    """The k largest log-probabilities of every sample, (N, k); the rest of the mass is spread evenly.

    Attributes:
        ids: (N, k) class ids of the log-probabilities.
        classes: number of classes C.
    """

    def __init__(
        self, ids: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32], classes: int
    ) -> None:
        super().__init__(log_probs)
        self.ids, self.classes = ids, classes

    def rows(self, samples: npt.NDArray[np.int64]) -> Tensor:
        """Look up the rows of sample ids (B,): log-probabilities (B, C) float32.

        Raises:
            ModelError: a sample id is beyond the last row, or probabilities sum to more than 1.
        """
        top = super().rows(samples).double()  # (B, k)
        rest = 1 - top.exp().sum(-1, keepdim=True)  # (B, 1)
        invalid = (rest < -TOLERANCE).nonzero()
        if len(invalid):
            raise ModelError(
                f"the probabilities of sample {samples[int(invalid[0, 0])]} sum to "
                f"{1 - float(rest[invalid[0, 0], 0]):.4g}; expected at most 1"
            )
        return with_even_tail(torch.from_numpy(self.ids[samples]), top, self.classes)


def with_even_tail(ids: Tensor, log_probs: Tensor, classes: int) -> Tensor:
    """Log-probabilities (n, classes) float32 of rows of which k classes are known.

    Args:
        ids: (n, k) int64, distinct in each row.
        log_probs: (n, k) float64; what they leave of the mass of 1 is spread evenly over all other classes.
    """
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=0)
    tail = (rest / max(1, classes - ids.shape[1])).clamp(min=TINY).log()
    dense = tail.expand(-1, classes).clone()
    return dense.scatter(1, ids, log_probs.clamp(min=math.log(TINY))).float()


def open_matrix(spec: Spec, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Open the matrix in a file.

    Returns:
        The matrix as a module, and its provenance.

    Raises:
        SettingsError: there is no such file.
        ModelError: the file does not hold exactly one matrix.
    """
    if not spec.path.is_file():
        raise MissingFileError(f"teacher {spec.text}: no such file")
    provenance = {"parameters": 0, "sha256": file_sha256(spec.path)}
    return Matrix(read_matrix(spec.path)), provenance


def open_top_rows(spec: Spec, classes: int | None) -> tuple[Matrix, dict[str, Any]]:
    """Open the top classes of each sample in a Hugging Face dataset.

    Returns:
        The rows as a module, and their provenance.

    Raises:
        SettingsError: the columns or the number of classes are not named.
        DataError: the dataset cannot be loaded.
        ModelError: the columns are not k class ids and k log-probabilities in every row.
    """
    rows = read_top_rows(spec, classes)
    digest = hashlib.sha256(rows.ids.tobytes() + rows.values.tobytes()).hexdigest()
    return rows, {"parameters": 0, "sha256": digest}


def read_matrix(path: Path) -> npt.NDArray[Any]:
    """Read a matrix (N, C) of numbers, memory-mapped if it is .npy; no code in the file is run.

    Raises:
        ModelError: the file cannot be read, or does not hold exactly one matrix.
    """
    refuse_special_file(path, ModelError)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                array = _only_matrix({name: arrays[name] for name in arrays.files}, path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {"matrix": state} if isinstance(state, Tensor) else read_weights(path)
            array = _only_matrix({name: t.numpy() for name, t in tensors.items()}, path)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"teacher {path} holds more than tensors, which softcache never loads; "
            "save the matrix alone, preferably as .npy"
        ) from error
    except Exception as error:  # numpy and torch raise errors of many types for a broken file
        raise ModelError(
            f"teacher {path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    matrix: npt.NDArray[Any] = array
    if array.dtype == np.uint8 and array.ndim == 2:
        raise ModelError(
            f"teacher {path} holds unsigned 8-bit integers {array.shape}, which are neither logits nor "
            "probabilities; save the numbers that they stand for as float32"
        )
    # one column of floats is one output for two classes
    narrowest = 1 if array.dtype.kind == "f" else 2
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[1] < narrowest:
        raise ModelError(
            f"teacher {path} holds {array.dtype} {array.shape}; expected numbers (samples, classes), or "
            "(samples, 1) for one output for two classes"
        )
    return matrix


def read_top_rows(spec: Spec, classes: int | None) -> TopRows:
    """Read the columns of class ids and log-probabilities of a Hugging Face dataset, k per row.

    Args:
        classes: number of classes, which the columns do not tell.

    Raises:
        SettingsError: the number of classes is missing, or a column does not exist.
        DataError: the dataset cannot be loaded.
        ModelError: the rows do not all have k entries, or a class id is out of range or repeated.
    """
    if "ids" not in spec.options:
        raise SettingsError(
            f"teacher {spec.text} does not say where the top classes of each sample are; expected "
            "hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN"
        )
    if classes is None:
        raise SettingsError(
            f"teacher {spec.text} has only the top classes of each row; state the number of all classes with "
            "--classes"
        )
    table = load(spec.place, spec.split, spec.options.get("name"))
    columns = []
    for column in (spec.options["ids"], spec.options["log_probs"]):
        if column not in table.column_names:
            raise SettingsError(
                f"teacher {spec.text} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
        try:
            values = np.array(table.with_format("numpy")[column][:])
        except ValueError:  # rows of different lengths
            values = np.empty(0, object)
        if values.ndim != 2 or values.dtype.kind not in "iuf":
            raise ModelError(
                f"teacher {spec.text}: column {column!r} is {values.dtype} {values.shape}; "
                "expected k numbers in every row; lists for each token need data of tokens, such as ids:FILE"
            )
        columns.append(values)
    ids, log_probs = columns[0].astype(np.int64), columns[1].astype(np.float32)
    if ids.shape != log_probs.shape or ids.shape[1] > classes:
        raise ModelError(
            f"teacher {spec.text}: class ids {ids.shape} and log-probabilities {log_probs.shape} for "
            f"{classes} classes; expected equal shapes with at most {classes} columns"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= classes):
        raise ModelError(
            f"teacher {spec.text} has class ids {ids.min()} to {ids.max()}; expected 0 to {classes - 1}"
        )
    sorted_ids = np.sort(ids, axis=1)
    repeated = np.flatnonzero((sorted_ids[:, 1:] == sorted_ids[:, :-1]).any(1))
    if len(repeated):
        raise ModelError(
            f"teacher {spec.text} repeats a class id in row {repeated[0]}; expected distinct class ids"
        )
    return TopRows(ids, log_probs, classes)


def _only_matrix(arrays: dict[str, npt.NDArray[Any]], path: Path) -> npt.NDArray[Any]:
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    if len(matrices) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ModelError(
            f"teacher {path} holds {shapes}; expected exactly one matrix (samples, classes)"
        )
    return next(iter(matrices.values()))
