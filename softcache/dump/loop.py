"""Stage 1: samples become a file. The teacher runs once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from softcache.cache import Cache, Header, Sampled, open_cache
from softcache.cache.header import INPUTS
from softcache.cache.merge import copy_view
from softcache.cache.reader import partial_path
from softcache.cache.summary import summarize, summary_row_count
from softcache.cache.writer import Writer
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.loader import Batch, Request, augmented, loader, make_request
from softcache.data.open import open_source
from softcache.data.source import Source, check_labels
from softcache.dump import fidelity
from softcache.dump.check_resume import check_same
from softcache.dump.config import DumpConfig
from softcache.dump.pipeline import BackgroundConsumer, Stopwatch, prefetch
from softcache.dump.prepare import (
    check_out,
    draft_header,
    load_teachers,
    open_unfinished,
    with_batch_size,
)
from softcache.dump.processes import ProcessGroup, join_processes
from softcache.errors import Interrupted
from softcache.join.fingerprints import check_replay
from softcache.targets.encode import HostCopy, as_arrays, make_encoder
from softcache.targets.fetch import shared_tensors
from softcache.teachers.ensemble import Ensemble
from softcache.util.log import inform
from softcache.util.progress import progress

RUNS_OF_A_PROCESS = 8  # runs of blocks in a view: few enough to be long, many enough to even out


def dump(config: DumpConfig) -> Cache:
    """Write the teacher's soft targets for every sample of the data into `config.out`.

    Run again after any stop, it goes on where it stopped. Asked for more views than a finished
    cache has, it copies those into a new file and adds the others; the old file stays until then.

    Raises:
        SoftcacheError: the settings, the data or the teacher are not as they should be, or the
            disk fails; what was done is kept.
    """
    group = join_processes()
    try:
        cache = dump_in_process(config, group)
    except BaseException:
        group.fail()
        raise
    return cache


def dump_in_process(config: DumpConfig, group: ProcessGroup) -> Cache:
    """What one process of a dump does; the first of them begins the file and ends it."""
    source = open_source(config.data)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    teacher = load_teachers(config, source, augmentation)
    draft = draft_header(config, source, teacher)
    check_out(config.out)
    finished = open_finished(config, draft, source, augmentation)
    if finished is not None and finished.header.views == draft.views:
        if group.first:
            inform(f"{config.out} is complete already; left alone (--overwrite makes it anew)")
        return finished
    try:
        if group.first:
            config = with_batch_size(config, source, teacher, augmentation)
            open_unfinished(config, draft, source, teacher, augmentation, finished)
            if finished is not None:
                copy_views(finished, config.out)
        config = replace(config, batch_size=group.broadcast("batch size", config.batch_size))
        with Writer(config.out) as writer:
            watch = fill_cache(writer, config, source, teacher, augmentation, group)
        group.barrier()
        if group.first:
            finish_dump(config, source, teacher, augmentation)
            header = open_cache(config.out).header
            known = (header.summary or {})["fidelity"]
            inform(fidelity.fidelity_line(known, isinstance(header.encoding, Sampled)))
            inform(watch.advice())
        group.barrier()
    except KeyboardInterrupt:
        partial = partial_path(config.out)
        kept = f"{partial} keeps what was done: the same command goes on"
        raise Interrupted(f"stopped; {kept if partial.exists() else 'nothing was begun'}") from None
    return open_cache(config.out)


def open_finished(
    config: DumpConfig, draft: Header, source: Source, augmentation: Augmentation
) -> Cache | None:
    """The cache that `config.out` is already, if it is what this dump was asked for or part of it.

    Raises:
        SettingsError: it is something else, or more.
    """
    if not config.out.exists() or config.overwrite:
        return None
    finished = open_cache(config.out)
    check_same(finished, draft, source, config.eval_data, config.like, but=["views"])
    if finished.header.views >= draft.views:
        check_same(finished, draft, source, config.eval_data, config.like)
        return finished
    every = np.arange(len(source))
    own = every[draft.first_sample : draft.first_sample + draft.samples]
    check_replay(finished, source, augmentation, own, every)
    return finished


def finish_dump(
    config: DumpConfig, source: Source, teacher: Ensemble, augmentation: Augmentation
) -> None:
    """Measure what was stored, and give the file its name."""
    # as it began, the job checked what was there; all else its processes have written since
    with Writer(config.out, recheck=False) as writer:
        with progress("summary", summary_row_count(writer.cache), "rows") as advance:
            summary = summarize(writer.cache, advance)
        found = fidelity.measure_fidelity(
            writer.cache, source, teacher, augmentation, workers=config.workers
        )
        writer.finish(summary | {"fidelity": found})


def copy_views(finished: Cache, out: Path) -> None:
    """Copy the views of a finished cache into the file of `out` that is to hold more of them."""
    header = finished.header
    inform(f"adding views to {finished.path}, which has {header.views}")
    with Writer(out) as writer, progress("copy", header.samples * header.views, "rows") as advance:
        for view in range(header.views):
            copy_view(finished, writer, view, advance)


def fill_cache(
    writer: Writer,
    config: DumpConfig,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    group: ProcessGroup,
) -> Stopwatch:
    """The dump loop: loading, teacher and disk at the same time, over all batches with missing rows.

    The grid of batches is the same after a resume and in any number of processes, so that each row
    is computed in the same company, and the file comes out the same to the byte.
    """
    header, device, watch = writer.header, teacher.device, Stopwatch()
    encode = make_encoder(
        header.encoding,
        shared_tensors(writer.cache),
        temperature=header.temperature,
        seed=header.seed,
        device=device,
    )
    asked: deque[Task] = deque()

    def requests() -> Iterator[Request]:
        for task in missing_batches(writer, config.batch_size, group):
            asked.append(task)
            samples = header.first_sample + np.arange(task.batch.start, task.batch.stop)
            drawn = header.first_view + task.view
            request = make_request(augmentation, samples.tolist(), drawn, samples)
            # with view 0, as labels and keys are
            yield replace(request, raw=header.embeds_inputs and task.view == 0)

    def store(item: tuple[Task, Batch, HostCopy]) -> None:
        task, batch, copied = item
        keys = batch.keys.numpy().view(np.uint64)
        low, high = task.own.start - task.batch.start, task.own.stop - task.batch.start
        rows = {name: values[low:high] for name, values in as_arrays(copied.wait()).items()}
        samples = {"labels": batch.labels.numpy()[low:high], "keys": keys[low:high]}
        if len(batch.raw):
            samples[INPUTS] = batch.raw.numpy()[low:high]
        writer.write(task.view, task.own.start, rows, samples)

    batches = loader(
        source,
        requests(),
        augmentation=augmentation,
        workers=config.workers,
        keys=True,
        pin_memory=device.type == "cuda",
    )
    total = header.samples * header.views
    done = total - sum(int(writer.missing(view).sum()) for view in range(header.views))
    with progress("dump", total, "rows", done) as advance, BackgroundConsumer(store) as disk:
        for batch in watch.waits("data", prefetch(batches)):
            task = asked.popleft()
            with watch.time("teacher"):
                samples, drawn = batch.sample_ids.numpy(), header.first_view + task.view
                check_labels(batch.labels.numpy(), samples, header.classes, source)
                inputs = augmented(batch, augmentation, drawn, samples, device)
                log_probs = teacher.log_probs(inputs, header.temperature, samples)
                copied = HostCopy.of(encode(log_probs, drawn, samples))
            with watch.time("disk"):
                disk.put((task, batch, copied))
            advance(group.add_rows(task.missing), watch.note())
        with watch.time("disk"):
            disk.finish()
    return watch


@dataclass(frozen=True)
class Task:
    """A batch to compute, by rows of the file."""

    view: int
    batch: range  # of the grid
    own: range  # those of its rows that are this process's to write
    missing: int  # how many of these are not there yet


def missing_batches(writer: Writer, batch_size: int, group: ProcessGroup) -> Iterator[Task]:
    """The batches in which rows are missing, view by view; of several processes, each takes the
    next run of blocks when it is through with its last, so that a slow one holds up nobody."""
    header = writer.header
    per_run = header.blocks
    if group.size > 1:
        aligned = -(-batch_size // header.block_rows)
        per_run = max(1, aligned, header.blocks // (RUNS_OF_A_PROCESS * group.size))
    runs_of_a_view = -(-header.blocks // per_run)
    while (run := group.add("runs", 1) - 1) < runs_of_a_view * header.views:
        view, place = divmod(run, runs_of_a_view)
        start = place * per_run * header.block_rows
        stop = min(header.samples, start + per_run * header.block_rows)
        for at in range(start - start % batch_size, stop, batch_size):
            batch = range(at, min(at + batch_size, header.samples))
            own = range(max(at, start), min(batch.stop, stop))
            missing = int(writer.missing(view, own.start, own.stop).sum())
            if missing:
                yield Task(view, batch, own, missing)
