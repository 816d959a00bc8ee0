"""Teachers that are no torch modules: ONNX files, functions of numpy arrays, matrices of what one said.

FILE.onnx              through onnxruntime (softcache[onnx])
FILE.py:CALLABLE       returns a function: numpy (B, *shape) float32 -> (B, C)
FILE.npy, .npz, .pt    a row for each sample of the data, in its order
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.imports import needed
from softcache.models import file_sha256, read_weights

OUTPUTS = ("logits", "probabilities", "log_probabilities")
MATRICES = (".npy", ".npz", ".pt")
TINY = 1e-38  # what a probability of 0 counts as: its logarithm is finite in float32
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


def is_other(spec: str) -> bool:
    """Whether the specification names a file of one of these kinds."""
    return spec.endswith((".onnx", *MATRICES))


def open_other(spec: str) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher of a file, and what its provenance says of its size and content.

    Raises:
        SettingsError: no such file, or the extra softcache[onnx] is not there.
        ModelError: it is not what its name says.
    """
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


def _only_one(arrays: dict[str, npt.NDArray[Any]], path: Path) -> npt.NDArray[Any]:
    matrices = {name: array for name, array in arrays.items() if array.ndim == 2}
    if len(matrices) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ModelError(f"teacher {path} holds {shapes}; expected one matrix (samples, classes)")
    return next(iter(matrices.values()))


def _open_onnx(path: Path) -> tuple[nn.Module, int]:
    runtime = needed("onnxruntime", extra="onnx", what="an ONNX teacher")
    onnx = needed("onnx", extra="onnx", what="an ONNX teacher")
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


def as_logits(said: Tensor, output: str, who: str) -> Tensor:
    """What a teacher gives, (B, C), as logits at T = 1.

    Raises:
        ModelError: it is not what `output` says.
    """
    if output == "logits":
        return said
    sums = said.sum(-1) if output == "probabilities" else said.logsumexp(-1).exp()
    wrong = ~((sums - 1).abs() <= TOLERANCE)
    if output == "probabilities":
        wrong |= (said < 0).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ModelError(
            f"teacher {who} gives a row that is no {output.replace('_', '-')}: its sum is "
            f"{float(sums[row]):.4g}, its least value {float(said[row].min()):.4g}; say what it gives with "
            "--teacher-output"
        )
    if output == "probabilities":
        return said.clamp(min=TINY).log()
    return said.clamp(min=float(np.log(TINY)))
