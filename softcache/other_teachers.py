"""Teachers that are no torch modules: ONNX files, functions of numpy arrays, matrices of what one said.

FILE.onnx              through onnxruntime (softcache[onnx])
FILE.py:CALLABLE       returns a function: numpy (B, *shape) float32 -> (B, C)
FILE.npy, .npz, .pt    a row for each sample of the data, in its order
hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN     the largest log-probabilities of each sample
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.huggingface import load
from softcache.errors import ModelError, SettingsError
from softcache.models.weights import file_sha256, read_weights
from softcache.util.extras import import_extra
from softcache.util.spec import public_place, query_of, split_options

OUTPUTS = ("logits", "probabilities", "log_probabilities")
MATRICES = (".npy", ".npz", ".pt")
TINY = 1e-38  # what a probability of 0 counts as: its logarithm is finite in float32
FLAGS = "--teacher-output (of softcache import: --holds)"
TOLERANCE = 0.01  # of a sum of probabilities


class NumpyTeacher(nn.Module):
    """A function of numpy arrays as a module."""

    def __init__(self, function: Callable[[npt.NDArray[np.float32]], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *shape) float32 to what the function gives, (B, C)."""
        found = self.function(inputs.float().cpu().numpy())
        return torch.as_tensor(np.asarray(found, np.float32)).to(inputs.device)


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


def public_rows_name(spec: str) -> str:
    """The specification of hfds: without folders."""
    where, mark, split = spec.removeprefix("hfds:").rpartition("@")
    place, options = split_options(where or split)
    return f"hfds:{public_place(place)}{query_of(options)}{mark}{split if where else ''}"


def is_matrix(spec: str) -> bool:
    """Whether a specification names rows that were computed before."""
    return spec.endswith(MATRICES) or spec.startswith("hfds:")


def is_other(spec: str) -> bool:
    """Whether the specification names a file of one of these kinds."""
    return spec.endswith(".onnx") or is_matrix(spec)


def open_other(spec: str, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher of a file, and what its provenance says of its size and content.

    Args:
        classes: how many there are, for rows that hold only some.

    Raises:
        SettingsError: no such file, or an extra is not there.
        ModelError: it is not what its name says.
    """
    if spec.startswith("hfds:"):
        rows = open_top_rows(spec, classes)
        digest = hashlib.sha256(rows.ids.tobytes() + rows.values.tobytes()).hexdigest()
        return rows, {"parameters": 0, "sha256": digest}
    path = Path(spec)
    if not path.is_file():
        raise SettingsError(f"teacher {spec}: no such file")
    if path.suffix == ".onnx":
        model, parameters = _open_onnx(path)
    else:
        model, parameters = Matrix(read_matrix(path)), 0
    return model, {"parameters": parameters, "sha256": file_sha256(path)}


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


def open_top_rows(spec: str, classes: int | None) -> TopRows:
    """Columns of class ids and log-probabilities of a Hugging Face data set, k of each in every row.

    Raises:
        SettingsError: the columns or the number of classes are not named.
        ModelError: the rows are not all of k, an id is no class, or stands there twice.
    """
    where, _, split = spec.removeprefix("hfds:").rpartition("@")
    place, options = split_options(where or split)
    if set(options) - {"ids", "log_probs", "name"} or not {"ids", "log_probs"} <= set(options):
        raise SettingsError(
            f"teacher {spec}: expected hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN@SPLIT"
        )
    if classes is None:
        raise SettingsError(f"teacher {spec} holds some classes of each row; add --classes")
    table = load(place, split if where else "", options.get("name"))
    columns = []
    for column in (options["ids"], options["log_probs"]):
        if column not in table.column_names:
            raise SettingsError(
                f"teacher {spec} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
        try:
            values = np.array(table.with_format("numpy")[column][:])
        except ValueError:  # rows of different lengths
            values = np.empty(0, object)
        if values.ndim != 2 or values.dtype.kind not in "iuf":
            raise ModelError(
                f"teacher {spec}: column {column!r} is {values.dtype} {values.shape}; expected k numbers in "
                "every row. Lists of lists, as of the tokens of a text, are not classes of a sample"
            )
        columns.append(values)
    ids, log_probs = columns[0].astype(np.int64), columns[1].astype(np.float32)
    if ids.shape != log_probs.shape or ids.shape[1] > classes:
        raise ModelError(
            f"teacher {spec}: ids {ids.shape} and log-probabilities {log_probs.shape} of {classes} classes; "
            "expected as many of each, and no more than classes"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= classes):
        raise ModelError(f"teacher {spec} has class id {ids.max()}; expected 0 to {classes - 1}")
    ordered = np.sort(ids, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    if len(twice):
        raise ModelError(
            f"teacher {spec} names a class twice in row {twice[0]}; expected each once"
        )
    return TopRows(ids, log_probs, classes)


def _only_one(arrays: dict[str, npt.NDArray[Any]], path: Path) -> npt.NDArray[Any]:
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    if len(matrices) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ModelError(f"teacher {path} holds {shapes}; expected one matrix (samples, classes)")
    return next(iter(matrices.values()))


def _open_onnx(path: Path) -> tuple[nn.Module, int]:
    runtime = import_extra("onnxruntime", extra="onnx", what="an ONNX teacher")
    onnx = import_extra("onnx", extra="onnx", what="an ONNX teacher")
    try:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(
            str(path), options, providers=runtime.get_available_providers()
        )
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # both raise many kinds
        raise ModelError(
            f"teacher {path} is no ONNX model that onnxruntime opens: {' '.join(str(error).split())[:300]}"
        ) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise ModelError(
            f"teacher {path} takes {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); expected one"
        )
    name, output = inputs[0].name, outputs[0].name
    kinds = onnx.TensorProto
    numbers = {kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16}  # others are shapes
    parameters = sum(
        int(np.prod(weight.dims)) for weight in graph.initializer if weight.data_type in numbers
    )
    return NumpyTeacher(lambda batch: session.run([output], {name: batch})[0]), parameters


def _are_probabilities(said: Tensor) -> bool:
    """Whether so many rows are distributions that they cannot be logits which happen to look so."""
    if len(said) < 8 or said.shape[1] < 2 or bool((said < 0).any()):
        return False
    return bool(((said.sum(-1) - 1).abs() <= 1e-4).all())


def as_logits(said: Tensor, output: str, who: str) -> Tensor:
    """What a teacher gives, (B, C), as logits at T = 1.

    Raises:
        ModelError: it is not what `output` says, or probabilities under the name of logits.
    """
    if output == "logits":
        if _are_probabilities(said):
            raise ModelError(
                f"teacher {who} gives rows that are not negative and sum to 1: probabilities, not logits, "
                f"and a softmax of them would flatten every target; say {FLAGS} probabilities"
            )
        return said
    sums = said.sum(-1) if output == "probabilities" else said.logsumexp(-1).exp()
    wrong = ~((sums - 1).abs() <= TOLERANCE)
    if output == "probabilities":
        wrong |= (said < 0).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ModelError(
            f"teacher {who} gives a row that is no {output.replace('_', '-')}: its sum is "
            f"{float(sums[row]):.4g}, its least value {float(said[row].min()):.4g}; "
            f"say what it gives with {FLAGS}"
        )
    if output == "probabilities":
        return said.clamp(min=TINY).log()
    return said.clamp(min=float(np.log(TINY)))
