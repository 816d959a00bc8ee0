"""Stage 2: students are trained from a cache. Nothing here can load a teacher.

Without a cache, the same loop trains a model on labels alone, such as a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
from accelerate import Accelerator

from softcache.cache.reader import open_trainable
from softcache.cache.verify import check_damage
from softcache.data.augment import EXTRA_STREAM
from softcache.data.loader import joint_loader
from softcache.data.source import Source
from softcache.data.workers import worker_failures
from softcache.errors import DataError, Interrupted, ModelError
from softcache.join.joined_data import JoinedData, concatenate_batches
from softcache.train.accelerator import make_accelerator
from softcache.train.checkpoint import NAME, Checkpoint, Position, check_checkpoint
from softcache.train.checks import check_losses, check_rows
from softcache.train.config import TrainConfig
from softcache.train.defaults import with_defaults
from softcache.train.prepare import (
    extra_augmentation,
    join_all,
    make_students,
    open_data,
    open_run_folders,
    planned_students,
    shuffled_batches,
    warnings_of_caches,
)
from softcache.train.record import (
    class_names,
    final_table,
    resume_settings,
    run_facts,
    teacher_evaluation,
    write_card,
)
from softcache.train.run_folder import check_folder, save_tokenizer
from softcache.train.student import Student
from softcache.train.tune import tuned
from softcache.train.verdict import impossible_results, verdicts
from softcache.util.extras import import_extra
from softcache.util.lock import exclusive
from softcache.util.log import inform, verdict, warn
from softcache.util.progress import progress
from softcache.util.signals import deferred_stop

CHECK_STEPS = 50  # steps between two checks that the losses are finite


def train(config: TrainConfig) -> list[Student]:
    """Train students, and their hard-label baselines with `config.baseline`, into folders in `config.out`.

    All students share every batch. After any stop, the same command continues from the last checkpoint.
    Under torchrun or accelerate launch, each process takes its share of every batch.

    Returns:
        The students, then the baselines.

    Raises:
        SoftcacheError: the settings, the caches, the data or a student are invalid, or do not fit together.
        ModelError: students failed; the others are finished.
        DataError: a result cannot be right, with `config.strict`; everything is saved.
        Interrupted: the user stopped the run.
    """
    accelerator = make_accelerator(config.device, config.precision)
    with exclusive(config.out) if accelerator.is_main_process else nullcontext(), worker_failures():
        return train_in_process(config, accelerator)


def train_in_process(config: TrainConfig, accelerator: Accelerator) -> list[Student]:
    """One process's part of train(); the main process also writes the files."""
    if config.tensorboard:
        import_extra("tensorboard", extra="tensorboard", what="--tensorboard")
    caches = [open_trainable(path) for path in config.caches]
    check_rows(config, caches)
    sources, eval_source = open_data(config, caches)
    check_losses(config, caches)
    cache_warnings = warnings_of_caches(config, caches)
    settings = resume_settings(config, sources, caches, eval_source)
    checkpoint = Checkpoint(config.out / NAME, settings, config.checkpoint_minutes)
    resuming = check_checkpoint(checkpoint.path, settings, overwrite=config.overwrite)
    for plan in planned_students(config):
        check_folder(plan.folder, overwrite=config.overwrite or resuming)
    if config.verify and accelerator.is_main_process:
        for cache in caches:
            check_damage(cache)
    accelerator.wait_for_everyone()
    asked = config
    config, note = with_defaults(config, caches)
    parts = join_all(config, sources, caches, accelerator.device)
    if note and accelerator.is_main_process:
        inform(note)
    if config.tune:
        config, parts = tuned(asked, config, accelerator, parts, settings, fit)
    try:
        students = fit(config, accelerator, parts, eval_source, checkpoint, resuming=resuming)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; the same command continues from the last checkpoint"
            if checkpoint.path.exists()
            else f"stopped; {config.out} has the metrics so far, but no new student"
        ) from None
    if accelerator.is_main_process:
        finished = [student for student in students if not student.failed]
        teacher = teacher_evaluation(caches, eval_source, config.workers)
        with deferred_stop(resend=False):  # after this there is nothing left to stop
            for student in finished:
                student.restore_best()
                facts = run_facts(config, student, parts, eval_source, teacher)
                facts = student.save(facts | {"chosen": note})
                save_tokenizer(student.final_model, student.folder)
                write_card(student.folder, facts)
            checkpoint.remove()
        inform(final_table(finished, caches, eval_source, teacher))
        for text in cache_warnings:
            verdict(text)
        conclude(config, students, class_names(parts))
    return students


