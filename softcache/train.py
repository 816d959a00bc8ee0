"""Stage 2: a cache becomes students. The teacher is not here.

Without a cache the same loop trains on labels alone, which is how a teacher is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from softcache import __version__
from softcache.cache import Cache
from softcache.cache.reader import open_trainable
from softcache.data import Source, open_source
from softcache.errors import DataError, Interrupted, SettingsError
from softcache.evaluate import Evaluation, data_digest
from softcache.join import JoinedData, join, labels_alone, together
from softcache.learner import Learner, begin_run, check_folder, make_accelerator, make_learner
from softcache.loader import Request, ShuffledBatches, joint_loader
from softcache.models import build, load_weights, public_name
from softcache.progress import progress
from softcache.report import Row, models_table
from softcache.verify import check_damage
from softcache.views import EXTRA_STREAM, Augmentation, parse_augment

MAX_LEARNING_RATE = 1e6


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what `train` does."""

    student: str
    data: str | Sequence[str]
    out: Path
    cache: Path | Sequence[Path] | None = None  # several: each with its data, or all with one
    eval_data: str | None = None
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    weight_decay: float = 0.01
    alpha: float | None = None  # None: 0.9 with a cache, 0 without
    temperature: float | None = None  # None: the cache's
    seed: int = 0
    augment: str | None = None  # with a cache, only its own
    extra_augment: str | None = None  # on top of the cache's, which makes its targets inexact
    baseline: bool = False
    init: Path | None = None
    classes: int | None = None  # None: as the cache or the data say
    device: str = "auto"
    mixed_precision: str = "no"
    workers: int = 0
    rotate: bool = True  # each sample begins with another view of the cache
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch size", self.batch_size, 1),
            ("workers", self.workers, 0),
            ("seed", self.seed, 0),
        ):
            if value < low:
                raise SettingsError(f"{name} is {value}; expected {low} or more")
        if self.classes is not None and self.classes < 2:
            raise SettingsError(f"classes is {self.classes}; expected 2 or more")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"weight decay is {self.weight_decay}; expected 0 or more")
        if self.learning_rate > MAX_LEARNING_RATE:
            raise SettingsError(
                f"lr is {self.learning_rate}; expected at most {MAX_LEARNING_RATE:g}"
            )
        for name, number in (("temperature", self.temperature), ("lr", self.learning_rate)):
            if number is not None and not 0 < number < math.inf:
                raise SettingsError(f"{name} is {number}; expected a number above 0")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SettingsError(f"alpha is {self.alpha}; expected a number from 0 to 1")
        if not self.data:
            raise SettingsError("no data; name them with --data")
        if len(self.datas) not in (1, len(self.caches)):
            raise SettingsError(
                f"{len(self.datas)} --data for {len(self.caches)} CACHE; expected one for each, in the same "
                "order, or one for all"
            )
        if not self.caches and (self.alpha or self.temperature or self.baseline):
            raise SettingsError(
                "--alpha, --temperature and --baseline need a CACHE of soft targets; name one, or "
                "leave these options out to train on labels alone"
            )

    @property
    def caches(self) -> list[Path]:
        return [self.cache] if isinstance(self.cache, Path) else list(self.cache or ())

    @property
    def datas(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else list(self.data)

    @property
    def soft_weight(self) -> float:
        """Alpha with its default: 0.9 with a cache, 0 without."""
        default = 0.9 if self.caches else 0.0
        return default if self.alpha is None else self.alpha


def train(config: TrainConfig) -> list[Learner]:
    """Train a student, and its hard-label twin if asked for, into the folder `config.out`.

    Under torchrun or accelerate launch each process takes its share of every batch.

    Raises:
        SoftcacheError: the settings, the cache, the data or the student are not as they should be.
    """
    accelerator = make_accelerator(config.device, config.mixed_precision)
    sources = [open_source(spec) for spec in config.datas]
    eval_source = open_source(config.eval_data) if config.eval_data else None
    for folder in (config.out, *([config.out / "baseline"] if config.baseline else [])):
        check_folder(folder, overwrite=config.overwrite)
    caches = [open_trainable(path) for path in config.caches]
    if config.verify and accelerator.is_main_process:
        for cache in caches:
            check_damage(cache)
    accelerator.wait_for_everyone()
    temperature = common_temperature(config, caches)
    parts = join_all(config, sources, caches, temperature, accelerator.device)
    try:
        learners = fit(config, accelerator, parts, temperature, eval_source)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {config.out} has the metrics so far, but no new student"
        ) from None
    if accelerator.is_main_process:
        for learner in learners:
            learner.save(run_facts(config, parts, eval_source))
        print(final_table(learners, caches, eval_source))
    return learners


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    temperature: float,
    eval_source: Source | None,
) -> list[Learner]:
    """The training loop: every learner takes a step on every batch, drawn from all parts alike.

    Of a cache a sample is seen in its views in turn; on labels alone, each epoch is a view of its
    own.
    """
    device, starts = accelerator.device, np.cumsum([0, *map(len, parts)])
    extra = extra_augmentation(config)

    def request(samples: npt.NDArray[np.int64], epoch: int) -> dict[int, Request]:
        part = np.searchsorted(starts, samples, side="right") - 1  # (B,) whose sample each is
        return {
            int(one): parts[one].request(samples[part == one] - starts[one], epoch)
            for one in np.unique(part)
        }

    processes = accelerator.num_processes
    if config.batch_size < 2 * processes > 2:
        raise SettingsError(
            f"batch size {config.batch_size} for {processes} processes; expected at least 2 for each"
        )
    batches = ShuffledBatches(
        int(starts[-1]),
        config.batch_size,
        config.seed,
        request,
        accelerator.process_index,
        processes,
    )
    steps = config.epochs * len(batches)
    learners = make_learners(config, accelerator, parts[0], steps)
    if accelerator.is_main_process:
        for learner in learners:
            begin_run(learner.folder)
    batch_loader = joint_loader(
        [(part.source, part.augmentation) for part in parts],
        batches,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    with progress("train", steps, "steps") as advance:
        for epoch in range(config.epochs):
            batches.set_epoch(epoch)
            for weight, found in zip(batches.weights(), batch_loader, strict=True):
                batch = together(
                    [parts[part].training_batch(one, epoch, device) for part, one in found.items()]
                )
                rows = [
                    starts[part] + one.samples.numpy() - parts[part].numbers[0]
                    for part, one in found.items()
                ]
                inputs = extra(
                    batch.inputs, None, epoch, np.concatenate(rows), first_stream=EXTRA_STREAM
                )
                for learner in learners:
                    learner.step(inputs, batch.labels, batch.targets, temperature, weight)
                advance(1)
            for learner in learners:
                learner.finish_epoch(epoch, eval_source, config.workers)
    return learners


def common_temperature(config: TrainConfig, caches: Sequence[Cache]) -> float:
    """The temperature of all soft targets: as asked for, else the caches' own.

    Raises:
        SettingsError: the caches have different ones, or different classes.
    """
    for cache in caches[1:]:
        for name in ("classes", "temperature"):
            mine, first = getattr(cache.header, name), getattr(caches[0].header, name)
            if mine != first and not (name == "temperature" and config.temperature):
                advice = "; say which with --temperature" if name == "temperature" else ""
                raise SettingsError(
                    f"{cache.path} has {name} {mine}, {caches[0].path} has {first}; one student needs "
                    f"one{advice}"
                )
    return config.temperature or (caches[0].header.temperature if caches else 1.0)


def join_all(
    config: TrainConfig,
    sources: Sequence[Source],
    caches: Sequence[Cache],
    temperature: float,
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
    each = sources if len(sources) == len(caches) else [*sources] * len(caches)
    parts = [
        join(
            source,
            cache,
            augment=config.augment,
            temperature=temperature,
            device=device,
            workers=config.workers,
            rotate=config.rotate,
        )
        for source, cache in zip(each, caches, strict=True)
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


def make_learners(
    config: TrainConfig, accelerator: Accelerator, part: JoinedData, steps: int
) -> list[Learner]:
    """The student and, as a baseline, its twin that listens to the labels alone."""
    input_shape, classes = part.input_shape(), part.classes
    runs = [("distilled" if config.caches else "student", config.out, config.soft_weight)]
    if config.baseline:
        runs.append(("hard labels", config.out / "baseline", 0.0))
    learners = []
    for name, folder, alpha in runs:
        torch.manual_seed(config.seed)
        model = build(config.student, input_shape=input_shape, classes=classes)
        if config.init:
            load_weights(model, config.init)
        learners.append(
            make_learner(
                model,
                accelerator,
                name=name,
                folder=folder,
                alpha=alpha,
                classes=classes,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                schedule=config.schedule,
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


def run_facts(
    config: TrainConfig, parts: Sequence[JoinedData], eval_source: Source | None
) -> dict[str, object]:
    """What config.json says of a run: the settings, and whose soft targets it learned from."""
    settings = dataclasses.asdict(config) | {"student": public_name(config.student)}
    settings |= {
        "data": [part.source.name for part in parts],
        "eval_data": eval_source.name if eval_source else None,
        "cache": [path.name for path in config.caches],
        "out": config.out.name,
        "init": config.init and config.init.name,
    }
    caches = [part.cache for part in parts if part.cache]
    return {
        "softcache": __version__,
        "input_shape": list(parts[0].input_shape()),
        "classes": parts[0].classes,
        # of an unfinished cache the content, and so its id, will yet change
        "content_ids": [cache.content_id() if cache.complete else None for cache in caches],
        "settings": settings,
    }


def final_table(
    learners: Sequence[Learner], caches: Sequence[Cache], eval_source: Source | None
) -> str:
    """Teachers by what the first cache's header says of them, then the students."""
    rows = [Row(learner.name, learner.parameters, learner.evaluation) for learner in learners]
    if not caches:
        return models_table(rows)
    header = caches[0].header
    known = header.evaluation
    same = known and eval_source and known["digest"] == data_digest(eval_source)
    evaluation = Evaluation(known["errors"], known["samples"]) if known and same else None
    parameters = sum(teacher["parameters"] for teacher in header.teachers)
    return models_table([Row("teacher", parameters, evaluation), *rows])
