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
from torch import Tensor, nn

from softcache.cache import Cache
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.class_names import align_classes, all_class_names
from softcache.data.embedded import source_of_cache
from softcache.data.kinds import check_same_kind
from softcache.data.loader import Request, ShuffledBatches
from softcache.data.open import open_source
from softcache.data.rows import has_tokens, lengths_of, unit_of, vocabulary_of
from softcache.data.source import Source
from softcache.data.table_columns import columns_of_cache
from softcache.data.tables import (
    TableSource,
    align_columns,
    check_same_columns,
    column_statistics,
    columns_of,
    unwrapped,
)
from softcache.errors import DataError, SettingsError
from softcache.join.joined_data import JoinedData, hard_label_data
from softcache.join.match import check_same_tokens, join
from softcache.join.samples import token_options
from softcache.models.build import build
from softcache.models.builtin import standardize_columns
from softcache.models.spec import parse_model
from softcache.models.weights import load_weights
from softcache.train.checkpoint import Checkpoint, Position
from softcache.train.class_weights import BALANCED, class_weights
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.optimizer import make_average, make_optimizer, make_schedule
from softcache.train.run_folder import make_run_folder
from softcache.train.sampling import BalancedBatches, RowBatches
from softcache.train.student import Student
from softcache.util.device import random_state
from softcache.util.log import inform


def open_data(config: TrainConfig, caches: Sequence[Cache]) -> tuple[list[Source], Source | None]:
    """The training data, and the evaluation data or None, with the classes and columns of the caches.

    Classes and columns are matched by name.

    Raises:
        DataError: the data cannot be read, or its classes or columns are others than those of a cache or of
            the first data set.
        SettingsError: a specification is invalid, or a cache without --data does not store its samples.
    """
    defaults = text_defaults(config, caches)
    sources: list[Source] = [
        open_source(spec, skip_unreadable=config.skip_unreadable, defaults=defaults)
        for spec in config.data
    ]
    sources = sources or [source_of_cache(cache) for cache in caches]
    aligned: list[Source] = []
    for number, source in enumerate(sources):
        # a single data set may have several caches, whose classes are the same
        cached = columns_of_cache(caches[number]) if caches else None
        source = align_columns(source, cached or columns_of(sources[0]))
        if aligned:
            check_same_columns(source, aligned[0])
        if caches:
            cache = caches[number]
            source = align_classes(
                source, all_class_names(cache), str(cache.path), same_classes=config.same_classes
            )
        aligned.append(source)
    if not config.eval_data:
        return aligned, None
    opened = open_source(config.eval_data, defaults=defaults)
    eval_source = align_columns(opened, columns_of(aligned[0]))
    check_same_kind(aligned[0], eval_source)
    for cache in caches[:1]:
        if cache.header.rows is not None:
            check_same_tokens(eval_source, cache)
    for cache in caches[:1]:
        eval_source = align_classes(
            eval_source, all_class_names(cache), str(cache.path), same_classes=config.same_classes
        )
    names, whose = aligned[0].class_names, aligned[0].name
    return aligned, align_classes(eval_source, names, whose, same_classes=config.same_classes)


def text_defaults(config: TrainConfig, caches: Sequence[Cache]) -> dict[str, str]:
    """Options of texts that follow from the first cache and the first student with a tokenizer."""
    defaults = token_options(caches[0].header) if caches else {}
    for student in config.students:
        spec = parse_model(student.student)
        place = spec.options.get("tokenizer") or (spec.place if spec.path.is_dir() else "")
        if spec.kind == "hf" and place:
            defaults["tokenizer"] = place
            break
    return defaults


