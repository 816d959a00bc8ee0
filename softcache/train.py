"""Stage 2: a cache becomes students. The teacher is not here.

Without a cache the same loop trains on labels alone, which is how a teacher is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from softcache.cache import Cache, Sampled, TopK
from softcache.cache.reader import open_trainable
from softcache.checkpoint import NAME, Checkpoint, Place, check_checkpoint
from softcache.data.augment import EXTRA_STREAM, Augmentation, parse_augment
from softcache.data.class_names import all_class_names, check_class_names
from softcache.data.embedded import CacheSource
from softcache.data.loader import Request, ShuffledBatches, joint_loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import DataError, Interrupted, ModelError, SettingsError
from softcache.join.joined_data import JoinedData, labels_alone, together
from softcache.join.match import join
from softcache.learner import (
    Learner,
    begin_run,
    check_folder,
    make_accelerator,
    make_learner,
)
from softcache.losses import parse_loss
from softcache.models.build import build
from softcache.models.weights import load_weights
from softcache.record import final_table, lasting_settings, run_facts, write_card
from softcache.train_settings import StudentConfig, TrainConfig
from softcache.util.extras import import_extra
from softcache.util.progress import progress
from softcache.verify import check_damage

CHECK_STEPS = 50  # between two looks at whether the losses are still finite


def train(config: TrainConfig) -> list[Learner]:
    """Train students, and their hard-label twins if asked for, into folders in `config.out`.

    All of them share each batch. Run again after any stop, the same command goes on from its last
    checkpoint. Under torchrun or accelerate launch each process takes its share of every batch.

    Raises:
        SoftcacheError: the settings, the cache, the data or a student are not as they should be.
    """
    accelerator = make_accelerator(config.device, config.mixed_precision)
    if config.tensorboard:
        import_extra("tensorboard", extra="tensorboard", what="--tensorboard")
    caches = [open_trainable(path) for path in config.caches]
    sources: list[Source] = [open_source(spec) for spec in config.datas]
    sources = sources or [CacheSource(cache) for cache in caches]
    eval_source = open_source(config.eval_data) if config.eval_data else None
    if eval_source is not None:
        for known, whose in (
            *((source.class_names, source.name) for source in sources),
            *((all_class_names(cache), str(cache.path)) for cache in caches),
        ):
            check_class_names(eval_source, known, whose)
    check_losses(config, caches)
    settings = lasting_settings(config, sources, caches, eval_source)
    checkpoint = Checkpoint(config.out / NAME, settings, config.checkpoint_minutes)
    going_on = check_checkpoint(checkpoint.path, settings, overwrite=config.overwrite)
    for _, _, folder in runs(config):
        check_folder(folder, overwrite=config.overwrite or going_on)
    if config.verify and accelerator.is_main_process:
        for cache in caches:
            check_damage(cache)
    accelerator.wait_for_everyone()
    parts = join_all(config, sources, caches, accelerator.device)
    try:
        learners = fit(config, accelerator, parts, eval_source, checkpoint, going_on=going_on)
    except KeyboardInterrupt:
        kept = checkpoint.path.exists()
        raise Interrupted(
            "stopped; the same command goes on from the last checkpoint"
            if kept
            else f"stopped; {config.out} has the metrics so far, but no new student"
        ) from None
    if accelerator.is_main_process:
        failed = [learner for learner in learners if learner.failed]
        done = [learner for learner in learners if not learner.failed]
        for learner in done:
            learner.use_best()
            write_card(learner.folder, learner.save(run_facts(config, learner, parts, eval_source)))
        checkpoint.remove()
        print(final_table(done, caches, eval_source))
        if failed:
            raise ModelError(
                f"{len(failed)} of {len(learners)} students failed: "
                + "; ".join(str(learner.stopped) for learner in failed)
                + f". The others are finished in {config.out}"
            )
    return learners


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    eval_source: Source | None,
    checkpoint: Checkpoint | None = None,
    *,
    going_on: bool = False,
) -> list[Learner]:
    """The training loop: every learner takes a step on every batch, drawn from all parts alike.

    Of a cache a sample is seen in its views in turn; on labels alone, each epoch is a view of its
    own.

    Args:
        checkpoint: where the state is kept on the way.
        going_on: from what the checkpoint holds.
    """
    device, starts = accelerator.device, np.cumsum([0, *map(len, parts)])
    extra = extra_augmentation(config)
    batches = shuffled(config, parts, starts, accelerator)
    steps = config.epochs * len(batches)
    learners = make_learners(config, accelerator, parts, steps)
    place = checkpoint.load(learners) if checkpoint and going_on else Place()
    if accelerator.is_main_process:
        begin(learners, checkpoint, place, going_on=going_on, boards=config.tensorboard)
    batch_loader = joint_loader(
        [(part.source, part.augmentation) for part in parts],
        batches,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    done = place.epoch * len(batches) + place.batch
    with progress("train", steps, "steps", done) as advance:
        for epoch in range(place.epoch, config.epochs):
            at = batches.set_epoch(epoch, place.batch if epoch == place.epoch else 0)
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
                at += 1
                for learner in in_training(learners):
                    targets = batch.targets[learner.temperature] if batch.targets else None
                    attempt(config, learner, learner.step, inputs, batch.labels, targets, weight)
                    if at % CHECK_STEPS == 0 and learner.stopped is None:
                        attempt(config, learner, learner.mean_losses, epoch)
                advance(1)
                if checkpoint and accelerator.is_main_process and checkpoint.due():
                    for learner in in_training(learners):
                        attempt(config, learner, learner.check_losses, epoch)
                    checkpoint.save(learners, Place(epoch, at))
            for learner in in_training(learners):
                evaluation = epoch, eval_source, config.workers, config.patience
                attempt(config, learner, learner.finish_epoch, *evaluation)
            over = not in_training(learners)
            if checkpoint and accelerator.is_main_process:
                # after the last one too: what cannot be saved now can be with the same command
                checkpoint.save(learners, Place(config.epochs if over else epoch + 1))
            if over:
                break
    return learners


def in_training(learners: Sequence[Learner]) -> list[Learner]:
    return [learner for learner in learners if learner.stopped is None]


def attempt(
    config: TrainConfig, learner: Learner, work: Callable[..., object], *arguments: object
) -> None:
    """Let a learner do its part; a student that fails among others stops alone.

    Raises:
        ModelError: it fails, and there is but one student.
    """
    try:
        work(*arguments)
    except ModelError as error:
        if len(config.variants) == 1:
            raise
        learner.fail(str(error))
        print(f"{learner.name} stops: {error}", file=sys.stderr)


def begin(
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
        begin_run(learner.folder, learner.history)
        if boards:
            learner.board = open_board(learner.folder / "tensorboard", place.epoch + 1)


def open_board(folder: Path, epoch: int) -> Any:  # noqa: ANN401  # a SummaryWriter
    """Logs for TensorBoard from `epoch` on; what was logged of it before a stop does not count."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=epoch)


def shuffled(
    config: TrainConfig,
    parts: Sequence[JoinedData],
    starts: npt.NDArray[np.int64],
    accelerator: Accelerator,
) -> ShuffledBatches:
    """The batches of all parts, of which each process gets its share."""

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
    return ShuffledBatches(
        int(starts[-1]),
        config.batch_size,
        config.seed,
        request,
        accelerator.process_index,
        processes,
    )


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
    wanted = [temperature_of(student, caches) for student, _, _ in runs(config)]
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


def runs(config: TrainConfig) -> list[tuple[StudentConfig, str, Path]]:
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
    for student, name, folder in runs(config):
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
