"""Exported programs of torch, FILE.pt2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softcache.errors import MissingModelError, ModelError
from softcache.util.messages import first_line
from softcache.util.spec import Spec


def build_exported(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The program in FILE.pt2; shape and classes are as it was exported.

    Raises:
        ModelError: there is no such file, or it holds no exported program.
    """
    path = spec.path
    if not path.is_file():
        raise MissingModelError(f"model {path}: no such file")
    try:
        return ExportedModel(torch.export.load(path).module())
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"model {path} is no exported program: {first_line(error)}") from error


class ExportedModel(nn.Module):
    """An exported program; it was exported in train or eval mode and cannot change it."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, inputs: Tensor) -> Tensor:
        return self.program(inputs)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> ExportedModel:
        self.training = mode
        return self
