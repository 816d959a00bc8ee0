"""Before the first step: check the settings, join data to caches, build the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from softcache.cache import Cache, Sampled, TopK
from softcache.data.augment import Augmentation, parse_augment, split_augment
from softcache.data.class_names import all_class_names, check_class_names
from softcache.data.loader import Request, ShuffledBatches
from softcache.data.source import Source
from softcache.errors import DataError, SettingsError
from softcache.join.joined_data import JoinedData, hard_label_data
from softcache.join.match import join
from softcache.losses import parse_loss
from softcache.models.build import build
from softcache.models.weights import load_weights
from softcache.train.checkpoint import Checkpoint, Position
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.run_folder import make_run_folder
from softcache.train.student import Student, make_student
from softcache.util.device import pick_device
from softcache.util.distributed import world_size
from softcache.util.log import inform


def check_classes(
    sources: Sequence[Source], caches: Sequence[Cache], eval_source: Source | None
) -> None:
    """Raise DataError if the evaluation data has other classes than the data or a cache."""
    if eval_source is None:
        return
    for source in sources:
        check_class_names(eval_source, source.class_names, source.name)
    for cache in caches:
        check_class_names(eval_source, all_class_names(cache), str(cache.path))


def student_temperature(student: StudentConfig, caches: Sequence[Cache]) -> float:
    """The temperature of a student's soft targets: its own setting, or else that of the caches.

    Raises:
        SettingsError: the caches differ in temperature and the student sets none, or differ in classes.
    """
    for cache in caches[1:]:
        for name in ("classes", "temperature"):
            value, first = getattr(cache.header, name), getattr(caches[0].header, name)
            if value != first and not (name == "temperature" and student.temperature):
                advice = "choose one with --temperature"
                if name == "classes":
                    advice = "train a student from each"
                raise SettingsError(
                    f"{cache.path} has {name} {value}, {caches[0].path} has {first}; expected the same in "
                    f"all caches: {advice}"
                )
    return student.temperature or (caches[0].header.temperature if caches else 1.0)


def check_losses(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Raise SettingsError if a loss needs something that a cache lacks, rather than at the first step."""
    for student in config.students:
        name, _ = parse_loss(student.loss)
        for cache in caches:
            is_sparse = isinstance(cache.header.encoding, TopK | Sampled)
            encoding = cache.header.encoding.name
            if (name == "mse" and is_sparse) or (name == "reverse_kl" and encoding == "sampled"):
                raise SettingsError(
                    f"loss {name} needs the probabilities of all classes, and {cache.path} is {encoding}; "
                    "use --loss kl"
                )
            mixed = split_augment(cache.header.augment).mixup
            if name == "dkd" and (mixed or bool((cache.labels < 0).any())):
                raise SettingsError(
                    f"loss dkd needs one label per sample, and {cache.path} has "
                    f"{'mixed samples' if mixed else 'samples without a label'}; use --loss kl"
                )


def join_all(
    config: TrainConfig,
    sources: Sequence[Source],
    caches: Sequence[Cache],
    device: torch.device,
) -> list[JoinedData]:
    """Join each data set to its cache; without a cache, use its labels alone.

    Raises:
        SoftcacheError: the data do not fit the caches, or the caches do not fit each other.
    """
    if not caches:
        classes = class_count(config, sources[0])
        return [hard_label_data(sources[0], config.augment, config.seed, classes)]
    if config.classes not in (None, caches[0].header.classes):
        raise SettingsError(
            f"--classes is {config.classes}, but {caches[0].path} has {caches[0].header.classes} "
            "classes; leave it out"
        )
    temperatures = {student_temperature(plan.config, caches) for plan in planned_students(config)}
    sources_of_caches = sources if len(sources) == len(caches) else [*sources] * len(caches)
    parts = [
        join(
            source,
            cache,
            augment=config.augment,
            temperatures=sorted(temperatures),
            device=device,
            workers=config.workers,
            rotate=config.rotate,
        )
        for source, cache in zip(sources_of_caches, caches, strict=True)
    ]
    for part in parts[1:]:
        if part.input_shape() != parts[0].input_shape():
            raise DataError(
                f"inputs of {part.source.name} have shape {part.input_shape()}, inputs of "
                f"{parts[0].source.name} have {parts[0].input_shape()}; expected one shape in all data sets"
            )
    return parts


def extra_augmentation(config: TrainConfig) -> Augmentation:
    """The augmentation on top of the cache's own, with new draws in every epoch.

    Raises:
        SettingsError: it is not made of the built-in operations alone.
    """
    extra = parse_augment(config.extra_augment, seed=config.seed, total=0)
    if extra.mixup or extra.transform:
        raise SettingsError(
            f"--extra-augment {config.extra_augment}: only the built-in operations can be added on top; "
            "use mixup or your own callable in softcache dump --augment instead"
        )
    return extra


