"""The teacher: loaded for a dump, checked at every batch, named in the header."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models import build, load_weights, parameter_count, public_name

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BUILT_IN = ("mlp:", "cnn:", "resnet:")


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that gives checked logits."""

    spec: str
    model: nn.Module
    classes: int
    device: torch.device
    precision: str
    provenance: dict[str, Any]

    def logits(self, inputs: Tensor, first_sample: int = 0) -> Tensor:
        """Logits (B, C) float32 of float inputs (B, *shape), on the teacher's device.

        Args:
            first_sample: the number of the batch's first sample, for messages.

        Raises:
            ModelError: the teacher raises, or its output is not finite logits (B, C).
        """
        samples = f"samples {first_sample} to {first_sample + len(inputs) - 1}"
        try:
            with torch.inference_mode(), self._autocast():
                logits = self.model(inputs.to(self.device))
        except Exception as error:  # a user's model may fail in any way
            raise ModelError(
                f"teacher {self.spec} raised {type(error).__name__} on {samples}, inputs "
                f"{tuple(inputs.shape)} of {inputs.dtype}: {' '.join(str(error).split())}"
            ) from error
        return self._checked(logits, len(inputs), samples, first_sample)

    def _checked(self, logits: object, batch: int, samples: str, first_sample: int) -> Tensor:
        expected = f"expected a tensor of logits of shape ({batch}, {self.classes})"
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"teacher {self.spec} returns {type(logits).__name__} for {samples}; {expected}: "
                "wrap it in a callable that returns the logits alone"
            )
        if logits.shape != (batch, self.classes):
            raise ModelError(
                f"teacher {self.spec} returns shape {tuple(logits.shape)} for {samples}; {expected}"
            )
        logits = logits.float()
        if not bool(logits.isfinite().all()):
            row = int((~logits.isfinite()).any(-1).nonzero()[0, 0])
            column = int((~logits[row].isfinite()).nonzero()[0, 0])
            raise ModelError(
                f"teacher {self.spec} returns {logits[row, column].item()} for sample "
                f"{first_sample + row}, class {column}; expected finite logits (in fp16, bf16 or "
                "fp32 may help)"
            )
        return logits

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def load_teacher(
    spec: str,
    weights: Path | None,
    *,
    sample: Tensor,
    classes: int | None,
    device: torch.device,
    precision: str,
) -> Teacher:
    """Build the teacher, load its weights, and try it on one sample.

    Args:
        sample: (1, *shape) float, tells the built-in architectures their input's shape.
        classes: how many are declared; None to take what the teacher gives.

    Raises:
        SettingsError: an unknown specification, or a built-in architecture without weights.
        ModelError: it cannot be built, its weights do not fit, or its output is wrong.
    """
    if spec.startswith(BUILT_IN) and weights is None:
        raise SettingsError(f"teacher {spec} would be untrained; name its --weights")
    width = classes
    if spec.startswith(BUILT_IN) and weights is not None:
        width = width or _width_of(weights)
    model = build(spec, input_shape=sample.shape[1:], classes=width or 2)
    if weights is not None:
        load_weights(model, weights)
    model = model.to(device).eval()
    provenance = {
        "name": public_name(spec),
        "weights": weights.name if weights else None,
        "parameters": parameter_count(model),
        "sha256": state_sha256(model),
    }
    teacher = Teacher(spec, model, width or 0, device, precision, provenance)
    if not width:
        with torch.inference_mode():
            output = model(sample.to(device))
        found = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 2 else 0
        teacher = Teacher(spec, model, found, device, precision, provenance)
    teacher.logits(sample)
    return teacher


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _width_of(weights: Path) -> int:
    """Rows of the last matrix, which is the number of classes of a built-in architecture."""
    from softcache.models import read_weights

    widths = [len(tensor) for tensor in read_weights(weights).values() if tensor.ndim == 2]
    return widths[-1] if widths else 2
