"""Build a teacher from its specification, load its weights, and try it on one sample."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from softcache.data.rows import TOKEN
from softcache.data.spec import named_classes
from softcache.errors import ModelError, SettingsError
from softcache.models.build import of_tokens
from softcache.models.code import call_code, call_object, import_object
from softcache.models.normalize import normalized, unnormalized
from softcache.models.spec import BUILT_IN, HUB, is_pretrained
from softcache.models.spec import KINDS as MODEL_KINDS
from softcache.models.weights import load_weights, parameter_count, read_weights, state_sha256
from softcache.teachers.matrix import Matrix
from softcache.teachers.numpy_function import NumpyTeacher, estimator_teacher, is_estimator
from softcache.teachers.select_classes import parse_classes, select_classes
from softcache.teachers.server import Server
from softcache.teachers.server_options import SERVER
from softcache.teachers.spec import KINDS, parse_teacher
from softcache.teachers.teacher import Teacher
from softcache.types import RowIndex
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
    select: str | None = None,
    text: bool = False,
    trust_code: bool = False,
    multi_label: bool = False,
    unit: str | None = None,
) -> Teacher:
    """Build the teacher, load its weights, and try it on one sample.

    Args:
        sample: (1, *shape) float; its shape is the input shape of built-in architectures.
        classes: number of classes of the data, for a teacher that does not name its own; None to take the
            width of the teacher's output.
        precision: precision of the forward pass, one of PRECISIONS.
        compiled: run the model through torch.compile.
        output: what the model returns, one of OUTPUTS; an estimator with predict_proba() returns
            probabilities in any case.
        softened: temperature at which the model's output was already softened.
        select: which of the teacher's classes are those of the data, as parse_classes() reads them; None
            for all.
        text: whether the samples are texts; a user's function then gets a list of them.
        trust_code: load a .pt2 file even if it may run code.
        multi_label: whether each class applies or not on its own.
        unit: what a row of the data is, if its samples have many.

    Raises:
        SettingsError: the specification is unknown, a built-in architecture has no weights, the
            device does not support the precision, or `select` does not fit.
        ModelError: the model cannot be built, its weights do not fit, or its output is wrong.
    """
    if precision == "tf32" and device.type != "cuda":
        raise SettingsError(
            f"precision tf32 needs a CUDA GPU, but the device is {device}; use fp32 or bf16"
        )
    named = parse_teacher(spec)
    stated = named_classes(named.options, spec)
    # no handler knows the option
    options = {name: value for name, value in named.options.items() if name != "classes"}
    parsed = dataclasses.replace(
        named, options=options, trusted=trust_code, task=unit, teacher=True
    )
    built_in = parsed.kind in BUILT_IN
    if (built_in or not is_pretrained(parsed)) and weights is None:
        raise SettingsError(
            f"teacher {spec} would be untrained; name its weights file with --weights"
        )
    if select and parsed.kind in ("hfds", "tokens", SERVER):
        raise SettingsError(
            f"teacher {spec} has only the top classes of each row, of which none can be chosen; leave "
            "--teacher-classes out"
        )
    width = None if select else len(stated) or classes
    if built_in and weights is not None:
        width = width or _width_of(weights)
    facts: dict[str, Any]
    if parsed.kind in KINDS:
        if weights is not None:
            raise SettingsError(f"teacher {spec} contains its weights; leave --weights out")
        model, facts = KINDS[parsed.kind].load()(parsed, len(stated) or classes)
        model = normalized(model, parsed, sample.shape[1:])
    else:
        model = build_teacher(parsed, input_shape=sample.shape[1:], classes=width, text=text)
        if weights is not None:
            load_weights(model, weights)
        model = of_tokens(model, unit, width)
        facts = {"parameters": parameter_count(model), "sha256": state_sha256(model)}
    names = getattr(model, "class_names", ())
    if names and not select:
        width = len(names)  # the data may have only some of them
    width = None if stated else width  # compared below, where the message says what is wrong
    inner = unnormalized(model)
    if isinstance(inner, NumpyTeacher):
        output = inner.output or output
    model = model.to(device).eval()
    provenance = {
        "name": named.public_name,
        "weights": weights.name if weights else None,
        **facts,
        **({} if output == "logits" else {"output": output}),
        **({} if softened == 1 else {"temperature": float(softened)}),
    }
    if compiled:
        model.compile()
    teacher = Teacher(
        spec, model, width, device, precision, provenance, output, softened, stated, multi_label
    )
    teacher, output_width = tried(teacher, sample, unit)
    if output_width < 2:
        raise ModelError(
            f"teacher {spec} returns outputs of width {output_width}; expected at least 2 classes"
        )
    if stated and len(stated) != output_width:
        raise SettingsError(
            f"teacher {spec}: classes= has {len(stated)} names, and its output has {output_width} columns; "
            "name each column, in order"
        )
    teacher = dataclasses.replace(teacher, classes=output_width)
    if not select:
        return teacher
    columns = parse_classes(select, teacher.class_names, output_width)
    if classes and len(columns) != classes:
        raise SettingsError(
            f"--teacher-classes lists {len(columns)} classes of teacher {spec}, the data has {classes}; "
            "list one for each class of the data, in its order"
        )
    return select_classes(teacher, columns)


def tried(teacher: Teacher, sample: Tensor, unit: str | None) -> tuple[Teacher, int]:
    """The teacher with the number of positions of its output for a sample (1, *shape), and its classes.

    Raises:
        ModelError: its output is wrong, or it returns one row for a sample of many.
    """
    if unit is None:
        try:
            return teacher, teacher.logits(sample).shape[1]
        except ModelError as error:
            if _positions(teacher, sample) < 2:  # an axis of 1 is one that was added by mistake
                raise error from error.__cause__
    if isinstance(teacher.model, Matrix):  # its rows are compared with those of the data later
        width = teacher.model.rows(np.zeros(1, np.int64)).shape[1]
        return dataclasses.replace(teacher, positions=1), width
    if isinstance(teacher.model, Server):
        teacher.model.try_out(sample)
        return dataclasses.replace(teacher, positions=sample.shape[1]), teacher.model.classes
    shape = teacher.output_shape(sample)
    if len(shape) not in (3, 4):
        raise ModelError(
            f"teacher {teacher.spec} returns shape {shape} for one sample, and the data has a row for each "
            f"{unit}; expected logits of shape (1, positions, classes)"
        )
    positions = shape[1] if len(shape) == 3 else int(sample.shape[-2] * sample.shape[-1])
    teacher = dataclasses.replace(teacher, positions=positions)
    first = RowIndex(*torch.zeros((2, 1), dtype=torch.int64))
    return teacher, next(teacher.row_logits(sample, first)).shape[1]


def _positions(teacher: Teacher, sample: Tensor) -> int:
    """How many positions the teacher's output has for a sample; 0 if it is not one of many rows."""
    try:
        shape = teacher.output_shape(sample)
    except Exception:  # what is wrong was said already
        return 0
    if len(shape) == 3:
        return shape[1]
    return shape[2] * shape[3] if len(shape) == 4 else 0