def warnings_of_caches(config: TrainConfig, caches: Sequence[Cache]) -> list[str]:
    """What was found at the end of each dump that cannot be right; empty if nothing is wrong.

    Raises:
        DataError: something is wrong, and `config.strict` is set.
    """
    found = [
        f"{cache.path}: {text}"
        for cache in caches
        for text in (cache.header.summary or {}).get("warnings", ())
    ]
    if found and config.strict:
        raise DataError(f"{found[0]}. Leave --strict out to train all the same")
    return found


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
    temperatures = {
        student_temperature(plan.config, caches)
        for plan in planned_students(config)
        if config.soft_weight(plan.config) > 0
    }
    if caches[0].header.rows is not None:  # with which students of labels alone are compared too
        temperatures.add(caches[0].header.temperature)
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
            known_only=config.known_only,
            labels=config.labels,
        )
        for source, cache in zip(sources_of_caches, caches, strict=True)
    ]
    for part in parts[1:]:
        if has_tokens(part.source):
            continue
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
    table = unwrapped(parts[0].source)
    statistics = column_statistics(table) if isinstance(table, TableSource) else None
    weighted = any(student.class_weights for student in config.students)
    labels = np.concatenate([part.labels() for part in parts]) if weighted else None
    students = []
    for plan in planned_students(config):
        torch.manual_seed(plan.config.seed)
        model = build(
            plan.config.student,
            input_shape=input_shape,
            classes=classes,
            trust_code=config.trust_code,
            unit=unit_of(parts[0].source),
        )
        if statistics is not None:
            standardize_columns(model, *statistics)
        if plan.config.init:
            load_weights(model, plan.config.init)
        weights = None
        if plan.config.class_weights and labels is not None:
            weights = torch.from_numpy(class_weights(plan.config.class_weights, labels, classes))
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
                class_weights=weights,
                multi_label=parts[0].multi_label,
                part=parts[0] if parts[0].layout is not None else None,
            )
        )
    return students


def class_count(config: TrainConfig, source: Source) -> int:
    """The number of classes without a cache: --classes, the data's class names, or the largest label + 1.

    Raises:
        SettingsError: none of these is available.
    """
    vocabulary = vocabulary_of(source)
    if vocabulary:
        return vocabulary
    if config.classes or source.class_names:
        return config.classes or len(source.class_names)
    labels = getattr(source, "labels", None)
    if labels is None or labels.max() < 0:
        raise SettingsError(
            f"data {source.name} does not say how many classes it has; add --classes"
        )
    return int(labels.max()) + 1


def shuffled_batches(
    config: TrainConfig, parts: Sequence[JoinedData], accelerator: Accelerator
) -> ShuffledBatches:
    """Shuffled batches over the union of all parts; each process gets its share of every batch.

    Raises:
        SettingsError: the batch size is too small for the number of processes, or samples are to be drawn
            by class and none has a label.
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
    share = request, accelerator.process_index, processes
    if parts[0].layout is not None:
        counts = np.concatenate([part.row_counts() for part in parts])
        lengths = None
        if has_tokens(parts[0].source) and config.tokens_of_batch:
            lengths = np.concatenate(
                [lengths_of(part.source)[part.source_indices] for part in parts]
            )
        tokens = config.tokens_of_batch if lengths is not None else None
        return RowBatches(counts, lengths, tokens, config.batch_size, config.seed, *share)
    if config.sampling == BALANCED:
        labels = np.concatenate([part.labels() for part in parts])
        return BalancedBatches(labels, config.batch_size, config.seed, *share)
    return ShuffledBatches(int(offsets[-1]), config.batch_size, config.seed, *share)


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
    class_weights: Tensor | None = None,
    multi_label: bool = False,
    part: JoinedData | None = None,
) -> Student:
    """A student ready to train.

    Args:
        model: a new model, with the weights to start from.
        name: name in messages and tables.
        folder: where its files go.
        alpha: weight of the soft targets in the loss.
        temperature: temperature of the soft targets.
        classes: number of logits that the model has to return.
        steps: length of the learning rate schedule.
        class_weights: (C,) weights of the classes in the hard loss; None for 1 each.
        multi_label: whether samples have any number of labels.
        part: samples with many rows and their soft targets, to compare the student with.
    """
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps)
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
        schedule=schedule,
        accelerator=accelerator,
        random=random_state(accelerator.device),
        class_weights=None if class_weights is None else class_weights.to(accelerator.device),
        average=average,
        multi_label=multi_label,
        part=part,
    )
