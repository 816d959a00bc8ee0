"""Stage 2: a cache becomes students. The teacher is not here.

Without a cache the same loop trains on labels alone, which is how a teacher is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from softcache import __version__
from softcache.cache import Cache, open_cache
from softcache.data import Source, check_labels, open_source
from softcache.errors import Interrupted, SettingsError
from softcache.evaluate import Evaluation, data_digest
from softcache.join import join_samples
from softcache.learner import Learner, begin_run, check_folder, make_accelerator, make_learner
from softcache.loader import Batch, Request, ShuffledBatches, augmented, loader, make_request
from softcache.loss import Labels, MixedLabels, Targets
from softcache.models import build, load_weights, public_name
from softcache.progress import progress
from softcache.replay import check_replay, replayed
from softcache.report import Row, models_table
from softcache.targets import soft_targets
from softcache.verify import check_damage
from softcache.views import EXTRA_STREAM, Augmentation, parse_augment

# (view, rows of the cache (B,)) -> the teacher's log-probabilities (B, C) at the temperature
TargetsOf = Callable[[int, "npt.NDArray[np.int64]"], Targets]


MAX_LEARNING_RATE = 1e6


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what `train` does."""

    student: str
    data: str
    out: Path
    cache: Path | None = None
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
        if self.cache is None and (self.alpha or self.temperature or self.baseline):
            raise SettingsError(
                "--alpha, --temperature and --baseline need a CACHE of soft targets; name one, or "
                "leave these options out to train on labels alone"
            )

    @property
    def soft_weight(self) -> float:
        """Alpha with its default: 0.9 with a cache, 0 without."""
        default = 0.9 if self.cache else 0.0
        return default if self.alpha is None else self.alpha


def train(config: TrainConfig) -> list[Learner]:
    """Train a student, and its hard-label twin if asked for, into the folder `config.out`.

    Raises:
        SoftcacheError: the settings, the cache, the data or the student are not as they should be.
    """
    accelerator = make_accelerator(config.device, config.mixed_precision)
    source = open_source(config.data)
    eval_source = open_source(config.eval_data) if config.eval_data else None
    for folder in (config.out, *([config.out / "baseline"] if config.baseline else [])):
        check_folder(folder, overwrite=config.overwrite)
    cache = open_cache(config.cache) if config.cache else None
    if cache is not None and config.verify:
        check_damage(cache)
    if cache is None:
        rows, targets = np.arange(len(source)), None
        augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    else:
        temperature = config.temperature or cache.header.temperature
        targets = soft_targets(cache, temperature, accelerator.device)
        rows = join_samples(source, cache, config.workers)
        augmentation = replayed(cache.header, config.augment, len(source))
        check_replay(cache, source, augmentation, rows)
    try:
        learners = fit(config, accelerator, source, eval_source, cache, augmentation, rows, targets)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {config.out} has the metrics so far, but no student") from None
    if accelerator.is_main_process:
        for learner in learners:
            learner.save(run_facts(config, source, eval_source, cache))
        print(final_table(learners, cache, eval_source))
    return learners


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    source: Source,
    eval_source: Source | None,
    cache: Cache | None,
    augmentation: Augmentation,
    rows: npt.NDArray[np.int64],
    targets: TargetsOf | None,
) -> list[Learner]:
    """The training loop: every learner takes a step on every batch.

    Epoch e sees view e mod V of the cache; on labels alone, every epoch is a view of its own.

    Args:
        rows: (N,) the row of the cache for each sample of `source`.
        targets: what the learners are taught, by view and rows of the cache.
    """
    header = cache.header if cache else None
    first_view, first_sample = (header.first_view, header.first_sample) if header else (0, 0)
    where = np.argsort(rows, kind="stable")
    extra = parse_augment(config.extra_augment, seed=config.seed, total=len(source))
    if extra.mixup or extra.transform:
        raise SettingsError(
            f"--extra-augment {config.extra_augment}: only the built-in operations can go on top; "
            "mixup and a callable of your own belong into softcache dump --augment"
        )

    def view_of(epoch: int) -> int:
        return first_view + epoch % header.views if header else epoch

    def request(indices: npt.NDArray[np.int64], epoch: int) -> Request:
        samples = first_sample + rows[indices]
        return make_request(augmentation, indices.tolist(), view_of(epoch), samples, where)

    temperature = config.temperature or (header.temperature if header else 1.0)
    classes = class_count(config, source, cache)
    batches = ShuffledBatches(len(source), config.batch_size, config.seed, request)
    steps = config.epochs * len(batches)
    learners = make_learners(config, accelerator, source, classes, steps)
    for learner in learners:
        begin_run(learner.folder)
    batch_loader = accelerator.prepare(
        loader(source, batches, augmentation=augmentation, workers=config.workers)
    )
    device = accelerator.device
    with progress("train", steps, "steps") as advance:
        for epoch in range(config.epochs):
            batches.set_epoch(epoch)
            view = view_of(epoch)
            for batch in batch_loader:
                indices = batch.indices.cpu().numpy()
                check_labels(batch.labels.cpu().numpy(), indices, classes, source)
                samples = rows[indices]
                inputs = augmented(batch, augmentation, view, first_sample + samples, device)
                inputs = extra(inputs, None, epoch, indices, first_stream=EXTRA_STREAM)
                soft = targets(view - first_view, samples) if targets else None
                labels = labels_of(batch, augmentation, view, first_sample + samples)
                for learner in learners:
                    learner.step(inputs, labels, soft, temperature)
                advance(1)
            for learner in learners:
                learner.finish_epoch(epoch, eval_source, config.workers)
    return learners


