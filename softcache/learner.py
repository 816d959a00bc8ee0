"""A student in training: built, stepped, evaluated and saved on its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from softcache.data import Source
from softcache.errors import ModelError, SettingsError
from softcache.evaluate import Evaluation, evaluate
from softcache.loss import Labels, Loss, Targets, distillation_loss
from softcache.models import parameter_count

UNFINISHED_METRICS = "metrics.jsonl.partial"  # until the student is there
WARMUP = 0.05  # share of the steps in which the learning rate rises from 0


@dataclass
class Learner:
    """A student, what moves it, and how much it listens to the teacher.

    `random` is its own state of torch's generator: dropout draws as if it were trained alone.
    """

    name: str
    folder: Path
    alpha: float
    classes: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    accelerator: Accelerator
    random: list[Tensor]
    losses: list[Tensor] = field(default_factory=list)  # (3,) a step: total, soft, hard
    steps: int = 0
    evaluation: Evaluation | None = None

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    def step(
        self,
        inputs: Tensor,
        labels: Labels,
        targets: Targets | None,
        temperature: float,
        weight: float = 1.0,
    ) -> None:
        """One step on one batch, or on this process's share of it.

        Args:
            weight: of the share, such that the mean over the processes is that over the batch.
            inputs: (B, *shape) float.
            labels: (B,) int64, negative where unlabelled; or of mixed samples.
            targets: the teacher's log-probabilities at `temperature`, if alpha wants them.

        Raises:
            ModelError: the student raises, or its output is not (B, C).
        """
        with self._own_randomness():
            logits = self._forward(inputs)
        if logits.shape[1] != self.classes:
            raise ModelError(
                f"student gives {logits.shape[1]} outputs for {self.classes} classes; it needs one for "
                "each class of the cache, or of the data"
            )
        soft = targets if self.alpha > 0 else None
        loss = distillation_loss(logits, soft, labels, temperature=temperature, alpha=self.alpha)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss.total * weight)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(torch.stack([part.detach() for part in loss]) * weight)

    def finish_epoch(self, epoch: int, eval_source: Source | None, workers: int) -> None:
        """Evaluate, and add a line to the metrics.

        Raises:
            ModelError: a loss of this epoch is not finite.
        """
        mine = torch.stack(self.losses)  # (steps, 3)
        losses = self.accelerator.reduce(mine, reduction="mean").cpu()
        broken = (~losses[:, 0].isfinite()).nonzero()
        if len(broken):
            raise ModelError(
                f"{self.name}: the loss is {losses[broken[0, 0], 0]} at step "
                f"{self.steps + int(broken[0, 0]) + 1} (epoch {epoch + 1}); lower --lr"
            )
        self.steps += len(self.losses)
        self.losses.clear()
        if not self.accelerator.is_main_process:
            return
        line: dict[str, Any] = {"epoch": epoch + 1, "step": self.steps}
        line |= dict(zip(Loss._fields, losses.double().mean(0).tolist(), strict=True))
        line["lr"] = self.schedule.get_last_lr()[0]
        if eval_source is not None:
            self.evaluation = self._evaluate(eval_source, workers)
            line |= {"errors": self.evaluation.errors, "samples": self.evaluation.samples}
        with (self.folder / UNFINISHED_METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, facts: dict[str, Any]) -> None:
        """Write student.safetensors and config.json, and give the metrics their name."""
        model = self.accelerator.unwrap_model(self.model)
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        replace_file(
            self.folder / "student.safetensors", lambda path: path.write_bytes(serialize(state))
        )
        facts = facts | {"name": self.name, "alpha": self.alpha, "parameters": self.parameters}
        if self.evaluation:
            facts |= {"errors": self.evaluation.errors, "samples": self.evaluation.samples}
        text = json.dumps(facts, indent=2) + "\n"
        replace_file(self.folder / "config.json", lambda path: path.write_text(text))
        (self.folder / UNFINISHED_METRICS).replace(self.folder / "metrics.jsonl")

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
        model = self.accelerator.unwrap_model(self.model).eval()
        return evaluate(model, source, self.classes, self.accelerator.device, workers)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        device = self.accelerator.device
        outside = random_state(device)
        set_random_state(device, self.random)
        yield
        self.random = random_state(device)
        set_random_state(device, outside)


def make_learner(
    model: nn.Module,
    accelerator: Accelerator,
    *,
    name: str,
    folder: Path,
    alpha: float,
    classes: int,
    learning_rate: float,
    weight_decay: float,
    schedule: str,
    steps: int,
) -> Learner:
    """Prepare `model` for `steps` steps of AdamW; biases and norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )
    rate = LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, step, steps))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return Learner(
        name=name,
        folder=folder,
        alpha=alpha,
        classes=classes,
        model=prepared,
        optimizer=optimizer,
        schedule=rate,
        accelerator=accelerator,
        random=random_state(accelerator.device),
    )


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """Linear warm-up, then constant or half a cosine to 0 (Loshchilov and Hutter, 1608.03983)."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_accelerator(device: str, mixed_precision: str) -> Accelerator:
    """Hugging Face accelerate on the device asked for.

    Raises:
        SettingsError: the device is not there, or the processes do not find each other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: torch sees no GPU here; use --device auto or cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # without a GPU accelerate looks at other processes only if told that the CPU is meant
    on_cpu = device == "cpu" or (processes > 1 and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision)
    if accelerator.num_processes != processes:
        raise SettingsError(
            f"{processes} processes were started, but accelerate sees {accelerator.num_processes}; start "
            "them with torchrun or accelerate launch"
        )
    return accelerator


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Be sure, before the work, that the folder of a run can be had; nothing is made yet.

    Raises:
        SettingsError: it cannot be written, or holds a finished run and `overwrite` is not set.
    """
    finished = folder / "student.safetensors"
    if finished.exists() and not overwrite:
        raise SettingsError(
            f"{folder} holds a finished run ({finished.name}); give another --out, or --overwrite"
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        raise SettingsError(f"cannot write in {folder}: {there} {why}; give another --out")


def begin_run(folder: Path) -> None:
    """Make the folder; a run that was finished in it stays as it is until this one is.

    Raises:
        SettingsError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED_METRICS).write_text("")
    except OSError as error:
        raise SettingsError(
            f"cannot write in {folder} ({error.strerror}); give another --out"
        ) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    write(unfinished)
    unfinished.replace(path)


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
