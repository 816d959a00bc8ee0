"""Before the first step: data joined to caches, students built, losses checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from softcache.cache import Cache, Sampled, TopK
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.source import Source
from softcache.errors import DataError, SettingsError
from softcache.join.joined_data import JoinedData, labels_alone
from softcache.join.match import join
from softcache.losses import parse_loss
from softcache.models.build import build
from softcache.models.weights import load_weights
from softcache.train.checkpoint import Checkpoint, Place
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.run_folder import make_run_folder
from softcache.train.student import Learner, make_learner


def temperature_of(student: StudentConfig, caches: Sequence[Cache]) -> float:
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
            mixed = "mixup" in (cache.header.augment or "")
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
        return [labels_alone(sources[0], config.augment, config.seed, classes)]
    if config.classes not in (None, caches[0].header.classes):
        raise SettingsError(
            f"--classes is {config.classes}, but {caches[0].path} has {caches[0].header.classes} "
            "classes; leave it out"
        )
    wanted = [temperature_of(student, caches) for student, _, _ in planned_runs(config)]
    sources_of_caches = sources if len(sources) == len(caches) else [*sources] * len(caches)
    parts = [
        join(
            source,
            cache,
            augment=config.augment,
            temperatures=sorted(set(wanted)),
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


def planned_runs(config: TrainConfig) -> list[tuple[StudentConfig, str, Path]]:
    """Every student with its name and its folder; then, as a baseline, its twin on the labels alone."""
    found, twins = [], {}
    for student, name in zip(config.students, config.names(), strict=True):
        what, folder = "distilled" if config.caches else "student", config.out / name
        found.append((student, f"{what} {name}".strip(), folder))
        if config.baseline and student.twin() not in twins:  # those of a grid may have one together
            twins[student.twin()] = (f"hard labels {name}".strip(), folder / "baseline")
    return found + [(twin, name, folder) for twin, (name, folder) in twins.items()]


def make_learners(
    config: TrainConfig, accelerator: Accelerator, parts: Sequence[JoinedData], steps: int
) -> list[Learner]:
    """All students, each with weights, optimizer and folder of its own."""
    input_shape, classes = parts[0].input_shape(), parts[0].classes
    caches = [part.cache for part in parts if part.cache]
    learners = []
    for student, name, folder in planned_runs(config):
        torch.manual_seed(student.seed)
        model = build(student.student, input_shape=input_shape, classes=classes)
        if student.init:
            load_weights(model, student.init)
        learners.append(
            make_learner(
                model,
                accelerator,
                student,
                name=name,
                folder=folder,
                alpha=config.soft_weight(student),
                temperature=temperature_of(student, caches),
                classes=classes,
                steps=steps,
            )
        )
    return learners


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


def open_run_folders(
    learners: Sequence[Learner],
    checkpoint: Checkpoint | None,
    place: Place,
    *,
    going_on: bool,
    boards: bool,
) -> None:
    """Make the folders, with the metrics of the epochs that are done."""
    if checkpoint and going_on:
        print(
            f"going on with {checkpoint.path.parent}, epoch {place.epoch + 1}, batch {place.batch} (remove "
            f"{checkpoint.path.name} to start again)"
        )
    elif checkpoint:
        checkpoint.remove()
    for learner in learners:
        make_run_folder(learner.folder, learner.history)
        if boards:
            learner.board = open_board(learner.folder / "tensorboard", place.epoch + 1)


def open_board(folder: Path, epoch: int) -> Any:  # noqa: ANN401  # a SummaryWriter
    """Logs for TensorBoard from `epoch` on; what was logged of it before a stop does not count."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=epoch)
