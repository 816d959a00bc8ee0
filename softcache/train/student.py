"""A student in training: its steps, its evaluation and its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from softcache.cache.disk import disk_errors
from softcache.data.rows import TOKEN, has_tokens, unit_of
from softcache.data.source import Source
from softcache.data.workers import is_worker_failure
from softcache.errors import ModelError
from softcache.join.joined_data import JoinedData
from softcache.losses import Loss, label_weights, reduce_losses, row_losses
from softcache.models.evaluate import Evaluation
from softcache.models.outputs import logits_of
from softcache.models.scores import scores_from
from softcache.models.weights import parameter_count
from softcache.train.config import StudentConfig
from softcache.train.evaluation import CLASS_ERRORS, Compared, evaluate_student, scores_of_epoch
from softcache.train.micro_batches import micro_batches, rows_of_samples, take_rows
from softcache.train.row_loss import loss_of_rows
from softcache.train.run_folder import UNFINISHED_METRICS, WEIGHTS
from softcache.types import Labels, RowIndex, StoredTargets, Targets
from softcache.util.device import random_state, set_random_state
from softcache.util.files import replace_file


@dataclass
class Student:
    """A model in training, with its optimizer, its settings and its progress.

    Attributes:
        alpha: weight of the soft targets in the loss.
        temperature: temperature of the soft targets and of the student's softmax in the soft loss.
        random: this student's state of torch's generators, so that its dropout draws the same masks
            however many students share the run.
        class_weights: (C,) weights of the classes in the hard loss; None for 1 each.
        average: exponential moving average of the weights, with --ema.
        losses: (3,) for each step of the current epoch: total, soft, hard.
        steps: steps of the finished epochs, with finite losses that are in the metrics.
        history: a line of metrics for each finished epoch.
        best: the weights with the fewest errors so far, with --patience.
        best_evaluation: their evaluation; None if it was counted before a stop.
        multi_label: whether samples have any number of labels.
        stopped: why it takes no more steps; None while it trains.
        failed: whether it stopped because of an error.
        board: TensorBoard's SummaryWriter, with --tensorboard.
        part: samples with many rows and their soft targets, with which it is compared after each epoch.
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
    class_weights: Tensor | None = None
    average: AveragedModel | None = None
    losses: list[Tensor] = field(default_factory=list)
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Evaluation | None = None
    best: dict[str, Tensor] | None = None
    best_evaluation: Evaluation | None = None
    stopped: str | None = None
    failed: bool = False
    board: Any = None
    multi_label: bool = False
    part: JoinedData | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return parameter_count(self.model)

    @property
    def compared(self) -> Compared:
        """What an evaluation has to know of it."""
        cache = self.part.cache if self.part else None
        trained = self.alpha > 0 or cache is None
        temperature = self.temperature if trained else cache.header.temperature  # type: ignore[union-attr]
        device = self.accelerator.device
        return Compared(self.classes, device, self.multi_label, self.part, temperature)

    @property
    def criterion(self) -> str:
        """What tells how good it is, in a line of metrics; less is better."""
        language = self.part is not None and unit_of(self.part.source) == TOKEN
        return "perplexity" if language else "errors"

    @property
    def final_model(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged one with --ema."""
        if self.average is not None:
            return self.average.module
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def final_line(self) -> dict[str, Any]:
        """The line of metrics of the weights that are saved: the best with --patience, else the last."""
        if self.best is not None:
            return min(self.history, key=lambda line: float(line[self.criterion]))
        return self.history[-1] if self.history else {}

    def step(
        self,
        inputs: Tensor,
        labels: Labels,
        targets: Targets | StoredTargets | None,
        weight: float = 1.0,
        rows: RowIndex | None = None,
    ) -> None:
        """Take one optimizer step on a batch, or on this process's share of it.

        The loss is that of the whole batch, however it is divided into processes and micro-batches.

        Args:
            inputs: (B, *shape) float.
            labels: (B,) int64, negative where unlabelled; or MixedLabels.
            targets: (B, C) the teacher's log-probabilities at the student's temperature, or sparse; None
                to train on labels alone.
            weight: weight of the share, so that the mean over the processes is the mean over the batch.
            rows: which rows the labels and targets are of, if samples have many.

        Raises:
            ModelError: the student raises, or its output is not (B, C).
        """
        self.optimizer.zero_grad()
        parts = list(micro_batches(len(inputs), self.config.micro_batches))
        mean_weight = self._mean_label_weight(labels, weight)
        losses = []
        for samples in parts:
            part = samples if rows is None else rows_of_samples(rows, samples)
            total = len(inputs) if rows is None else max(1, len(rows.samples))
            share = weight * (part.stop - part.start) / total
            is_last = samples is parts[-1]
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                soft = None if targets is None or self.alpha == 0 else take_rows(targets, part)
                some = take_rows(labels, part), soft, mean_weight
                with self.same_verdict():
                    if rows is None:
                        loss = self._loss(inputs[samples], *some)
                    else:
                        index = RowIndex(rows.samples[part] - samples.start, rows.positions[part])
                        loss = self._loss_of_rows(inputs[samples], index, *some)
                self.accelerator.backward(loss.total * share)
            losses.append(torch.stack([part.detach().float() for part in loss]) * share)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.losses.append(torch.stack(losses).sum(0))

    @contextmanager
    def same_verdict(self) -> Iterator[None]:
        """Fail in every process if the block fails in one, for which the others would wait for ever.

        Raises:
            ModelError: the block raises one, here or in another process.
        """
        error: ModelError | None = None
        try:
            yield
        except ModelError as raised:
            error = raised
        if self.accelerator.num_processes > 1:
            failures = torch.tensor([float(error is not None)], device=self.accelerator.device)
            if float(self.accelerator.reduce(failures, reduction="sum")) and error is None:
                raise ModelError(f"{self.name}: it failed in another process")
        if error is not None:
            raise error

    def mean_losses(self, epoch: int) -> Tensor:
        """The losses of this epoch so far, averaged over all processes.

        Returns:
            (steps, 3) float32: total, soft, hard.

        Raises:
            ModelError: one of them is not finite.
        """
        local = torch.stack(self.losses)  # (steps, 3)
        losses: Tensor = self.accelerator.reduce(local, reduction="mean").cpu()
        self._check_finite(losses, epoch)
        return losses

    def check_losses(self, epoch: int) -> None:
        """Raise ModelError if a loss of this process is not finite; no process waits for another."""
        self._check_finite(torch.stack(self.losses).cpu(), epoch)

    def _check_finite(self, losses: Tensor, epoch: int) -> None:
        not_finite = (~losses[:, 0].isfinite()).nonzero()
        if len(not_finite):
            first = int(not_finite[0, 0])
            raise ModelError(
                f"{self.name}: the loss is {losses[first, 0]} at step {self.steps + first + 1} "
                f"(epoch {epoch + 1}); lower --lr, or add --max-grad-norm 1"
            )

    def check_weights(self, epoch: int) -> None:
        """Raise ModelError if a weight is not finite, which no loss shows if the last step broke it."""
        for name, tensor in self.final_model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{self.name}: {name} is not finite after epoch {epoch + 1}; lower --lr, or add "
                    "--max-grad-norm 1"
                )

    def finish_epoch(
        self, epoch: int, eval_source: Source | None, workers: int, patience: int | None = None
    ) -> None:
        """Evaluate the student, and add a line to its metrics.

        Args:
            epoch: the finished epoch, counted from 0.
            eval_source: labelled data to count errors on; None skips the evaluation.
            workers: processes that load the evaluation data.
            patience: number of epochs without fewer errors after which the student stops.

        Raises:
            ModelError: a loss of this epoch or a weight at its end is not finite.
        """
        losses = self.mean_losses(epoch)
        self.check_weights(epoch)
        self.steps += len(self.losses)
        self.losses.clear()
        measured = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)
        with self.same_verdict():
            if self.accelerator.is_main_process and eval_source is not None:
                self.evaluation = evaluate_student(
                    self.final_model.eval(), eval_source, self.compared, workers
                )
                measured += self._value(self.evaluation)
        if self.accelerator.is_main_process:
            line: dict[str, Any] = {"epoch": epoch + 1, "step": self.steps}
            means = dict(zip(Loss._fields, losses.double().mean(0).tolist(), strict=True))
            if self.alpha in (0, 1):
                del means["soft" if self.alpha == 0 else "hard"]  # it was not computed
            line |= means
            line["lr"] = self.schedule.get_last_lr()[0]
            known = None if eval_source is None else self.evaluation
            line |= scores_of_epoch(known, self.final_model, self.compared)
            metrics = self.folder / UNFINISHED_METRICS
            with disk_errors(metrics, "write"), metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if self.board is not None:
                for name, value in line.items():
                    if name != CLASS_ERRORS:
                        self.board.add_scalar(name, value, epoch + 1)
                self.board.flush()
        else:
            line = {"epoch": epoch + 1}
        if patience is not None:
            # only the main process evaluates; all must stop in the same epoch
            value = float(self.accelerator.reduce(measured, reduction="sum"))
            line[self.criterion] = value if self.criterion == "perplexity" else int(value)
        self.history.append(line)
        if patience is not None:
            self._keep_best(patience)

    def _value(self, evaluation: Evaluation) -> float:
        """What `criterion` names, of an evaluation."""
        if self.criterion == "errors" or evaluation.scores is None:
            return evaluation.errors
        return evaluation.scores.line()[self.criterion]

    def _keep_best(self, patience: int) -> None:
        if not all(self.criterion in line for line in self.history):
            raise ModelError(
                f"{self.name}: its earlier metrics have no {self.criterion} to compare with; start the run "
                "again with --overwrite"
            )
        values = [line[self.criterion] for line in self.history]
        best = values.index(min(values))
        if best == len(values) - 1:
            self.best = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.final_model.state_dict().items()
            }
            self.best_evaluation = self.evaluation
        if len(values) - 1 - best >= patience:
            fewer = "fewer errors" if self.criterion == "errors" else f"lower {self.criterion}"
            self.stopped = f"no {fewer} in {patience} epoch(s)"

    def fail(self, reason: str) -> None:
        """Stop this student because of an error, and free the state of its optimizer."""
        self.stopped, self.failed = reason, True
        self.losses.clear()
        self.optimizer.state.clear()

    def restore_best(self) -> None:
        """Load the weights that had the fewest errors, if --patience kept them."""
        if self.best is not None:
            self.final_model.load_state_dict(self.best)
            line = self.final_line
            if "samples" in line:
                counts = Evaluation(line["errors"], line["samples"], scores=scores_from(line))
                self.evaluation = self.best_evaluation or counts

    def save(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write student.safetensors and config.json, and give the metrics their final name.

        Args:
            facts: what run_facts() returns.

        Returns:
            The contents of config.json.
        """
        state = {
            name: tensor.cpu().contiguous().clone()
            for name, tensor in self.final_model.state_dict().items()
        }
        replace_file(self.folder / WEIGHTS, lambda path: path.write_bytes(serialize(state)))
        facts = facts | {"name": self.name, "alpha": self.alpha, "parameters": self.parameters}
        if self.evaluation:
            facts |= {"errors": self.evaluation.errors, "samples": self.evaluation.samples}
            if self.evaluation.scores is not None:
                facts |= self.evaluation.scores.line()
        elif (scores := scores_from(self.final_line)) is not None:
            facts |= scores.line()
        text = json.dumps(facts, indent=2) + "\n"
        replace_file(self.folder / "config.json", lambda path: path.write_text(text))
        (self.folder / UNFINISHED_METRICS).replace(self.folder / "metrics.jsonl")
        return facts

    def _mean_label_weight(self, labels: Labels, weight: float) -> Tensor:
        """The mean of the label weights over the batches of all processes, a scalar.

        Args:
            labels: the labels of this process's share of the batch.
            weight: weight of the share.
        """
        weights = label_weights(labels, self.class_weights)
        total = weights.sum()
        if self.accelerator.num_processes > 1 and self.alpha < 1:
            total = self.accelerator.reduce(total, reduction="mean")
        return total / (len(weights) / weight) if weight else total  # without rows there is no loss

    def _loss(
        self,
        inputs: Tensor,
        labels: Labels,
        soft: Targets | StoredTargets | None,
        mean_weight: Tensor,
    ) -> Loss:
        with self._own_random_state():
            logits = self._forward(inputs)
        self._check_width(logits)
        losses = row_losses(
            logits,
            soft.decoded() if isinstance(soft, StoredTargets) else soft,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            loss="bernoulli" if self.multi_label else self.config.soft_loss,
            label_smoothing=self.config.label_smoothing,
            class_weights=self.class_weights,
        )
        return reduce_losses(
            losses, temperature=self.temperature, alpha=self.alpha, mean_weight=mean_weight
        )

    def _loss_of_rows(
        self,
        inputs: Tensor,
        rows: RowIndex,
        labels: Labels,
        soft: Targets | StoredTargets | None,
        mean_weight: Tensor,
    ) -> Loss:
        """The loss where samples have many rows, computed a few rows at a time."""
        with self._own_random_state():
            return loss_of_rows(
                self._call,
                self.accelerator.unwrap_model(self.model),
                self.accelerator,
                inputs,
                rows,
                labels if isinstance(labels, Tensor) else labels[0],
                soft,
                self._check_width,
                tokens=self.part is not None and has_tokens(self.part.source),
                classes=self.classes,
                temperature=self.temperature,
                alpha=self.alpha,
                loss=self.config.soft_loss,
                label_smoothing=self.config.label_smoothing,
                class_weights=self.class_weights,
                mean_weight=mean_weight,
            )

    def _check_width(self, logits: Tensor) -> None:
        if logits.shape[1] != self.classes:
            raise ModelError(
                f"student returned {logits.shape[1]} outputs for {self.classes} classes; expected one for "
                "each class of the cache or the data"
            )

    def _call(self, *inputs: Tensor) -> Any:  # noqa: ANN401  # whatever a user's model returns
        self.model.train()
        try:
            return logits_of(self.model(*inputs))
        except Exception as error:  # a user's model can raise anything
            if is_worker_failure(error):
                raise
            raise ModelError(
                f"student raised {type(error).__name__} on inputs {tuple(inputs[0].shape)} of "
                f"{inputs[0].dtype}: {error}"
            ) from error

    def _forward(self, inputs: Tensor) -> Tensor:
        logits = self._call(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"student returned {shape} for a batch of {len(inputs)}; expected logits of shape "
                f"({len(inputs)}, classes)"
            )
        return logits

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        device = self.accelerator.device
        shared = random_state(device)
        set_random_state(device, self.random)
        try:
            yield
        finally:
            self.random = random_state(device)
            set_random_state(device, shared)