def build_teacher(
    spec: Spec, *, input_shape: Sequence[int], classes: int | None, text: bool = False
) -> nn.Module:
    """Build the model that `spec` names; a user's code may also hold an estimator or a numpy function.

    Args:
        input_shape: shape of one input, without the batch axis.
        classes: number of outputs of a model without pretrained ones; None if it is not known.
        text: whether the samples are texts, of which a function or an estimator gets a list.

    Raises:
        SettingsError: the callable cannot be imported, or an option is invalid.
        ModelError: the model cannot be built, or the callable returns neither a module nor an estimator nor
            a function.
    """
    if spec.kind == CODE:
        return normalized(_from_code(spec, text=text), spec, input_shape)
    pretrained = spec.kind in HUB and is_pretrained(spec)  # keeps the outputs it was trained with
    outputs = None if pretrained and spec.task != TOKEN else classes or 2
    if spec.task == TOKEN:
        outputs = classes  # the tokens of the data, without the padding of the vocabulary
    model = cast(nn.Module, MODEL_KINDS[spec.kind].load()(spec, input_shape, outputs))
    return normalized(model, spec, input_shape)


def _from_code(spec: Spec, *, text: bool) -> nn.Module:
    """The user's module, or a module of their estimator or numpy function."""
    model = import_object(spec)
    if not is_estimator(model):
        model = call_object(model, spec) if callable(model) else call_code(spec)
    if isinstance(model, nn.Module):
        return model
    if is_estimator(model):
        return estimator_teacher(model, spec.text, text=text)
    if callable(model):
        return NumpyTeacher(model, text=text)
    raise ModelError(
        f"model {spec.text} returned {type(model).__name__}; expected a torch nn.Module, or a function "
        "from numpy inputs (B, ...) to (B, classes), or an estimator with predict_proba"
    )


def _width_of(weights: Path) -> int:
    """The number of classes of a built-in architecture: the number of rows of its last matrix."""
    matrices = {name: len(t) for name, t in read_weights(weights).items() if t.ndim == 2}
    if not matrices:
        raise ModelError(f"weights {weights} have no matrix; expected the weights of a classifier")
    # a file may sort names as text, 13.weight before 9.weight
    return matrices[max(matrices, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
