"""Programs saved by torch.export, FILE.pt2."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from softcache.errors import MissingModelError, ModelError
from softcache.models.exported_check import code_in
from softcache.util.messages import first_line
from softcache.util.spec import Spec


def build_exported(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Load the program in FILE.pt2; its input shape and classes are those it was exported with.

    A file that may run code of its own is loaded only if `spec` says that it is trusted.

    Raises:
        ModelError: there is no such file, it is not an exported program, or it may run code.
    """
    path = spec.path
    if not path.is_file():
        raise MissingModelError(f"model {path}: no such file")
    try:
        if spec.trusted:
            return ExportedModel(_module_of(torch.export.load(path)))
        checked = io.BytesIO()
        code = code_in(path, checked)
        if code is None:
            checked.seek(0)
            return ExportedModel(_module_of(torch.export.load(checked)))
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"model {path} is not an exported program: {first_line(error)}") from error
    raise ModelError(
        f"model {path} may run code of its own ({code}); if you trust where it comes from, add --trust-code"
    )


def _module_of(program: Any) -> nn.Module:  # noqa: ANN401  # a torch.export.ExportedProgram
    """The program as a module, without the guards that newer versions of torch run as Python code."""
    make: Any = program.module
    if "check_guards" in inspect.signature(make).parameters:
        return cast(nn.Module, make(check_guards=False))
    return cast(nn.Module, make())


class ExportedModel(nn.Module):
    """An exported program, which stays in the mode, train or eval, that it was exported in."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, inputs: Tensor) -> Tensor:
        return self.program(inputs)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> ExportedModel:
        """Accept any mode, where torch's own module raises."""
        self.training = mode
        return self
