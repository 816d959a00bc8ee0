"""A teacher from its specification: built, loaded, and tried on one sample."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.build import build, build_hub
from softcache.models.spec import is_hub, is_random, public_name
from softcache.models.weights import (
    file_sha256,
    load_weights,
    parameter_count,
    read_weights,
    state_sha256,
)
from softcache.teachers.matrix import (
    Matrix,
    is_matrix,
    open_top_rows,
    public_rows_name,
    read_matrix,
)
from softcache.teachers.numpy_function import NumpyTeacher
from softcache.teachers.onnx_file import open_onnx
from softcache.teachers.teacher import Teacher
from softcache.util.callables import call_user, import_callable

BUILT_IN = ("mlp:", "cnn:", "resnet:")


def load_teacher(
    spec: str,
    weights: Path | None,
    *,
    sample: Tensor,
    classes: int | None,
    device: torch.device,
    precision: str,
    compiled: bool = False,
    output: str = "logits",
    softened: float = 1.0,
) -> Teacher:
    """Build the teacher, load its weights, and try it on one sample.

    Args:
        sample: (1, *shape) float, tells the built-in architectures their input's shape.
        classes: how many are declared; None to take what the teacher gives.
        output: what it gives, of OUTPUTS.
        softened: the temperature at which that was softened.

    Raises:
        SettingsError: an unknown specification, a built-in architecture without weights, or a
            precision that the device has not.
        ModelError: it cannot be built, its weights do not fit, or its output is wrong.
    """
    if precision == "tf32" and device.type != "cuda":
        raise SettingsError(f"precision tf32 needs a GPU; {device} has none, use fp32 or bf16")
    if (spec.startswith(BUILT_IN) or is_random(spec)) and weights is None:
        raise SettingsError(f"teacher {spec} would be untrained; name its --weights")
    width = classes
    if spec.startswith(BUILT_IN) and weights is not None:
        width = width or _width_of(weights)
    facts: dict[str, Any]
    if is_other(spec):
        if weights is not None:
            raise SettingsError(f"teacher {spec} has its weights in it; leave --weights out")
        model, facts = open_other(spec, classes)
    else:
        model = build_teacher(spec, input_shape=sample.shape[1:], classes=width)
        if weights is not None:
            load_weights(model, weights)
        facts = {"parameters": parameter_count(model), "sha256": state_sha256(model)}
    model = model.to(device).eval()
    provenance = {
        "name": public_rows_name(spec) if spec.startswith("hfds:") else public_name(spec),
        "weights": weights.name if weights else None,
        **facts,
        **({} if output == "logits" else {"output": output}),
        **({} if softened == 1 else {"temperature": float(softened)}),
    }
    if compiled:
        model.compile()
    teacher = Teacher(spec, model, width, device, precision, provenance, output, softened)
    found = teacher.logits(sample).shape[1]
    if found < 2:
        raise ModelError(f"teacher {spec} gives {found} class; expected 2 or more")
    return dataclasses.replace(teacher, classes=found)


def build_teacher(spec: str, *, input_shape: Sequence[int], classes: int | None) -> nn.Module:
    """The model that `spec` names; a callable of the user's own may also return a function of numpy."""
    if is_hub(spec):
        return build_hub(spec, classes if is_random(spec) else None)
    if ":" in spec and not spec.startswith(BUILT_IN):
        found = call_user(import_callable(spec, what="model"), what=f"model {spec}")
        if callable(found) and not isinstance(found, nn.Module):
            return NumpyTeacher(found)
        if isinstance(found, nn.Module):
            return found
        raise ModelError(
            f"model {spec} returned {type(found).__name__}; expected a torch nn.Module, or a function "
            "from numpy inputs (B, ...) to (B, classes)"
        )
    return build(spec, input_shape=input_shape, classes=classes or 2)


def _width_of(weights: Path) -> int:
    """Rows of the last matrix, which is the number of classes of a built-in architecture."""
    matrices = {name: len(t) for name, t in read_weights(weights).items() if t.ndim == 2}
    if not matrices:
        raise ModelError(f"weights {weights} hold no matrix, so not those of a classifier")
    # files may order names as text, 13.weight before 9.weight
    return matrices[max(matrices, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]


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
        model, parameters = open_onnx(path)
    else:
        model, parameters = Matrix(read_matrix(path)), 0
    return model, {"parameters": parameters, "sha256": file_sha256(path)}
