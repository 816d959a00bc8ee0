"""One teacher: a model in eval mode whose outputs are checked at every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.errors import ModelError
from softcache.teachers.matrix import Matrix
from softcache.teachers.outputs import as_logits

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that gives checked logits."""

    spec: str
    model: nn.Module
    classes: int | None  # None: whatever it gives
    device: torch.device
    precision: str
    provenance: dict[str, Any]
    output: str = "logits"  # what the model gives, of OUTPUTS
    softened: float = 1.0  # the temperature at which that was softened

    def logits(self, inputs: Tensor, samples: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Logits (B, C) float32 of float inputs (B, *shape), on the teacher's device.

        Args:
            samples: (B,) the numbers of the samples, for messages.

        Raises:
            ModelError: the teacher raises, or its output is not finite logits (B, C).
        """
        numbers = np.arange(len(inputs)) if samples is None else samples
        which = f"samples {numbers[0]} to {numbers[-1]}"
        try:
            if isinstance(self.model, Matrix):
                logits: Any = self.model.rows(numbers).to(self.device)
            else:
                with torch.inference_mode(), self._autocast():
                    logits = self._run(inputs.to(self.device))
        except Exception as error:  # a user's model may fail in any way
            raise ModelError(
                f"teacher {self.spec} raised {type(error).__name__} on {which}, inputs "
                f"{tuple(inputs.shape)} of {inputs.dtype}: {' '.join(str(error).split())}"
            ) from error
        return self._checked(logits, len(inputs), which, numbers)

    def _run(self, inputs: Tensor) -> Any:  # noqa: ANN401  # whatever a user's model returns
        """The model's output; a batch that does not fit into memory goes in halves."""
        try:
            return self.model(inputs)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(inputs) == 1 or not is_out_of_memory(error):
                raise
        if inputs.is_cuda:
            torch.cuda.empty_cache()
        half = len(inputs) // 2
        return torch.cat([self._run(inputs[:half]), self._run(inputs[half:])])

    def _checked(
        self, logits: object, batch: int, which: str, numbers: npt.NDArray[np.int64]
    ) -> Tensor:
        expected = f"expected a tensor of logits of shape ({batch}, {self.classes or 'classes'})"
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"teacher {self.spec} returns {type(logits).__name__} for {which}; {expected}: "
                "wrap it in a callable that returns the logits alone"
            )
        width = self.classes or (logits.shape[1] if logits.ndim == 2 else 0)
        if logits.shape != (batch, width):
            raise ModelError(
                f"teacher {self.spec} returns shape {tuple(logits.shape)} for {which}; {expected}"
            )
        # softmax(z / T): the logits are T times the logarithm, but for a constant
        logits = as_logits(logits.detach().float(), self.output, self.spec) * self.softened
        if not bool(logits.isfinite().all()):
            row = int((~logits.isfinite()).any(-1).nonzero()[0, 0])
            column = int((~logits[row].isfinite()).nonzero()[0, 0])
            raise ModelError(
                f"teacher {self.spec} returns {logits[row, column].item()} for sample "
                f"{numbers[row]}, class {column}; expected finite logits"
                + (f" (--precision fp32 instead of {self.precision} may help)" * self._is_low)
            )
        return logits

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the model calls its classes; empty if it only numbers them."""
        return tuple(getattr(self.model, "class_names", ()))

    @property
    def _is_low(self) -> bool:
        return self.precision != "fp32"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "tf32":
            return tensor_float_32()
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Matrix products and convolutions in TF32 on a GPU: 10 bits of mantissa."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the host, which torch says in words only."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)
