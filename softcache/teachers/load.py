"""A teacher from its specification: built, loaded, and tried on one sample."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.code import call_code
from softcache.models.spec import BUILT_IN, HUB, is_pretrained
from softcache.models.spec import KINDS as MODEL_KINDS
from softcache.models.weights import load_weights, parameter_count, read_weights, state_sha256
from softcache.teachers.numpy_function import NumpyTeacher
from softcache.teachers.spec import KINDS, parse_teacher
from softcache.teachers.teacher import Teacher
from softcache.util.spec import CODE, Spec


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
    parsed = parse_teacher(spec)
    built_in = parsed.kind in BUILT_IN
    if (built_in or not is_pretrained(parsed)) and weights is None:
        raise SettingsError(f"teacher {spec} would be untrained; name its --weights")
    width = classes
    if built_in and weights is not None:
        width = width or _width_of(weights)
    facts: dict[str, Any]
    if parsed.kind in KINDS:
        if weights is not None:
            raise SettingsError(f"teacher {spec} has its weights in it; leave --weights out")
        model, facts = KINDS[parsed.kind].load()(parsed, classes)
    else:
        model = build_teacher(parsed, input_shape=sample.shape[1:], classes=width)
        if weights is not None:
            load_weights(model, weights)
        facts = {"parameters": parameter_count(model), "sha256": state_sha256(model)}
    model = model.to(device).eval()
    provenance = {
        "name": parsed.public_name,
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


def build_teacher(spec: Spec, *, input_shape: Sequence[int], classes: int | None) -> nn.Module:
    """The model that `spec` names; a callable of the user's own may also return a numpy function."""
    if spec.kind == CODE:
        model = call_code(spec)
        if isinstance(model, nn.Module):
            return model
        if callable(model):
            return NumpyTeacher(model)
        raise ModelError(
            f"model {spec.text} returned {type(model).__name__}; expected a torch nn.Module, or a function "
            "from numpy inputs (B, ...) to (B, classes)"
        )
    trained = spec.kind in HUB and is_pretrained(spec)  # it keeps all its outputs
    outputs = None if trained else classes or 2
    model = MODEL_KINDS[spec.kind].load()(spec, input_shape, outputs)
    return cast(nn.Module, model)


def _width_of(weights: Path) -> int:
    """Rows of the last matrix, which is the number of classes of a built-in architecture."""
    matrices = {name: len(t) for name, t in read_weights(weights).items() if t.ndim == 2}
    if not matrices:
        raise ModelError(f"weights {weights} hold no matrix, so not those of a classifier")
    # files may order names as text, 13.weight before 9.weight
    return matrices[max(matrices, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