def labels_of(
    batch: Batch, augmentation: Augmentation, view: int, samples: npt.NDArray[np.int64]
) -> Labels:
    """The labels of a batch; under mixup, with those of the partners and their shares."""
    if not augmentation.mixup:
        return batch.labels
    shares = torch.from_numpy(augmentation.shares(view, samples)).to(batch.labels.device)
    return MixedLabels(batch.labels, batch.partner_labels, shares.float())


def make_learners(
    config: TrainConfig, accelerator: Accelerator, source: Source, classes: int, steps: int
) -> list[Learner]:
    """The student and, as a baseline, its twin that listens to the labels alone."""
    input_shape = source.fetch([0])[0].shape[1:]
    runs = [("distilled" if config.cache else "student", config.out, config.soft_weight)]
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


def class_count(config: TrainConfig, source: Source, cache: Cache | None) -> int:
    """As the cache says, else as asked for, else as the data's class names or labels say.

    Raises:
        SettingsError: the cache has another number than asked for, or nothing says how many.
    """
    if cache is not None:
        if config.classes not in (None, cache.header.classes):
            raise SettingsError(
                f"--classes is {config.classes}, but {config.cache} has {cache.header.classes} "
                "classes; leave it out"
            )
        return cache.header.classes
    if config.classes or source.class_names:
        return config.classes or len(source.class_names)
    labels = getattr(source, "labels", None)
    if labels is None or labels.max() < 0:
        raise SettingsError(
            f"data {source.name} does not say how many classes it has; add --classes"
        )
    return int(labels.max()) + 1


def run_facts(
    config: TrainConfig, source: Source, eval_source: Source | None, cache: Cache | None
) -> dict[str, object]:
    """What config.json says of a run: the settings, and whose soft targets it learned from."""
    settings = dataclasses.asdict(config) | {"student": public_name(config.student)}
    settings |= {"data": source.name, "eval_data": eval_source.name if eval_source else None}
    for path in ("out", "cache", "init"):
        settings[path] = settings[path] and settings[path].name
    return {
        "softcache": __version__,
        "input_shape": list(source.fetch([0])[0].shape[1:]),
        "classes": class_count(config, source, cache),
        "content_id": cache.content_id() if cache else None,
        "settings": settings,
    }


def final_table(
    learners: Sequence[Learner], cache: Cache | None, eval_source: Source | None
) -> str:
    """Teachers by what the cache's header says of them, then the students."""
    rows = [Row(learner.name, learner.parameters, learner.evaluation) for learner in learners]
    if cache is None:
        return models_table(rows)
    known = cache.header.evaluation
    same = known and eval_source and known["digest"] == data_digest(eval_source)
    evaluation = Evaluation(known["errors"], known["samples"]) if known and same else None
    parameters = sum(teacher["parameters"] for teacher in cache.header.teachers)
    return models_table([Row("teacher", parameters, evaluation), *rows])