def conclude(config: TrainConfig, students: Sequence[Student], names: Sequence[str]) -> None:
    """Warn of students that did not beat their baselines, and of results that cannot be right.

    Args:
        names: names of the classes; empty if they have none.

    Raises:
        ModelError: students failed.
        DataError: a result cannot be right, and `config.strict` is set.
    """
    finished = [student for student in students if not student.failed]
    impossible = impossible_results(finished, names)
    failures = [str(student.stopped) for student in students if student.failed]
    for text in verdicts(finished):
        verdict(text)
    if not config.strict or failures:
        for text in impossible:
            verdict(text)
    if failures:
        raise ModelError(
            f"{len(failures)} of {len(students)} students failed: {'; '.join(failures)}; "
            f"the others are finished in {config.out}"
        )
    if config.strict and impossible:
        raise DataError(
            f"{'; '.join(impossible)} (the run is saved in {config.out}; --strict makes this an error)"
        )


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    eval_source: Source | None,
    checkpoint: Checkpoint | None = None,
    *,
    resuming: bool = False,
) -> list[Student]:
    """The training loop: every student takes a step on every batch.

    With a cache, each sample goes through its views, one per epoch; on labels alone, every epoch is a new
    view.

    Args:
        parts: joined data sets; every batch is drawn from their union.
        eval_source: labelled data to count errors on after each epoch.
        checkpoint: where the state is saved during training.
        resuming: whether to start from the checkpoint.

    Returns:
        The students, then the baselines.

    Raises:
        ModelError: a student failed in a run of a single student.
    """
    device, offsets = accelerator.device, np.cumsum([0, *map(len, parts)])
    extra = extra_augmentation(config)
    batches = shuffled_batches(config, parts, accelerator)
    steps = config.epochs * len(batches)
    students = make_students(config, accelerator, parts, steps)
    start = checkpoint.load(students) if checkpoint and resuming else Position()
    if accelerator.is_main_process:
        open_run_folders(config, students, checkpoint, start, resuming=resuming)
    loader = joint_loader(
        [(part.source, part.augmentation) for part in parts],
        batches,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    done = start.epoch * len(batches) + start.batch
    with progress("train", steps, "steps", done) as advance, deferred_stop() as stop:
        for epoch in range(start.epoch, config.epochs):
            step = batches.set_epoch(epoch, start.batch if epoch == start.epoch else 0)
            for weight, loaded in zip(batches.weights(), loader, strict=True):
                batch = concatenate_batches(
                    [
                        parts[number].training_batch(part_batch, epoch, device)
                        for number, part_batch in loaded.items()
                    ]
                )
                # (B,) unique over all parts, whose own sample ids can overlap
                sample_ids = np.concatenate(
                    [
                        offsets[number]
                        + part_batch.sample_ids.numpy()
                        - parts[number].sample_ids[0]
                        for number, part_batch in loaded.items()
                    ]
                )
                inputs = batch.inputs
                if extra.ops:
                    inputs = extra(inputs, None, epoch, sample_ids, first_stream=EXTRA_STREAM)
                step += 1
                for student in in_training(students):
                    targets = batch.targets.get(student.temperature)  # none for hard labels
                    given = inputs, batch.labels, targets, weight, batch.rows
                    attempt(config, student, student.step, *given)
                    if step % CHECK_STEPS == 0 and student.stopped is None:
                        attempt(config, student, student.mean_losses, epoch)
                advance(1)
                # with several processes, only where all have just agreed on which students go on
                due = step % CHECK_STEPS == 0 or accelerator.num_processes == 1
                due = bool(checkpoint and checkpoint.due() and due) or stop.signal is not None
                if checkpoint and due and accelerator.is_main_process:
                    for student in in_training(students):
                        attempt(config, student, student.check_losses, epoch)
                    checkpoint.save(students, Position(epoch, step))
                if stop.signal:
                    return students  # deferred_stop() raises KeyboardInterrupt
            for student in in_training(students):
                evaluation = epoch, eval_source, config.workers, config.patience
                attempt(config, student, student.finish_epoch, *evaluation)
            all_stopped = not in_training(students)
            if checkpoint and accelerator.is_main_process:
                # after the last epoch too: if saving a student fails, the same command can do it later
                checkpoint.save(students, Position(config.epochs if all_stopped else epoch + 1))
            if all_stopped or stop.signal:
                break
    return students


def in_training(students: Sequence[Student]) -> list[Student]:
    """The students that have not stopped."""
    return [student for student in students if student.stopped is None]


def attempt(
    config: TrainConfig, student: Student, work: Callable[..., object], *arguments: object
) -> None:
    """Call `work` for one student; if it fails, that student stops and the others continue.

    Raises:
        ModelError: `work` failed in a run of a single student.
    """
    try:
        work(*arguments)
    except ModelError as error:
        if len(config.students) == 1:
            raise
        student.fail(str(error))
        warn(f"{student.name} stopped: {error}")