@dataclass(frozen=True)
class PlannedStudent:
    """The settings, name and folder of a student that is not built yet."""

    config: StudentConfig
    name: str
    folder: Path


def planned_students(config: TrainConfig) -> list[PlannedStudent]:
    """All students, then the hard-label baselines.

    Students that differ only in settings of the soft loss share one baseline.
    """
    students, baselines = [], {}
    kind = "distilled" if config.caches else "student"
    for student, name in zip(config.students, config.names(), strict=True):
        folder = config.out / name
        students.append(PlannedStudent(student, f"{kind} {name}".strip(), folder))
        baseline = student.baseline()
        if config.baseline and baseline not in baselines:
            title = f"hard labels {name}".strip()
            baselines[baseline] = PlannedStudent(baseline, title, folder / "baseline")
    return [*students, *baselines.values()]


def make_students(
    config: TrainConfig, accelerator: Accelerator, parts: Sequence[JoinedData], steps: int
) -> list[Student]:
    """Build all students, each with its own weights, optimizer and folder."""
    input_shape, classes = parts[0].input_shape(), parts[0].classes
    caches = [part.cache for part in parts if part.cache]
    students = []
    for plan in planned_students(config):
        torch.manual_seed(plan.config.seed)
        model = build(plan.config.student, input_shape=input_shape, classes=classes)
        if plan.config.init:
            load_weights(model, plan.config.init)
        students.append(
            make_student(
                model,
                accelerator,
                plan.config,
                name=plan.name,
                folder=plan.folder,
                alpha=config.soft_weight(plan.config),
                temperature=student_temperature(plan.config, caches),
                classes=classes,
                steps=steps,
            )
        )
    return students


def class_count(config: TrainConfig, source: Source) -> int:
    """The number of classes without a cache: --classes, the data's class names, or the largest label + 1.

    Raises:
        SettingsError: none of these is available.
    """
    if config.classes or source.class_names:
        return config.classes or len(source.class_names)
    labels = getattr(source, "labels", None)
    if labels is None or labels.max() < 0:
        raise SettingsError(
            f"data {source.name} does not say how many classes it has; add --classes"
        )
    return int(labels.max()) + 1


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An Accelerator of Hugging Face accelerate for this process.

    Args:
        device: auto, cpu, cuda, cuda:1, mps.
        precision: fp32, bf16 or fp16.

    Raises:
        SettingsError: the device is not available, or accelerate does not see all processes.
    """
    torch_device, processes = pick_device(device), world_size()
    if torch_device.type == "cuda" and torch_device.index is not None:
        torch.cuda.set_device(torch_device)
    mixed_precision = "no" if precision == "fp32" else precision
    # without a GPU, accelerate looks for other processes only with cpu=True
    accelerator = Accelerator(cpu=torch_device.type == "cpu", mixed_precision=mixed_precision)
    if accelerator.num_processes != processes:
        raise SettingsError(
            f"{processes} processes were started, but accelerate sees {accelerator.num_processes}; start "
            "them with torchrun or accelerate launch"
        )
    return accelerator


def shuffled_batches(
    config: TrainConfig, parts: Sequence[JoinedData], accelerator: Accelerator
) -> ShuffledBatches:
    """Shuffled batches over the union of all parts; each process gets its share of every batch.

    Raises:
        SettingsError: the batch size is too small for the number of processes.
    """
    offsets = np.cumsum([0, *map(len, parts)])

    def request(samples: npt.NDArray[np.int64], epoch: int) -> dict[int, Request]:
        part_of = np.searchsorted(offsets, samples, side="right") - 1  # (B,)
        return {
            int(number): parts[number].request(samples[part_of == number] - offsets[number], epoch)
            for number in np.unique(part_of)
        }

    processes = accelerator.num_processes
    if config.batch_size < 2 * processes > 2:
        raise SettingsError(
            f"batch size {config.batch_size} for {processes} processes; expected 2 or more for each"
        )
    return ShuffledBatches(
        int(offsets[-1]),
        config.batch_size,
        config.seed,
        request,
        accelerator.process_index,
        processes,
    )


def open_run_folders(
    config: TrainConfig,
    students: Sequence[Student],
    checkpoint: Checkpoint | None,
    start: Position,
    *,
    resuming: bool,
) -> None:
    """Create the folders of all students, with the metrics of the finished epochs."""
    if checkpoint and resuming:
        inform(
            f"resuming {checkpoint.path.parent} at epoch {start.epoch + 1}, batch {start.batch} (remove "
            f"{checkpoint.path.name} to start from scratch)"
        )
    elif checkpoint:
        checkpoint.remove()
    for student in students:
        make_run_folder(student.folder, student.history)
        if config.tensorboard:
            student.board = open_board(student.folder / "tensorboard", start.epoch + 1)


def open_board(folder: Path, epoch: int) -> Any:  # noqa: ANN401  # a SummaryWriter
    """A TensorBoard log that starts at `epoch`, and hides what was logged from there on before a stop."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=epoch)
