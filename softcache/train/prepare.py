"""Before the first step: data joined to caches, students built, losses checked."""

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
    """Raise DataError if the classes of the evaluation data are not those of the data and caches."""
    if eval_source is None:
        return
    for source in sources:
        check_class_names(eval_source, source.class_names, source.name)
    for cache in caches:
        check_class_names(eval_source, all_class_names(cache), str(cache.path))


def student_temperature(student: StudentConfig, caches: Sequence[Cache]) -> float:
    """The temperature of a student's soft targets: as asked for, else the caches' own.

    Raises:
        SettingsError: the caches have different ones, or different classes.
    """
    for cache in caches[1:]:
        for name in ("classes", "temperature"):
            mine, first = getattr(cache.header, name), getattr(caches[0].header, name)
            if mine != first and not (name == "temperature" and student.temperature):
                advice = "; say which with --temperature" if name == "temperature" else ""
                raise SettingsError(
                    f"{cache.path} has {name} {mine}, {caches[0].path} has {first}; one student needs "
                    f"one{advice}"
                )
    return student.temperature or (caches[0].header.temperature if caches else 1.0)


def check_losses(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Raise SettingsError now, not at the first step, where a loss needs what a cache does not have."""
    for student in config.students:
        name, _ = parse_loss(student.loss)
        for cache in caches:
            few = isinstance(cache.header.encoding, TopK | Sampled)
            encoding = cache.header.encoding.name
            if (name == "mse" and few) or (name == "reverse_kl" and encoding == "sampled"):
                raise SettingsError(
                    f"loss {name} needs the probabilities of all classes, and {cache.path} is {encoding}; "
                    "use --loss kl"
                )
            mixed = split_augment(cache.header.augment).mixup
            if name == "dkd" and (mixed or bool((cache.labels < 0).any())):
                raise SettingsError(
                    f"loss dkd takes the label of each sample apart, and {cache.path} has "
                    f"{'mixed samples' if mixed else 'samples without a label'}; use --loss kl"
                )


def join_all(
    config: TrainConfig,
    sources: Sequence[Source],
    caches: Sequence[Cache],
    device: torch.device,
) -> list[JoinedData]:
    """Each data set with its cache; without a cache, with its labels alone."""
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
                f"inputs of {part.source.name} have shape {part.input_shape()}, those of "
                f"{parts[0].source.name} {parts[0].input_shape()}; one student needs one shape"
            )
    return parts


def extra_augmentation(config: TrainConfig) -> Augmentation:
    """What goes on top of the cache's own augmentation, drawn anew in every epoch."""
    extra = parse_augment(config.extra_augment, seed=config.seed, total=0)
    if extra.mixup or extra.transform:
        raise SettingsError(
            f"--extra-augment {config.extra_augment}: only the built-in operations can go on top; "
            "mixup and a callable of your own belong into softcache dump --augment"
        )
    return extra


@dataclass(frozen=True)
class PlannedStudent:
    """A student before it is built: its settings, its name in tables, and its folder."""

    config: StudentConfig
    name: str
    folder: Path


def planned_students(config: TrainConfig) -> list[PlannedStudent]:
    """Every student, then the hard-label baselines; students of a grid may share a baseline."""
    students, baselines = [], {}
    kind = "distilled" if config.caches else "student"
    for student, name in zip(config.students, config.names(), strict=True):
        folder = config.out / name
        students.append(PlannedStudent(student, f"{kind} {name}".strip(), folder))
        own = student.baseline()
        if config.baseline and own not in baselines:
            title = f"hard labels {name}".strip()
            baselines[own] = PlannedStudent(own, title, folder / "baseline")
    return [*students, *baselines.values()]


def make_students(
    config: TrainConfig, accelerator: Accelerator, parts: Sequence[JoinedData], steps: int
) -> list[Student]:
    """All students, each with weights, optimizer and folder of its own."""
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
    """Without a cache: as asked for, else as the data's class names or labels say.

    Raises:
        SettingsError: nothing says how many.
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
    """Hugging Face accelerate on the device asked for.

    Raises:
        SettingsError: the device is not there, or the processes do not find each other.
    """
    chosen, processes = pick_device(device), world_size()
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    # without a GPU accelerate looks for other processes only if it is told to use the CPU
    on_cpu = chosen.type == "cpu"
    mixed_precision = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision)
    if accelerator.num_processes != processes:
        raise SettingsError(
            f"{processes} processes were started, but accelerate sees {accelerator.num_processes}; start "
            "them with torchrun or accelerate launch"
        )
    return accelerator


def shuffled_batches(
    config: TrainConfig, parts: Sequence[JoinedData], accelerator: Accelerator
) -> ShuffledBatches:
    """The batches of all parts, of which each process gets its share.

    Raises:
        SettingsError: the batch is too small to be shared.
    """
    starts = np.cumsum([0, *map(len, parts)])

    def request(samples: npt.NDArray[np.int64], epoch: int) -> dict[int, Request]:
        part_of = np.searchsorted(starts, samples, side="right") - 1  # (B,)
        return {
            int(part): parts[part].request(samples[part_of == part] - starts[part], epoch)
            for part in np.unique(part_of)
        }

    processes = accelerator.num_processes
    if config.batch_size < 2 * processes > 2:
        raise SettingsError(
            f"batch size {config.batch_size} for {processes} processes; expected at least 2 for each"
        )
    return ShuffledBatches(
        int(starts[-1]),
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
    """Make the folders, with the metrics of the epochs that are done."""
    if checkpoint and resuming:
        inform(
            f"resuming {checkpoint.path.parent} at epoch {start.epoch + 1}, batch {start.batch} (remove "
            f"{checkpoint.path.name} to start again)"
        )
    elif checkpoint:
        checkpoint.remove()
    for student in students:
        make_run_folder(student.folder, student.history)
        if config.tensorboard:
            student.board = open_board(student.folder / "tensorboard", start.epoch + 1)


def open_board(folder: Path, epoch: int) -> Any:  # noqa: ANN401  # a SummaryWriter
    """Logs for TensorBoard from `epoch` on; what was logged of it before a stop does not count."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=epoch)
