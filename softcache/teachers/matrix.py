"""Matrices of outputs that a teacher gave before, one row for each sample."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.huggingface import load
from softcache.errors import MissingFileError, ModelError, SettingsError
from softcache.models.weights import file_sha256, read_weights
from softcache.teachers.outputs import TINY, TOLERANCE
from softcache.util.spec import Spec


class Matrix(nn.Module):
    """What a teacher said of every sample, (N, C); it is not asked about inputs."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        super().__init__()
        self.values = values

    def rows(self, samples: npt.NDArray[np.int64]) -> Tensor:
        """The rows of samples (B,), (B, C) float32.

        Raises:
            ModelError: there are fewer.
        """
        if len(samples) and int(samples.max()) >= len(self.values):
            raise ModelError(
                f"the matrix has {len(self.values):,} rows, and sample {int(samples.max())} is asked for; "
                "expected a row for each sample of the data, in its order"
            )
        return torch.from_numpy(np.asarray(self.values[samples], np.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        raise ModelError("a matrix knows the samples of its data alone; leave --eval-data out")


class TopRows(Matrix):
    """The k largest log-probabilities of every sample; what they leave is spread over the other classes."""

    def __init__(
        self, ids: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32], classes: int
    ) -> None:
        super().__init__(log_probs)
        self.ids, self.classes = ids, classes

    def rows(self, samples: npt.NDArray[np.int64]) -> Tensor:
        """The rows of samples (B,), (B, C) float32 log-probabilities."""
        top = super().rows(samples).double()  # (B, k)
        others = self.classes - top.shape[1]
        rest = 1 - top.exp().sum(-1, keepdim=True)  # (B, 1)
        wrong = (rest < -TOLERANCE).nonzero()
        if len(wrong):
            raise ModelError(
                f"the log-probabilities of sample {samples[int(wrong[0, 0])]} come to a sum of "
                f"{1 - float(rest[wrong[0, 0], 0]):.4g}; expected at most 1"
            )
        even = (rest.clamp(min=0) / max(1, others)).clamp(min=TINY).log()
        dense = even.expand(-1, self.classes).clone()
        return dense.scatter(1, torch.from_numpy(self.ids[samples]), top).float()


def open_matrix(spec: Spec, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The matrix in a file, and its provenance."""
    if not spec.path.is_file():
        raise MissingFileError(f"teacher {spec.text}: no such file")
    provenance = {"parameters": 0, "sha256": file_sha256(spec.path)}
    return Matrix(read_matrix(spec.path)), provenance


def open_top_rows(spec: Spec, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The top classes of each row in a Hugging Face dataset, and their provenance."""
    rows = read_top_rows(spec, classes)
    digest = hashlib.sha256(rows.ids.tobytes() + rows.values.tobytes()).hexdigest()
    return rows, {"parameters": 0, "sha256": digest}


def read_matrix(path: Path) -> npt.NDArray[Any]:
    """A matrix (N, C) of numbers, mapped where the format allows it; nothing in it is run.

    Raises:
        ModelError: the file holds no matrix, or several.
    """
    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = _only_one({name: arrays[name] for name in arrays.files}, path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {"it": state} if isinstance(state, Tensor) else read_weights(path)
            found = _only_one({name: t.numpy() for name, t in tensors.items()}, path)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"teacher {path} holds more than tensors, which is never loaded; "
            "save the matrix alone, best as .npy"
        ) from error
    except Exception as error:  # numpy and torch raise many kinds for a broken file
        raise ModelError(
            f"teacher {path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    matrix: npt.NDArray[Any] = found
    if found.ndim != 2 or found.dtype.kind not in "fiu" or found.shape[1] < 2:
        raise ModelError(
            f"teacher {path} holds {found.dtype} {found.shape}; expected numbers (samples, classes)"
        )
    return matrix


def read_top_rows(spec: Spec, classes: int | None) -> TopRows:
    """Columns of class ids and log-probabilities of a Hugging Face data set, k of each in every row.

    Raises:
        SettingsError: the columns or the number of classes are not named.
        ModelError: the rows are not all of k, an id is no class, or stands there twice.
    """
    if classes is None:
        raise SettingsError(f"teacher {spec.text} holds some classes of each row; add --classes")
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
                "expected k numbers in every row. Lists of lists, as of the tokens of a text, are not "
                "classes of a sample"
            )
        columns.append(values)
    ids, log_probs = columns[0].astype(np.int64), columns[1].astype(np.float32)
    if ids.shape != log_probs.shape or ids.shape[1] > classes:
        raise ModelError(
            f"teacher {spec.text}: ids {ids.shape} and log-probabilities {log_probs.shape} of {classes} "
            "classes; expected as many of each, and no more than classes"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= classes):
        raise ModelError(
            f"teacher {spec.text} has class id {ids.max()}; expected 0 to {classes - 1}"
        )
    ordered = np.sort(ids, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    if len(twice):
        raise ModelError(
            f"teacher {spec.text} names a class twice in row {twice[0]}; expected each once"
        )
    return TopRows(ids, log_probs, classes)


def _only_one(arrays: dict[str, npt.NDArray[Any]], path: Path) -> npt.NDArray[Any]:
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    if len(matrices) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ModelError(f"teacher {path} holds {shapes}; expected one matrix (samples, classes)")
    return next(iter(matrices.values()))
