"""A student in training: stepped, evaluated and saved on its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from softcache.data.source import Source
from softcache.errors import ModelError
from softcache.losses import Loss, distillation_loss
from softcache.models.evaluate import Evaluation, evaluate
from softcache.models.weights import parameter_count
from softcache.train.config import StudentConfig
from softcache.train.optimizer import make_average, make_optimizer, make_schedule
from softcache.train.run_folder import UNFINISHED_METRICS, WEIGHTS
from softcache.types import Labels, MixedLabels, SparseTargets, Targets
from softcache.util.files import replace_file


@dataclass
class Student:
    """A student, what moves it, and how much it listens to the teacher.

    `random` is its own state of torch's generator: dropout draws as if it were trained alone.
    """

    name: str
    folder: Path
    config: StudentConfig
    alpha: float
    temperature: float
    classes: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    accelerator: Accelerator
    random: list[Tensor]
    average: AveragedModel | None = None
    losses: list[Tensor] = field(default_factory=list)  # (3,) a step: total, soft, hard
    steps: int = 0  # whose losses are known to be finite and in the metrics
    history: list[dict[str, Any]] = field(default_factory=list)  # a line of metrics an epoch
    evaluation: Evaluation | None = None
    best: dict[str, Tensor] | None = None  # weights at the fewest errors, if it may stop early
    stopped: str | None = None  # why it takes no more steps
    failed: bool = False
    board: Any = None  # of TensorBoard, if it is asked for

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    @property
    def final_model(self) -> nn.Module:
        """The model that is evaluated and saved: the average, if there is one."""
        if self.average is not None:
            return self.average.module
        found: nn.Module = self.accelerator.unwrap_model(self.model)
        return found

    def step(
        self, inputs: Tensor, labels: Labels, targets: Targets | None, weight: float = 1.0
    ) -> None:
        """One step on one batch, or on this process's share of it.

        Args:
            inputs: (B, *shape) float.
            labels: (B,) int64, negative where unlabelled; or of mixed samples.
            targets: the teacher's log-probabilities at its temperature, if alpha wants them.
            weight: of the share, such that the mean over the processes is that over the batch.

        Raises:
            ModelError: the student raises, or its output is not (B, C).
        """
        self.optimizer.zero_grad()
        parts = list(_slices(len(inputs), self.config.micro_batches))
        losses = []
        for place in parts:
            share = weight * (place.stop - place.start) / len(inputs)
            last = place is parts[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                soft = None if targets is None or self.alpha == 0 else _part(targets, place)
                loss = self._loss(inputs[place], _part(labels, place), soft)
                self.accelerator.backward(loss.total * share)
            losses.append(torch.stack([part.detach().float() for part in loss]) * share)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.losses.append(torch.stack(losses).sum(0))

    def mean_losses(self, epoch: int) -> Tensor:
        """Losses (steps, 3) of this epoch so far, over all processes.

        Raises:
            ModelError: one of them is not finite.
        """
        mine = torch.stack(self.losses)  # (steps, 3)
        losses: Tensor = self.accelerator.reduce(mine, reduction="mean").cpu()
        self._check_finite(losses, epoch)
        return losses

    def check_losses(self, epoch: int) -> None:
        """Raise ModelError if one of this process's own losses is not finite; nobody is waited for."""
        self._check_finite(torch.stack(self.losses).cpu(), epoch)

    def _check_finite(self, losses: Tensor, epoch: int) -> None:
        broken = (~losses[:, 0].isfinite()).nonzero()
        if len(broken):
            raise ModelError(
                f"{self.name}: the loss is {losses[broken[0, 0], 0]} at step "
                f"{self.steps + int(broken[0, 0]) + 1} (epoch {epoch + 1}); lower --lr, "
                "or add --max-grad-norm 1"
            )

    def check_weights(self, epoch: int) -> None:
        """Raise ModelError if a weight is not finite: the last step may break what no loss has seen."""
        for name, tensor in self.final_model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{self.name}: {name} is not finite after epoch {epoch + 1}; lower --lr, or add "
                    "--max-grad-norm 1"
                )

    def finish_epoch(
        self, epoch: int, eval_source: Source | None, workers: int, patience: int | None = None
    ) -> None:
        """Evaluate, and add a line to the metrics.

        Args:
            patience: epochs without fewer errors after which it stops.

        Raises:
            ModelError: a loss of this epoch or a weight after it is not finite.
        """
        losses = self.mean_losses(epoch)
        self.check_weights(epoch)
        self.steps += len(self.losses)
        self.losses.clear()
        errors = torch.zeros(1, dtype=torch.int64, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            line: dict[str, Any] = {"epoch": epoch + 1, "step": self.steps}
            line |= dict(zip(Loss._fields, losses.double().mean(0).tolist(), strict=True))
            line["lr"] = self.schedule.get_last_lr()[0]
            if eval_source is not None:
                self.evaluation = self._evaluate(eval_source, workers)
                line |= {"errors": self.evaluation.errors, "samples": self.evaluation.samples}
                errors += self.evaluation.errors
            with (self.folder / UNFINISHED_METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            if self.board is not None:
                for name, value in line.items():
                    self.board.add_scalar(name, value, epoch + 1)
                self.board.flush()
        else:
            line = {"epoch": epoch + 1}
        if patience is not None:
            # all processes stop together, at what the first one counted
            line["errors"] = int(self.accelerator.reduce(errors, reduction="sum"))
        self.history.append(line)
        if patience is not None:
            self._keep_best(patience)

    def _keep_best(self, patience: int) -> None:
        errors = [line["errors"] for line in self.history]
        best = errors.index(min(errors))
        if best == len(errors) - 1:
            self.best = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.final_model.state_dict().items()
            }
        if len(errors) - 1 - best >= patience:
            self.stopped = f"no fewer errors in {patience} epoch(s)"

    def fail(self, why: str) -> None:
        """Take no more steps; the other students go on."""
        self.stopped, self.failed = why, True
        self.losses.clear()
        self.optimizer.state.clear()

    def restore_best(self) -> None:
        """Go back to the weights that had the fewest errors, if these were kept."""
        if self.best is not None:
            self.final_model.load_state_dict(self.best)
            line = min(self.history, key=lambda line: int(line["errors"]))
            if "samples" in line:
                self.evaluation = Evaluation(line["errors"], line["samples"])

    def save(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write student.safetensors and config.json, which it returns, and name the metrics."""
        state = {
            name: tensor.cpu().contiguous().clone()
            for name, tensor in self.final_model.state_dict().items()
        }
        replace_file(self.folder / WEIGHTS, lambda path: path.write_bytes(serialize(state)))
        facts = facts | {"name": self.name, "alpha": self.alpha, "parameters": self.parameters}
        if self.evaluation:
            facts |= {"errors": self.evaluation.errors, "samples": self.evaluation.samples}
        text = json.dumps(facts, indent=2) + "\n"
        replace_file(self.folder / "config.json", lambda path: path.write_text(text))
        (self.folder / UNFINISHED_METRICS).replace(self.folder / "metrics.jsonl")
        return facts

    def _loss(self, inputs: Tensor, labels: Labels, soft: Targets | None) -> Loss:
        with self._own_randomness():
            logits = self._forward(inputs)
        if logits.shape[1] != self.classes:
            raise ModelError(
                f"student gives {logits.shape[1]} outputs for {self.classes} classes; it needs one for "
                "each class of the cache, or of the data"
            )
        return distillation_loss(
            logits,
            soft,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            loss=self.config.loss,
            label_smoothing=self.config.label_smoothing,
        )

    def _forward(self, inputs: Tensor) -> Tensor:
        self.model.train()
        try:
            logits = self.model(inputs)
        except Exception as error:  # a user's model may fail in any way
            raise ModelError(
                f"student raised {type(error).__name__} on inputs {tuple(inputs.shape)} of "
                f"{inputs.dtype}: {error}"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"student gives {shape} for a batch of {len(inputs)}; expected logits of shape "
                f"({len(inputs)}, classes)"
            )
        return logits

    def _evaluate(self, source: Source, workers: int) -> Evaluation:
        return evaluate(
            self.final_model.eval(), source, self.classes, self.accelerator.device, workers
        )

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        device = self.accelerator.device
        outside = random_state(device)
        set_random_state(device, self.random)
        yield
        self.random = random_state(device)
        set_random_state(device, outside)


def make_student(
    model: nn.Module,
    accelerator: Accelerator,
    config: StudentConfig,
    *,
    name: str,
    folder: Path,
    alpha: float,
    temperature: float,
    classes: int,
    steps: int,
) -> Student:
    """Prepare `model` for `steps` steps, as `config` says."""
    optimizer = make_optimizer(model, config)
    rate = make_schedule(optimizer, config, steps)
    average = None
    if config.ema is not None:
        average = make_average(model, config.ema).to(accelerator.device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return Student(
        name=name,
        folder=folder,
        config=config,
        alpha=alpha,
        temperature=temperature,
        classes=classes,
        model=prepared,
        optimizer=optimizer,
        schedule=rate,
        accelerator=accelerator,
        random=random_state(accelerator.device),
        average=average,
    )


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _slices(length: int, parts: int) -> Iterator[slice]:
    """Up to `parts` parts of a batch, of two samples or more: a norm has no variance of one."""
    parts = max(1, min(parts, length // 2))
    edges = [length * i // parts for i in range(parts + 1)]
    return (slice(a, b) for a, b in pairwise(edges))


def _part(of: Any, place: slice) -> Any:  # noqa: ANN401  # labels or targets, of either kind
    """Some rows of labels or targets."""
    if isinstance(of, SparseTargets):
        return SparseTargets(of.ids[place], of.log_probs[place], of.rest[place], of.classes)
    if isinstance(of, MixedLabels):
        return MixedLabels(*(tensor[place] for tensor in of))
    return of[place]
