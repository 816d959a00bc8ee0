"""Stage 2: a cache becomes students. The teacher is not here.

Without a cache the same loop trains on labels alone, which is how a teacher is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

from softcache.cache.reader import open_trainable
from softcache.cache.verify import check_damage
from softcache.data.augment import EXTRA_STREAM
from softcache.data.class_names import all_class_names, check_class_names
from softcache.data.embedded import CacheSource
from softcache.data.loader import Request, ShuffledBatches, joint_loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import Interrupted, ModelError, SettingsError
from softcache.join.joined_data import JoinedData, together
from softcache.train.checkpoint import NAME, Checkpoint, Place, check_checkpoint
from softcache.train.config import TrainConfig
from softcache.train.prepare import (
    check_losses,
    extra_augmentation,
    join_all,
    make_accelerator,
    make_learners,
    open_run_folders,
    planned_runs,
)
from softcache.train.record import final_table, lasting_settings, run_facts, write_card
from softcache.train.run_folder import check_folder
from softcache.train.student import Learner
from softcache.util.extras import import_extra
from softcache.util.progress import progress

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
    for _, _, folder in planned_runs(config):
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
    batches = shuffled_batches(config, parts, starts, accelerator)
    steps = config.epochs * len(batches)
    learners = make_learners(config, accelerator, parts, steps)
    place = checkpoint.load(learners) if checkpoint and going_on else Place()
    if accelerator.is_main_process:
        open_run_folders(learners, checkpoint, place, going_on=going_on, boards=config.tensorboard)
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
                    try_step(config, learner, learner.step, inputs, batch.labels, targets, weight)
                    if at % CHECK_STEPS == 0 and learner.stopped is None:
                        try_step(config, learner, learner.mean_losses, epoch)
                advance(1)
                if checkpoint and accelerator.is_main_process and checkpoint.due():
                    for learner in in_training(learners):
                        try_step(config, learner, learner.check_losses, epoch)
                    checkpoint.save(learners, Place(epoch, at))
            for learner in in_training(learners):
                evaluation = epoch, eval_source, config.workers, config.patience
                try_step(config, learner, learner.finish_epoch, *evaluation)
            over = not in_training(learners)
            if checkpoint and accelerator.is_main_process:
                # after the last one too: what cannot be saved now can be with the same command
                checkpoint.save(learners, Place(config.epochs if over else epoch + 1))
            if over:
                break
    return learners


def in_training(learners: Sequence[Learner]) -> list[Learner]:
    return [learner for learner in learners if learner.stopped is None]


def try_step(
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


def shuffled_batches(
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
