"""The teacher: loaded for a dump, checked at every batch, named in the header."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.build import build, build_hub
from softcache.models.spec import is_hub, is_random, public_name
from softcache.models.weights import load_weights, parameter_count, read_weights, state_sha256
from softcache.other_teachers import (
    Matrix,
    NumpyTeacher,
    as_logits,
    is_other,
    open_other,
    public_rows_name,
)
from softcache.targets import soften
from softcache.util.callables import call_user, import_callable

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

COMPILED = ", compiled"  # behind the precision in a header

LARGEST_BATCH = 4096  # that is tried

GAIN = 1.05  # in rows/s, for which a batch of double the size is worth its memory

BUILT_IN = ("mlp:", "cnn:", "resnet:")


@dataclass(frozen=True)
class Ensemble:
    """One teacher, or several whose softened probabilities are averaged.

    The weighted arithmetic mean of Hinton, Vinyals and Dean (arXiv 1503.02531), section 5.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]  # they sum to 1

    @property
    def device(self) -> torch.device:
        return self.teachers[0].device

    @property
    def classes(self) -> int:
        return self.teachers[0].classes or 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the teachers call their classes; empty if they only number them."""
        return next((t.class_names for t in self.teachers if t.class_names), ())

    @property
    def provenance(self) -> tuple[dict[str, Any], ...]:
        return tuple(
            teacher.provenance | {"weight": weight}
            for teacher, weight in zip(self.teachers, self.weights, strict=True)
        )

    @property
    def in_float32(self) -> Ensemble | None:
        """The same in full precision, to compare; None if it is."""
        if all(teacher.precision == "fp32" for teacher in self.teachers):
            return None
        exact = tuple(dataclasses.replace(t, precision="fp32") for t in self.teachers)
        return dataclasses.replace(self, teachers=exact)

    def log_probs(
        self, inputs: Tensor, temperature: float, samples: npt.NDArray[np.int64] | None = None
    ) -> Tensor:
        """Log-probabilities (B, C) float32 at `temperature` of float inputs (B, *shape).

        Args:
            samples: (B,) the numbers of the samples, for messages.

        Raises:
            ModelError: a teacher raises, or its output is not finite logits (B, C).
        """
        said = [soften(t.logits(inputs, samples), temperature) for t in self.teachers]
        if len(said) == 1:
            return said[0]
        weighted = [s + math.log(w) for s, w in zip(said, self.weights, strict=True)]
        return torch.log_softmax(torch.logsumexp(torch.stack(weighted), 0), dim=-1)


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


def make_ensemble(teachers: Sequence[Teacher], weights: Sequence[float]) -> Ensemble:
    """Several teachers as one; no weights mean equal ones.

    Raises:
        SettingsError: weights that do not fit.
        ModelError: the teachers have different numbers of classes.
    """
    if weights and (
        len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise SettingsError(
            f"{len(weights)} teacher weights {list(weights)} for {len(teachers)} teachers; expected "
            "one above 0 for each, or none"
        )
    counts = [teacher.classes for teacher in teachers]
    if len(set(counts)) > 1:
        named = ", ".join(f"{teacher.spec} {teacher.classes}" for teacher in teachers)
        raise ModelError(
            f"teachers have different numbers of classes: {named}; average only teachers of one task"
        )
    shares = list(weights) or [1.0] * len(teachers)
    return Ensemble(tuple(teachers), tuple(share / sum(shares) for share in shares))


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


def fastest_batch(teacher: Callable[[Tensor], Tensor], sample: Tensor) -> int:
    """The batch size, doubled from 32 on, beyond which rows/s no longer grow or memory ends.

    Args:
        sample: (1, *shape).
    """
    best, best_rate, size = 1, 0.0, 32
    while size <= LARGEST_BATCH:
        try:
            rate = _rows_per_second(teacher, sample.expand(size, *sample.shape[1:]).contiguous())
        except (ModelError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error.__cause__ or error):
                raise
            break
        if rate < best_rate * GAIN:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def _rows_per_second(teacher: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    teacher(inputs).cpu()  # warms up, and waits
    start = time.perf_counter()
    teacher(inputs).cpu()
    return len(inputs) / (time.perf_counter() - start)


def _width_of(weights: Path) -> int:
    """Rows of the last matrix, which is the number of classes of a built-in architecture."""
    matrices = {name: len(t) for name, t in read_weights(weights).items() if t.ndim == 2}
    if not matrices:
        raise ModelError(f"weights {weights} hold no matrix, so not those of a classifier")
    # files may order names as text, 13.weight before 9.weight
    return matrices[max(matrices, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
