"""Programs saved by torch.export, FILE.pt2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softcache.errors import MissingModelError, ModelError
from softcache.util.messages import first_line
from softcache.util.spec import Spec


def build_exported(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Load the program in FILE.pt2; its input shape and classes are those it was exported with.

    Raises:
        ModelError: there is no such file, or it is not an exported program.
    """
    path = spec.path
    if not path.is_file():
        raise MissingModelError(f"model {path}: no such file")
    try:
        return ExportedModel(torch.export.load(path).module())
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"model {path} is not an exported program: {first_line(error)}") from error


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
