"""ONNX files as teachers (softcache[onnx])."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from softcache.errors import MissingFileError, ModelError
from softcache.models.weights import file_sha256
from softcache.teachers.numpy_function import NumpyTeacher
from softcache.util.extras import import_extra
from softcache.util.spec import Spec


def open_onnx(spec: Spec, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Open an ONNX file; of several outputs, the first one with floats is used.

    A converted classifier of scikit-learn returns its labels before its probabilities.

    Returns:
        The model as a module, and its provenance.

    Raises:
        SettingsError: there is no such file, or the onnx extra is not installed.
        ModelError: onnxruntime cannot open the file, or the model does not take exactly one input.
    """
    path = spec.path
    if not path.is_file():
        raise MissingFileError(f"teacher {spec.text}: no such file")
    runtime = import_extra("onnxruntime", extra="onnx", what="an ONNX teacher")
    onnx = import_extra("onnx", extra="onnx", what="an ONNX teacher")
    try:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(
            str(path), options, providers=runtime.get_available_providers()
        )
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # both libraries raise errors of many types
        raise ModelError(
            f"teacher {path} is not an ONNX model that onnxruntime can open: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise ModelError(
            f"teacher {path} takes {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); expected "
            "exactly one"
        )
    floats = [
        o for o in outputs if o.type in ("tensor(float)", "tensor(double)", "tensor(float16)")
    ]
    name, output = inputs[0].name, [*floats, *outputs][0].name
    types = onnx.TensorProto
    # constants of other types are shapes and axes, not parameters
    float_types = {types.FLOAT, types.FLOAT16, types.DOUBLE, types.BFLOAT16}
    parameters = sum(
        int(np.prod(weight.dims)) for weight in graph.initializer if weight.data_type in float_types
    )
    provenance = {"parameters": parameters, "sha256": file_sha256(path)}
    return NumpyTeacher(lambda batch: session.run([output], {name: batch})[0]), provenance
