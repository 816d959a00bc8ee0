"""A teacher: a model in eval mode whose outputs are checked in every batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softcache.data.workers import is_worker_failure
from softcache.errors import ModelError, RemoteError
from softcache.models.language import TokenModel, flat_logits
from softcache.models.normalize import unnormalized
from softcache.models.outputs import logits_of
from softcache.teachers.matrix import Matrix
from softcache.teachers.numpy_function import NumpyTeacher
from softcache.teachers.outputs import as_logits, as_odds, describe_single, two_columns
from softcache.teachers.server import Server
from softcache.types import RowIndex
from softcache.util.device import is_out_of_memory
from softcache.util.log import inform
from softcache.util.tensors import all_finite

CHUNK_VALUES = 1 << 24  # logits of a language model that are in memory at a time

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that returns checked logits.

    Attributes:
        spec: the specification, for messages.
        classes: expected number of classes; None to accept any width.
        precision: precision of the forward pass, one of PRECISIONS.
        provenance: what the header records about this teacher.
        output: what the model returns, one of OUTPUTS.
        softened: temperature at which the model's output was already softened.
        stated_names: the names of its classes as the user stated them; empty for those of the model.
        multi_label: whether each class applies or not on its own, so that its outputs are log-odds.
        positions: how many positions its output has for the first sample; None for one row a sample.
        notes: what was logged about the outputs, so that it is logged once and not for every batch.
    """

    spec: str
    model: nn.Module
    classes: int | None
    device: torch.device
    precision: str
    provenance: dict[str, Any]
    output: str = "logits"
    softened: float = 1.0
    stated_names: tuple[str, ...] = ()
    multi_label: bool = False
    positions: int | None = None
    notes: set[str] = field(default_factory=set, repr=False, compare=False)

    def logits(self, inputs: Tensor, samples: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Logits (B, C) float32 of float inputs (B, *shape), on the teacher's device.

        Args:
            samples: (B,) sample ids, for messages and to look up the rows of a matrix; by default
                0 to B - 1.

        Raises:
            ModelError: the teacher raises, or its output is not finite logits (B, C).
        """
        sample_ids = np.arange(len(inputs)) if samples is None else samples
        where = f"samples {sample_ids[0]} to {sample_ids[-1]}"
        try:
            if isinstance(self.model, Matrix):
                output: Any = self.model.rows(sample_ids).to(self.device)
            else:
                with torch.inference_mode(), self._autocast():
                    output = self._run(inputs.to(self.device))
        except Exception as error:  # a user's model may fail in any way
            if is_worker_failure(error):
                raise
            raise ModelError(
                f"teacher {self.spec} raised {type(error).__name__} on {where}, inputs "
                f"{tuple(inputs.shape)} of {inputs.dtype}: {' '.join(str(error).split())}"
            ) from error
        return self._checked(output, len(inputs), where, sample_ids)

    def row_logits(
        self, inputs: Tensor, rows: RowIndex, samples: npt.NDArray[np.int64] | None = None
    ) -> Iterator[Tensor]:
        """Logits of some rows of samples that have many, (n, C) float32, a few rows at a time.

        The logits of all rows of a language model would not fit into memory, so its head runs on parts.

        Args:
            rows: which rows, in order.
            samples: (B,) sample ids, for messages.

        Raises:
            ModelError: the teacher raises, or does not return finite logits for each row.
            RemoteError: it is behind a server that does not answer as it should.
        """
        sample_ids = np.arange(len(inputs)) if samples is None else samples
        where = f"samples {sample_ids[0]} to {sample_ids[-1]}"
        who = f"teacher {self.spec}"
        inputs, rows = inputs.to(self.device), RowIndex(*(t.to(self.device) for t in rows))
        ids_of_rows = sample_ids[rows.samples.cpu().numpy()]
        head: Callable[[Tensor], Tensor] | None = None
        try:
            if isinstance(self.model, Matrix | Server):
                numbers = torch.arange(len(ids_of_rows))  # the rows are made dense a few at a time
                head = self._looked_up(inputs, rows, sample_ids)
                yield from self._parts(numbers, head, where, ids_of_rows)
                return
            with torch.inference_mode(), self._autocast():
                model = self._split_model(inputs)
                if model is None:
                    states = flat_logits(self._run(inputs), inputs, rows, who)
                else:
                    states = model(inputs, rows.flat(inputs.shape[1]))  # (R, H)
                    head = model.head
        except (ModelError, RemoteError):
            raise
        except Exception as error:  # a user's model may fail in any way
            if is_worker_failure(error):
                raise
            raise ModelError(
                f"{who} raised {type(error).__name__} on {where}, inputs {tuple(inputs.shape)} of "
                f"{inputs.dtype}: {' '.join(str(error).split())}"
            ) from error
        yield from self._parts(states, head, where, ids_of_rows)

    def _looked_up(
        self, inputs: Tensor, rows: RowIndex, sample_ids: npt.NDArray[np.int64]
    ) -> Callable[[Tensor], Tensor]:
        """A function from the numbers (n,) of rows of a matrix, or of a server's answers, to these (n, C)."""
        if isinstance(self.model, Server):
            server, answers = self.model, self.model.ask(inputs, rows, sample_ids)
            return lambda part: server.dense(answers, part).to(self.device)
        matrix = self.model
        assert isinstance(matrix, Matrix)
        samples = sample_ids[rows.samples.cpu().numpy()]
        numbers = matrix.numbers_at(samples, rows.positions.cpu().numpy())
        return lambda part: matrix.rows(numbers[part.numpy()]).to(self.device)

    def states(self, inputs: Tensor, rows: RowIndex) -> Tensor:
        """The hidden states (R, H) of rows of a language model whose head runs on its own.

        Raises:
            ModelError: it is none.
        """
        inputs = inputs.to(self.device)
        with torch.inference_mode(), self._autocast():
            model = self._split_model(inputs)
            if model is None:
                raise ModelError(f"teacher {self.spec} has no head that runs on its own")
            states: Tensor = model(inputs, rows.flat(inputs.shape[1]).to(self.device))
        return states

    def _parts(
        self,
        states: Tensor,
        head: Callable[[Tensor], Tensor] | None,
        where: str,
        ids_of_rows: npt.NDArray[np.int64],
    ) -> Iterator[Tensor]:
        """Checked logits (n, C) of states (R, ...), a few rows at a time; without a head these are logits."""
        size = max(1, CHUNK_VALUES // (self.classes or states.shape[-1]))
        for start in range(0, len(states), size):
            part = states[start : start + size]
            with torch.inference_mode(), self._autocast():
                logits = part if head is None else head(part)
            yield self._checked(logits, len(part), where, ids_of_rows[start : start + size])

    def _split_model(self, inputs: Tensor) -> TokenModel | None:
        """The model if its head can run on its own; else None."""
        splits = isinstance(self.model, TokenModel) and self.model.splits(inputs)
        return self.model if splits and isinstance(self.model, TokenModel) else None

    def output_shape(self, sample: Tensor) -> tuple[int, ...]:
        """The shape of what the model returns for one sample (1, *shape); empty if it is no tensor."""
        if isinstance(self.model, Matrix):
            return ()
        with torch.inference_mode(), self._autocast():
            output = self._run(sample.to(self.device))
        return tuple(output.shape) if isinstance(output, Tensor) else ()

    def _run(self, inputs: Tensor) -> Any:  # noqa: ANN401  # whatever a user's model returns
        """Run the model; a batch that does not fit into memory is split in halves."""
        try:
            return logits_of(self.model(inputs))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if len(inputs) == 1 or not is_out_of_memory(error):
                raise
        if inputs.is_cuda:
            torch.cuda.empty_cache()
        half = len(inputs) // 2
        return torch.cat([self._run(inputs[:half]), self._run(inputs[half:])])

    def _checked(
        self, output: object, batch: int, where: str, sample_ids: npt.NDArray[np.int64]
    ) -> Tensor:
        """The model's output as float32 logits (B, C)."""
        width = self.output_width
        expected = f"expected a tensor of logits of shape ({batch}, {width or 'classes'})"
        if not isinstance(output, Tensor):
            raise ModelError(
                f"teacher {self.spec} returns {type(output).__name__} for {where}; {expected}: "
                "wrap it in a callable that returns the logits alone"
            )
        if output.dtype == torch.uint8:
            raise ModelError(
                f"teacher {self.spec} returns unsigned 8-bit integers for {where}, which are neither logits "
                "nor probabilities; expected floats"
            )
        values = output.detach().float()
        if _is_single(output, batch) and not output.dtype.is_floating_point:
            raise ModelError(
                f"teacher {self.spec} returns one integer per sample for {where}: labels, not logits; "
                "return its probabilities or its logits, as predict_proba does"
            )
        if _is_single(output, batch) and width in (None, 2) and not self.multi_label:
            values = two_columns(values, self.output, self.spec)
            self._say(
                "one output",
                f"teacher {self.spec} returns one output per sample; it is taken as "
                f"{describe_single(self.output)}, of two classes",
            )
        if values.ndim != 2 or values.shape != (batch, width or values.shape[1]):
            raise ModelError(
                f"teacher {self.spec} returns shape {tuple(output.shape)} for {where}; {expected}"
            )
        # p = softmax(z / T), so z = T log p up to a constant
        if self.multi_label:
            logits = as_odds(values, self.output, self.spec)
        else:
            logits = as_logits(values, self.output, self.spec, self._say_rounded)
        if self.softened != 1:
            logits = logits * self.softened
        if not all_finite(logits):
            row = int((~logits.isfinite()).any(-1).nonzero()[0, 0])
            column = int((~logits[row].isfinite()).nonzero()[0, 0])
            value = logits[row, column].item()
            raise ModelError(
                f"teacher {self.spec} returns {value} for sample {sample_ids[row]}, class {column}; expected "
                "finite logits"
                + (", which an infinity cannot be" * math.isinf(value))
                + (": give an impossible class a large negative logit" * (value == -math.inf))
                + (
                    f" (--precision fp32 instead of {self.precision} may help)"
                    * self._has_reduced_precision
                )
            )
        return logits

    @property
    def output_width(self) -> int | None:
        """Expected number of columns of the model's output; None to accept any."""
        return self.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes, in order; empty if it only numbers them."""
        return self.stated_names or tuple(getattr(self.model, "class_names", ()))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """An estimator's names of its input columns, in order; empty if it was fitted without names."""
        inner = unnormalized(self.model)
        return inner.feature_names if isinstance(inner, NumpyTeacher) else ()

    @property
    def is_tree(self) -> bool:
        """Whether it is an estimator made of trees, which remember the labels that they were trained on."""
        inner = unnormalized(self.model)
        return isinstance(inner, NumpyTeacher) and inner.is_tree

    def _say(self, key: str, text: str) -> None:
        """Log a finding about the outputs, the first time only."""
        if key not in self.notes:
            self.notes.add(key)
            inform(text)

    def _say_rounded(self, text: str) -> None:
        self._say("rounded", text)

    @property
    def _has_reduced_precision(self) -> bool:
        return self.precision != "fp32"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "tf32":
            return tensor_float_32()
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def _is_single(output: Tensor, batch: int) -> bool:
    """Whether a model returns one value per sample; a batch of one may have lost its axis."""
    return output.shape in ((batch,), (batch, 1)) or (batch == 1 and output.ndim == 0)


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Run matrix products and convolutions on a GPU in TF32, which has 10 bits of mantissa."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
